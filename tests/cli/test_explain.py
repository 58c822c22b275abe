"""`adaptkit explain`: words for learned prompts, a clear sentence for methods that have none."""

from __future__ import annotations

import json

import pytest
import torch

from adaptkit.methods.adapter import load_adapter


@pytest.fixture
def run(call, photos, tmp_path):
    def make(method: str, *extra: object):
        words = (
            "--shots",
            2,
            "--set",
            "training.epochs=2",
            "--set",
            "training.views=0",
            "--set",
            "training.lr=1",
            *extra,
        )
        words = ("--shots", 2) if method == "linear-probe" else words
        outcome = call("run", photos, "--method", method, *words, "--out", tmp_path / method, "--overwrite")
        assert outcome.exit_code == 0, outcome.output
        return tmp_path / method

    return make


def explained(call, *words: object) -> dict:
    outcome = call("explain", *words, "--json")
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stderr == ""
    return json.loads(outcome.stdout)


def test_json_holds_the_nearest_words(call, run):
    folder = run("coop", "--set", "context_init=a photo of")
    found = explained(call, folder, "--top", 2)
    assert (found["method"], found["classes"]) == ("coop", ["beech", "oak", "pine", "yew"])
    assert found["trained"] == 3 * 128
    assert found["left_out"] == 0
    assert "rarely read as language" in found["caution"]
    method = load_adapter(folder / "adapter").method
    embedding = method.backbone.text_tower.token_embedding.weight.detach()
    away = torch.cdist(method.context.detach(), embedding)  # [3, tokens]
    assert len(found["vectors"]) == 3
    for index, (vector, word) in enumerate(zip(found["vectors"], ("a", "photo", "of"), strict=True)):
        assert (vector["group"], vector["index"], vector["start"]) == ("context", index + 1, word)
        assert vector["norm"] == pytest.approx(float(method.context[index].detach().norm()), rel=1e-5)
        (start,) = method.backbone.word_pieces(word)
        assert vector["moved"] == pytest.approx(float(away[index, start]), rel=1e-3)
        assert len(vector["nearest"]) == 2
        assert [near["distance"] for near in vector["nearest"]] == pytest.approx(
            away[index].sort().values[:2].tolist(), rel=1e-3
        )
        assert all(near["word"] == method.backbone.piece_text(near["token"]) for near in vector["nearest"])


def test_the_table(call, run):
    outcome = call("explain", run("coop", "--set", "context_init=a photo of"), "--top", 1)
    assert outcome.exit_code == 0, outcome.output
    for says in ("context 1", "context 3", "started from", "photo", "384", "beech, oak, pine, yew"):
        assert says in outcome.stdout.replace("\n", "")
    assert "rarely read as language" in outcome.stderr
    random = call("explain", run("coop", "--set", "context_init="), "--limit", 2).stdout.replace("\n", "")
    assert "started from" not in random
    assert "more vectors left out" in random


def test_class_specific_contexts_are_cut_off_and_counted(call, run):
    words = ("--set", "class_specific=true", "--set", "context_init=", "--set", "num_context=3")
    found = explained(call, run("coop", *words), "--limit", 4)
    assert [vector["group"] for vector in found["vectors"]] == [*["context of beech"] * 3, "context of oak"]
    assert found["left_out"] == 8


@pytest.mark.parametrize("method", ["linear-probe", "clip-adapter"])
def test_methods_without_words_say_what_they_learned(call, run, method):
    folder = run(method)
    outcome = call("explain", folder)
    assert outcome.exit_code == 2
    assert isinstance(outcome.exception, SystemExit)
    assert "beech, oak, pine, yew" in outcome.stdout.replace("\n", "")  # the facts come first
    assert outcome.stderr.startswith(f"Error: {method} learns no vectors among the words")
    assert "coop" in outcome.stderr.split("can be explained:")[1]
    assert outcome.stderr.count("\n") == 1
    outcome = call("explain", folder, "--json")
    assert outcome.exit_code == 2
    found = json.loads(outcome.stdout)
    assert (found["method"], found["vectors"]) == (method, [])
    assert found["why_none"].startswith(method)


def test_what_is_no_adapter(refused, photos, tmp_path):
    assert "not an adapter folder" in refused("explain", photos).replace("\n", " ")
    assert "not an adapter folder" in refused("explain", tmp_path / "absent").replace("\n", " ")
