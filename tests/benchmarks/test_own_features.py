"""The benchmark on published features: settings come from training images, and the table says what ran."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from adaptkit.data.features import FeatureStore
from adaptkit.data.sources import load_dataset
from adaptkit.evaluation.stored import backbone_for
from adaptkit.evaluation.tasks import make_task
from benchmarks.own_features import __main__ as benchmark
from benchmarks.own_features.table import markdown
from benchmarks.own_features.tuning import chosen_overrides, held_out_task
from tests.data.feature_file import write_small


@pytest.fixture
def file(tmp_path):
    return write_small(tmp_path / "birds.safetensors")


def task_of(file, shots):
    return make_task(load_dataset(f"features:{file}"), "few-shot", shots)


@pytest.mark.parametrize(("shots", "held"), [(2, 1), (4, 1), (8, 2)])
def test_a_quarter_of_the_shots_is_held_out(file, shots, held):
    task = task_of(file, shots)
    smaller = held_out_task(task)
    assert smaller.val.counts() == [held] * 6
    assert smaller.train.counts() == [shots - held] * 6
    assert set(smaller.val.ids) | set(smaller.train.ids) == set(task.train.ids)


def test_one_shot_leaves_nothing_to_hold_out(file):
    assert held_out_task(task_of(file, 1)) is None


def test_settings_are_chosen_on_training_images(file, tmp_path):
    task = task_of(file, 4)
    backbone, store = backbone_for(task.dataset), FeatureStore(tmp_path / "store")
    chosen = chosen_overrides("tip-adapter", backbone, task, store)
    assert set(chosen) == {"method.alpha", "method.beta"}
    assert chosen_overrides("taskres", backbone, task, store) == {}


def test_the_whole_benchmark_on_a_small_file(file, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "FILES", {"birds": "birds.safetensors"})
    monkeypatch.setattr(benchmark, "SEEDS", {"birds": (1, 2)})
    words = ["--folder", str(tmp_path), "--datasets", "birds", "--shots", "1,2", "--methods", "zero-shot,gda"]
    words += ["--out", str(tmp_path / "results.json")]
    outcome = CliRunner().invoke(benchmark.main, words)
    assert outcome.exit_code == 0, outcome.output
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert len(runs) == 8
    assert sum("failed" in run for run in runs.values()) == 2  # gda with one shot, both seeds
    page = (tmp_path / "table.md").read_text()
    assert "| maple | trains on images |" in page
    assert "| coop | needs a text encoder |" in page
    assert page.count("| – |") == 1
    again = CliRunner().invoke(benchmark.main, words)
    assert "shots, seed" not in again.stderr  # nothing is repeated


def test_the_table_shows_spread_and_gain():
    run = {"dataset": "d", "tested": "test", "total": 10, "shots": 1, "seconds": 1.0}
    accuracies = {"zero-shot": (0.5, 0.5), "clap": (0.6, 0.8)}
    runs = [
        {**run, "method": method, "seed": seed, "accuracy": accuracy}
        for method, pair in accuracies.items()
        for seed, accuracy in enumerate(pair)
    ]
    lines = markdown(runs, {"maple": "trains on images"}).splitlines()
    assert "| zero-shot | 50.0 ± 0.0 | +0.0 | 1.0 |" in lines
    assert "| clap | **70.0 ± 14.1** | +20.0 | 1.0 |" in lines
