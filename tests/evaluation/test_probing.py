"""Probes in files: round trip, hostile lines, and a run on a tiny model whose answers are given."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from adaptkit.errors import DataError, MissingPathError, StorageError, UnsupportedError
from adaptkit.evaluation.probing import read_probe, run_probe, write_probe
from adaptkit.methods import methods
from adaptkit.methods.mllm.mllm_zero_shot import MllmZeroShot
from adaptkit.methods.probe import ProbeQuestion, make_probe
from tests.backbones import tiny_mllm as tiny
from tests.methods.tiny import NAMES, tiny_clip

QUESTIONS = [
    ProbeQuestion("a/1.png", "Is it réd? Answer yes or no.", True, "colour"),
    ProbeQuestion("a/1.png", "Is it blue?", False, "colour"),
    ProbeQuestion("2.png", "Is it small?", True, "size"),
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a" / "1.png")
    Image.new("RGB", (28, 28), "blue").save(tmp_path / "2.png")
    return tmp_path


def test_a_probe_goes_round(tmp_path):
    write_probe(tmp_path / "probe.jsonl", QUESTIONS)
    assert read_probe(tmp_path / "probe.jsonl") == QUESTIONS
    made = make_probe({"a.png": {"colour": "red"}, "b.png": {"colour": "blue"}})
    write_probe(tmp_path / "made.jsonl", made)
    assert read_probe(tmp_path / "made.jsonl") == made


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[1]", "line 2, isn't an object"),
        ("{", "line 2, isn't JSON"),
        ("[" * 100_000, "line 2, isn't JSON"),
        ('{"image": "a", "question": "?"}', "no text for 'answer'"),
        ('{"image": 3, "question": "?", "answer": "yes"}', "no text for 'image'"),
        ('{"image": "a", "question": " ", "answer": "yes"}', "no text for 'question'"),
        ('{"image": "a", "question": "?", "answer": "maybe"}', "'maybe'; yes or no"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, says):
    file = tmp_path / "probe.jsonl"
    file.write_text(json.dumps({"image": "a", "question": "?", "answer": "YES"}) + f"\n{line}\n")
    with pytest.raises(DataError, match=says):
        read_probe(file)
    file.write_text(file.read_text().splitlines()[0] + "\n\n")
    assert read_probe(file) == [ProbeQuestion("a", "?", True, "all")]


def test_files_that_are_none(tmp_path):
    with pytest.raises(MissingPathError, match="no probe at"):
        read_probe(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds 0 questions"):
        read_probe(tmp_path / "empty.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_probe(tmp_path / "bytes.jsonl")


def test_a_run_of_the_probe(folder, monkeypatch):
    method = MllmZeroShot(tiny.load("llava"), NAMES)
    plain = run_probe(method, QUESTIONS, folder, max_tokens=2)  # a random model says neither
    assert (plain["unanswered"], plain["accuracy"]) == (1.0, 0.0)
    said, asked = iter(["Yes.", "yes", "No"]), []
    prompter = method.mllm.prompter
    monkeypatch.setattr(prompter, "text", lambda ids: next(said))
    ids = prompter.ids
    monkeypatch.setattr(
        prompter, "ids", lambda turns, *given, **more: asked.append(turns) or ids(turns, *given, **more)
    )
    seen = []
    found = run_probe(method, QUESTIONS, folder, progress=lambda what, done, total: seen.append((done, total)))
    assert (found["accuracy"], found["recall"], found["yes_rate"]) == pytest.approx((1 / 3, 0.5, 2 / 3))
    assert found["types"]["size"]["accuracy"] == 0
    assert found["first_answers"] == ["Yes.", "yes", "No"]
    assert seen == [(3, 3)]
    assert any("réd" in turn.text for turns in asked for turn in turns)


def test_what_cannot_be_asked(folder):
    method = MllmZeroShot(tiny.load("llava"), NAMES)
    with pytest.raises(MissingPathError, match=r"'lost.png' isn't in"):
        run_probe(method, [ProbeQuestion("lost.png", "?", True, "all")], folder)
    with pytest.raises(StorageError, match=r"through '\.\.'"):
        run_probe(method, [ProbeQuestion("../2.png", "?", True, "all")], folder / "a")
    with pytest.raises(DataError, match="control token"):
        run_probe(method, [ProbeQuestion("2.png", "Is <image> it?", True, "all")], folder)
    with pytest.raises(UnsupportedError, match="asks no multimodal"):
        run_probe(methods.get("zero-shot")(tiny_clip(), NAMES), QUESTIONS, folder)
