"""The benchmark of methods on frozen features, at tiny sizes; no time is asserted."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from adaptkit.methods import methods
from benchmarks.features import __main__ as cli
from benchmarks.features.measure import (
    RandomTexts,
    Sizes,
    draw_task,
    job,
    measure_encoding,
    measure_method,
    why_left_out,
)
from benchmarks.speed.measure import ProcessFailedError
from tests.methods.tiny import tiny_clip

SIZES = Sizes(classes=5, shots=3, val_shots=1, queries=7, dim=24, encoded=2)
MEASURED = [name for name in methods if not why_left_out(name)]


def test_what_is_left_out_and_why():
    assert why_left_out("maple") == "reads images"
    assert "text tower" in why_left_out("coop")
    assert {"tip-adapter", "tip-adapter-f", "gda", "ape", "ape-t", "clip-adapter"} <= set(MEASURED)
    for name in set(methods) - set(MEASURED):
        assert (
            methods.get(name).reads == "images"
            or methods.get(name).reads_descriptions == "needed"
            or (methods.entry(name).family == "prompts")
        )


QUICK_ONES = ["clip-adapter", "tip-adapter", "tip-adapter-f", "gda", "ape", "ape-t", "linear-probe", "waffleclip"]
"""Of every kind; others train for minutes by their own settings, also where there is next to nothing to learn."""


@pytest.mark.parametrize("name", QUICK_ONES)
def test_methods_of_every_kind_are_measured(name):
    row = measure_method(name, SIZES)
    assert row["kind"] in ("training-free", "trained", "own solver")
    assert row["fit_seconds"] > 0
    assert row["predict_seconds"] > 0
    assert (row["epoch_seconds"] is None) == (row["kind"] != "trained")
    assert json.loads(json.dumps(row)) == row


def test_kinds():
    kinds = {name: measure_method(name, SIZES)["kind"] for name in ("gda", "ape", "ape-t", "linear-probe")}
    assert kinds == {"gda": "training-free", "ape": "training-free", "ape-t": "trained", "linear-probe": "own solver"}


def test_texts_and_features_are_drawn_once_and_for_all():
    texts = RandomTexts(8).text_features(["a", "b", "a"])
    assert torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0], texts[1])
    one, two = draw_task(SIZES, 2), draw_task(SIZES, 2)
    assert one.train.values.shape == (3, 15, 24)
    assert torch.equal(one.train.values, two.train.values)
    assert draw_task(Sizes(5, 3, 0, 7, 24), 0).val is None


def test_encoding_is_extrapolated_and_says_so():
    found = measure_encoding(tiny_clip(), SIZES, rounds=2)
    assert (found["images"], found["measured_images"], len(found["samples"])) == (15, 2, 2)
    assert found["extrapolated"]
    assert found["seconds"] == pytest.approx(sum(found["samples"]) / 2 / 2 * 15)


def test_verdicts():
    free = {"kind": "training-free", "fit_seconds": 5.0, "epoch_seconds": None}
    trained = {"kind": "trained", "fit_seconds": 99.0, "epoch_seconds": 2.0}
    assert cli.judged(free, 30.0) == {**free, "ratio": None, "met": True}
    assert cli.judged({**free, "fit_seconds": 61.0}, 30.0)["met"] is False
    assert cli.judged(trained, 30.0) == {**trained, "ratio": 15.0, "met": False}
    assert cli.judged(trained, 40.0)["met"] is True
    assert cli.judged({**trained, "kind": "own solver", "epoch_seconds": None}, 40.0)["met"] is None


def fake(command, timeout):
    asked = json.loads(command[-1])
    if asked["name"] == "gda":
        raise ProcessFailedError("python: timed out after 5 seconds")
    return f"a warning\n{json.dumps(measure_method(asked['name'], Sizes(**asked['sizes'])))}\n"


def test_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "run_process", fake)
    out = tmp_path / "found.json"
    words = ["--quick", "--only", "tip-adapter", "--only", "gda", "--only", "maple", "--limit", "5", "--out", str(out)]
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 1  # one took too long
    written = json.loads(out.read_text())
    assert written["methods"]["gda"] == {"failed": "took more than 5 s"}
    assert written["methods"]["maple"] == {"left_out": "reads images"}
    assert written["methods"]["tip-adapter"]["settings_tried"] == 4000
    assert written["sizes"]["classes"] == 20
    assert written["quick"]
    assert "tip-adapter     training-free" in result.output
    assert "MISSED" not in result.output
    assert job("gda", SIZES) == json.dumps({"name": "gda", "sizes": vars(SIZES)})


def test_unknown_methods_are_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(cli, "measure_encoding", lambda *_: pytest.fail("it ran"))
    result = CliRunner().invoke(cli.main, ["--quick", "--only", "gdaa"])
    assert result.exit_code
    assert "gda" in str(result.exception)
