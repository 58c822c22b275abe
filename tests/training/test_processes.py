"""Several processes that share a run: same losses and parameters as one, whatever a share counts; counts of answers."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from adaptkit.data.sources import load_dataset
from adaptkit.errors import StorageError, TrainingError, UnsupportedError
from adaptkit.evaluation import protocols
from adaptkit.evaluation.tasks import make_task
from adaptkit.methods import methods
from adaptkit.methods.mllm._tuning import TunedMllm
from adaptkit.training.checkpoints import Checkpoints
from adaptkit.training.loop import fit_method
from adaptkit.training.processes import ALONE, Processes, current, launched, together
from tests.backbones import tiny_mllm
from tests.methods.tiny import make_task as tiny_task
from tests.methods.tiny import tiny_clip

NAMES = ("cat", "snow leopard with a very long tail", "acorn", "river")
"""Answers of different lengths: shares of a batch count differently."""


class Pair:
    """What two threads, which play processes, tell each other."""

    def __init__(self) -> None:
        self.barrier, self.said = threading.Barrier(2, timeout=120), [None, None]

    def exchange(self, rank, value):
        self.said[rank] = value
        self.barrier.wait()
        found = list(self.said)
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class Played(Processes):
    pair: Pair = field(default_factory=Pair)

    def total(self, values):
        return sum(self.pair.exchange(self.rank, values))

    def gathered(self, value):
        return self.pair.exchange(self.rank, value)

    def rows_of_all(self, rows):
        return torch.cat(self.pair.exchange(self.rank, rows))


@pytest.fixture
def both(monkeypatch):
    """Runs a function as two processes would, each with its `Processes`; gives what both returned."""
    local = threading.local()
    monkeypatch.setattr("adaptkit.training.loop.current", lambda: getattr(local, "processes", ALONE))
    monkeypatch.setattr("adaptkit.evaluation.protocols.current", lambda: getattr(local, "processes", ALONE))

    def run(function):
        pair, found, errors = Pair(), [None, None], []

        def one(rank):
            local.processes = Played(rank, 2, pair=pair)
            try:
                found[rank] = function(local.processes)
            except BaseException as error:
                errors.append(error)
                pair.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return found

    return run


def fit(name="mllm-soft-prompt", batch_size=3, kept=None, backbone=None, **settings):
    kind, backbone = methods.get(name), backbone or tiny_mllm.load("llava")
    method = kind(backbone, NAMES, seed=3, config=kind.config_class(**settings))
    training = replace(kind.default_training, epochs=2, batch_size=batch_size, lr=1e-2)
    task = replace(tiny_task(backbone, kind.reads, shots=2), class_names=NAMES)
    return method.adapter_state, fit_method(method, task, training, checkpoints=kept)


@pytest.mark.parametrize(("variant", "batch_size"), [("sft", 3), ("sft", 7), ("softmax", 3)])
def test_two_train_as_one(both, variant, batch_size):
    """7 of 8 images make a batch in which the second one has no share of the rest."""
    state, report = fit(batch_size=batch_size, variant=variant)
    (first, told), (second, _) = both(lambda processes: fit(batch_size=batch_size, variant=variant))
    assert told["losses"] == pytest.approx(report["losses"], rel=1e-5)
    assert (told["steps"], told["epochs"]) == (report["steps"], report["epochs"])
    for key, value in state().items():
        torch.testing.assert_close(first()[key], value, rtol=1e-5, atol=1e-5)
        assert torch.equal(first()[key], second()[key])  # both end with the very same


def test_shares_are_weighted_by_supervised_tokens(both, monkeypatch):
    """As a mean of means it would be another training."""
    state, _ = fit()
    monkeypatch.setattr(TunedMllm, "share_weight", lambda self, labels: float(len(labels)))
    (first, _), _ = both(lambda processes: fit())
    assert any((first()[key] - value).abs().max() > 1e-4 for key, value in state().items())


def test_several_go_on_from_a_checkpoint_and_one_can_not(both, tmp_path):
    def first_steps(processes):
        kept = Checkpoints(tmp_path / "kept", "a", every=0, processes=2)
        write, count = kept.write, 0

        def counted(*given):
            nonlocal count
            write(*given)
            count += 1
            if count == 2:
                raise KeyboardInterrupt

        kept.write = counted
        with contextlib.suppress(threading.BrokenBarrierError):
            fit(kept=kept)
            processes.pair.barrier.abort()  # the first was stopped: a launcher ends the other

    both(first_steps)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    with pytest.raises(StorageError, match="2 processes instead of 1"):
        Checkpoints(tmp_path / "kept", "a")
    whole, _ = both(lambda processes: fit())
    kept = lambda: Checkpoints(tmp_path / "kept", "a", every=99, processes=2)  # noqa: E731
    (resumed, report), _ = both(lambda processes: fit(kept=kept()))
    assert report["resumed_at"] == 2
    for key, value in whole[0]().items():
        assert torch.equal(value, resumed()[key])


def test_different_checkpoints_are_refused(both, tmp_path):
    both(lambda processes: fit(kept=Checkpoints(tmp_path / "kept", "a", every=0, processes=2)))

    def run(processes):
        folder = tmp_path / ("kept" if processes.main else "nowhere")
        return fit(kept=Checkpoints(folder, "a", every=99, processes=2))

    with pytest.raises(TrainingError, match="different checkpoints: their folder must be one that all of them see"):
        both(run)


def test_methods_that_can_not_share_are_refused(both):
    with pytest.raises(UnsupportedError, match="coop can't share a batch among 2 processes: start it in one"):
        both(lambda processes: fit("coop", backbone=tiny_clip()))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("recaption", {"names": 0.0}),
        ("prior", {}),
        ("fromage", {}),
        ("qformer", {"stages": "1+2"}),
        ("frozen", {"align_to": "p-former", "teacher_steps": 1}),
    ],
)
def test_losses_that_are_no_mean_of_shares_are_refused(both, name, settings):
    backbone = tiny_mllm.load(tiny_mllm.kind_for(name))
    with pytest.raises(UnsupportedError, match=f"{name} can't share a batch"):
        both(lambda processes: fit(name, backbone=backbone, **settings))


@pytest.mark.parametrize(("name", "settings"), [("frozen", {}), ("magma", {}), ("qformer", {"level": "a"})])
def test_bridges_share_what_they_say_of_images(both, name, settings):
    backbone = tiny_mllm.load(tiny_mllm.kind_for(name))
    state, report = fit(name, backbone=backbone, **settings)
    (first, told), (second, _) = both(lambda processes: fit(name, backbone=backbone, **settings))
    assert told["losses"] == pytest.approx(report["losses"], rel=1e-4)
    for key, value in state().items():
        torch.testing.assert_close(first()[key], value, rtol=1e-4, atol=1e-4)
        assert torch.equal(first()[key], second()[key])


def test_answers_are_shared_and_counted(both, tmp_path):
    from adaptkit.data.features import FeatureStore

    backbone, data = tiny_mllm.load("llava"), load_dataset("digits")
    test = data.test.subset(torch.arange(9).numpy())  # an odd number: one share is longer
    task = make_task(replace(data, test=test), "few-shot", 1, 1)
    plan = protocols.plan_run("mllm-zero-shot", backbone, task)
    run = lambda processes=None: protocols.run_method(plan, backbone, store=FeatureStore(tmp_path))  # noqa: E731
    one, two = run(), both(run)
    for outcome in two:
        assert outcome.result.parts == one.result.parts
        assert outcome.result.parts[0].total == 9
        assert outcome.predictions[0].predicted.tolist() == one.predictions[0].predicted.tolist()
    with pytest.raises(TrainingError, match="9 images were to be answered by 2 processes, and 8 were"):
        both(lambda processes: processes.joined(torch.zeros(4, 1), 9))


def test_without_a_launcher_there_is_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with together("cpu") as processes:
        assert processes is ALONE is current()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched() == 2
    with pytest.raises(UnsupportedError, match="say --device cuda"), together("cuda:0"):
        pass
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UnsupportedError, match="pip install 'adaptkit\\[scale\\]'"), together("cpu"):
        pass


def test_shares_cover_a_batch():
    seen = 0
    for count in range(1, 5):
        for length in range(1, 9):
            order = torch.arange(length)
            all_of_them = [Processes(rank, count) for rank in range(count)]
            assert torch.equal(torch.cat([one.share(order) for one in all_of_them]), order)
            assert {len(one.padded_share(order)) for one in all_of_them} == {-(-length // count)}
            seen += 1
    assert seen == 32


# --- for real ---------------------------------------------------------------------------------------------------------


def adaptkit(out, *words, processes=1, **variables):
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    settings = ["--set", "training.epochs=2", "--shots", "4", "--json", "--out", str(out)]
    given = ["run", "shapes", "--backbone", "mini-mllm", "--protocol", "base-to-novel", *words, *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    folder = Path(__file__).parents[2]
    return subprocess.run(
        [*start, "adaptkit", *given], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("variables", [{}, {"ACCELERATE_USE_FSDP": "true"}], ids=["DDP", "FSDP"])
@pytest.mark.parametrize(
    "words",
    [("--method", "mllm-soft-prompt"), ("--method", "mllm-lora", "--set", "dropout=0")],
    ids=["soft-prompt", "lora"],
)
def test_two_processes_run_as_one(variables, words, tmp_path):
    from adaptkit.storage import read_safetensors

    alone = adaptkit(tmp_path / "one", *words)
    assert alone.returncode == 0, alone.stderr
    several = adaptkit(tmp_path / "two", *words, processes=2, **variables)
    assert several.returncode == 0, several.stderr
    one, two = json.loads(alone.stdout), json.loads(several.stdout)  # one of them printed
    assert two["environment"]["processes"] == 2
    assert two["environment"]["sharded"] == bool(variables)
    assert two["fit"]["losses"] == pytest.approx(one["fit"]["losses"], rel=1e-4)
    assert [part["total"] for part in two["parts"]] == [part["total"] for part in one["parts"]]
    for ours, theirs in zip(two["parts"], one["parts"], strict=True):
        assert abs(ours["correct"] - theirs["correct"]) <= 1  # a near tie may fall the other way
    first, second = (
        read_safetensors(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")
    )
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-4, atol=1e-4)  # AdamW divides by tiny gradients


@pytest.mark.parametrize("verb", ["compare", "sweep"])
def test_other_verbs_are_started_alone(verb, monkeypatch):
    from click.testing import CliRunner

    from adaptkit.commands.main import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = CliRunner().invoke(main, [verb, "shapes"])
    assert outcome.exit_code == 2
    assert f"Several processes can share a run, not '{verb}': start it without torchrun." in outcome.output


@pytest.mark.slow
def test_what_can_not_be_shared_is_said_once(tmp_path):
    outcome = adaptkit(tmp_path / "out", "--method", "vladva", processes=2)
    assert outcome.returncode != 0
    assert outcome.stderr.count("vladva can't share a batch among 2 processes") == 1
