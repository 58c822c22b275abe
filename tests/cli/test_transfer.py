"""`run` and `compare` with targets, joint candidates and class lists: what they print, what they refuse."""

from __future__ import annotations

import json
import shutil

import pytest

from adaptkit.evaluation.results import read_run


@pytest.fixture
def dark_photos(photos, tmp_path):
    """Three of the four classes again, under the same folder names."""
    shutil.copytree(photos, tmp_path / "dark")
    shutil.rmtree(tmp_path / "dark" / "oak")
    for path in sorted((tmp_path / "dark").rglob("*.png"))[::2]:
        path.unlink()
    return tmp_path / "dark"


def test_cross_dataset_prints_a_row_for_each_target(call, photos, dark_photos, tmp_path):
    words = ["run", photos, "--protocol", "cross-dataset", "--method", "tip-adapter", "--shots", 2]
    words += ["--targets", f"digits,{dark_photos}", "--out", tmp_path / "out"]
    outcome = call(*words)
    assert outcome.exit_code == 0, outcome.output
    rows = [line.split("│")[1:3] for line in outcome.stdout.splitlines() if line.startswith("│")]
    assert [name.strip() for name, _ in rows] == ["source", "digits", "dark", "average", "trained", "seconds"]
    shown = [number.strip() for _, number in rows]
    assert shown[1].endswith("*")
    assert float(shown[3]) == pytest.approx((float(shown[1][:-1]) + float(shown[2])) / 2, abs=0.11)
    printed = json.loads(call(*words, "--overwrite", "--json").stdout)
    assert printed["target_average"] == read_run(tmp_path / "out").target_average
    assert "mean of targets" in (tmp_path / "out" / "adapter" / "README.md").read_text()


def test_compare_ranks_by_the_targets_average(call, photos, dark_photos, tmp_path):
    words = ["compare", photos, "--protocol", "domain-generalisation", "--targets", dark_photos, "--shots", 2]
    words += ["--out", tmp_path / "out"]
    outcome = call(*words)
    assert outcome.exit_code == 0, outcome.output
    assert all(word in outcome.stdout for word in ("source", "dark", "average", "drop", "gain"))
    runs = json.loads(call(*words, "--json").stdout)["runs"]
    assert {len(run["parts"]) for run in runs} == {2}
    assert len(runs) >= 5
    assert [part["num_classes"] for part in runs[0]["parts"]] == [4, 3]
    averages = [run["target_average"] for run in runs[1:]]
    assert averages == sorted(averages, reverse=True)
    assert all(run["drop"] == pytest.approx(run["parts"][0]["correct"] / run["parts"][0]["total"] - average)
               for run, average in zip(runs[1:], averages, strict=True))  # fmt: skip


def test_marked_options_stand_in_the_title(call, refused, photos, tmp_path):
    words = ["run", photos, "--protocol", "base-to-novel", "--method", "zero-shot", "--shots", 2]
    joint = call(*words, "--joint", "--class-split", 3, "--out", tmp_path / "joint")
    assert joint.exit_code == 0, joint.output
    title = joint.stdout.split("┏")[0].replace("\n", " ")
    assert "random class split (seed 3)" in " ".join(title.split())
    assert "joint" in title
    (tmp_path / "base.txt").write_text("yew\n")
    lists = call(*words, "--base-classes", tmp_path / "base.txt", "--out", tmp_path / "lists", "--json")
    assert lists.exit_code == 0, lists.output
    assert json.loads(lists.stdout)["class_names"] == ["yew"]
    (tmp_path / "base.txt").write_text("yew\noka\n")
    assert "'oak'" in refused(*words, "--base-classes", tmp_path / "base.txt", "--out", tmp_path / "x")


def test_compare_names_every_method_that_refuses_the_task(refused, photos, tmp_path):
    words = ["compare", photos, "--protocol", "base-to-novel", "--joint", "--shots", 2, "--out", tmp_path / "out"]
    message = refused(*words)
    assert all(f"{name} scores" in message for name in ("linear-probe", "tip-adapter", "tip-adapter-f"))
    assert "clip-adapter" not in message
    assert not (tmp_path / "out").exists()


def test_default_folders_tell_the_options_apart(call, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["run", photos, "--protocol", "base-to-novel", "--method", "zero-shot", "--shots", 2]
    for more in ([], ["--joint"], ["--class-split", 1]):
        assert call(*words, *more).exit_code == 0
    names = {path.name for path in (tmp_path / "runs" / "photos" / "zero-shot").iterdir()}
    plain = "base-to-novel-2shots-seed1"
    assert names == {plain, f"{plain}-joint", f"{plain}-split1"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--targets", "digits"], "--targets"),
        (["--protocol", "cross-dataset"], "Name the targets"),
        (["--protocol", "cross-dataset", "--targets", "digts"], "Did you mean 'digits'"),
        (["--protocol", "cross-dataset", "--targets", ","], "no name was given"),
        (["--protocol", "domain-generalisation", "--targets", "digits"], "cross-dataset"),
        (["--protocol", "few-shot", "--joint"], "--joint"),
        (["--template", "@absent.txt"], "absent.txt"),
    ],
)
def test_wrong_words_are_refused(refused, photos, tmp_path, words, says):
    message = refused("run", photos, "--method", "zero-shot", "--shots", 2, "--out", tmp_path / "out", *words)
    assert says in message.replace("\n", " ")
    assert not (tmp_path / "out").exists()
