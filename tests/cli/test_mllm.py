"""Multimodal language models through the command line and `FewShotClassifier`: protocols, adapters, bad input."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image

import adaptkit
from adaptkit import FewShotClassifier
from adaptkit.errors import AdaptKitWarning
from adaptkit.evaluation.results import read_run
from adaptkit.storage import read_safetensors, write_safetensors
from adaptkit.training.processes import Processes
from tests.backbones import tiny_mllm as tiny
from tests.cli.conftest import CLASSES


@pytest.fixture
def backbone():
    return f"transformers:{tiny.save('llava')}"


@pytest.mark.parametrize("settings", [[], ["route=letters", "options=2"], ["route=constrained"]])
def test_base_to_novel(call, photos, tmp_path, backbone, settings):
    out = tmp_path / "out"
    words = ["run", photos, "--method", "mllm-zero-shot", "--backbone", backbone, "--shots", 2, "--out", out, "--json"]
    words += [word for setting in settings for word in ("--set", setting)]
    outcome = call(*words, "--protocol", "base-to-novel")
    assert outcome.exit_code == 0, outcome.output
    result = read_run(out)
    assert [(part.name, part.num_classes) for part in result.parts] == [("base", 2), ("novel", 2)]
    assert sum(part.total for part in result.parts) == 8
    assert result.fit["prompt"].startswith("What object is shown")
    assert result.fit["tokens_per_image"] == 4
    letters = result.parts[0].metrics.get("answers", {}).get("letter_bias")
    assert (letters is not None) == ("route=letters" in settings)


def test_answers_that_name_nothing_are_wrong_and_counted(call, photos, tmp_path, backbone):
    out = tmp_path / "out"
    words = ["run", photos, "--method", "mllm-zero-shot", "--backbone", backbone, "--shots", 2, "--out", out]
    outcome = call(*words, "--set", "route=open", "--set", "max_tokens=2")
    assert outcome.exit_code == 0, outcome.output
    part = read_run(out).part("all")
    assert part.metrics["answers"]["share_none"] == 1
    assert part.correct == 0


def test_an_adapter_on_disk_predicts(call, photos, tmp_path, backbone):
    out, picture = tmp_path / "out", photos / "oak" / "0.png"
    words = ["run", photos, "--method", "mllm-icl", "--backbone", backbone, "--shots", 2, "--set", "examples=2"]
    assert call(*words, "--out", out).exit_code == 0
    outcome = call("predict", out, picture, "--json")
    assert outcome.exit_code == 0, outcome.output
    loaded = adaptkit.load(out / "adapter")
    shown = json.loads(outcome.stdout)
    assert loaded.predict_one(picture) in json.dumps(shown)
    assert loaded.predict_proba([picture]).shape == (1, len(CLASSES))


TUNED = (
    *("mllm-lora", "mllm-qlora", "mllm-soft-prompt", "mllm-bitfit", "prior", "recaption", "twin"),
    *("frozen", "magma", "fromage", "qformer"),
)
WITH_PEFT = ("mllm-lora", "mllm-qlora", "prior", "recaption", "twin")


@pytest.mark.parametrize("method", TUNED)
def test_tuned_models_on_disk(call, photos, tmp_path, method):
    out, picture = tmp_path / "out", photos / "oak" / "0.png"
    backbone = f"transformers:{tiny.save(tiny.kind_for(method))}"
    words = ["run", photos, "--method", method, "--backbone", backbone, "--shots", 2, "--protocol", "base-to-novel"]
    outcome = call(*words, "--set", "training.epochs=2", "--out", out)
    assert outcome.exit_code == 0, outcome.output
    result = read_run(out)
    assert [(part.name, part.num_classes) for part in result.parts] == [("base", 2), ("novel", 2)]
    assert result.fit["losses"][1] < result.fit["losses"][0]
    assert result.recipe == f"{method}/base-to-novel"
    assert (out / "adapter" / "peft").is_dir() == (method in WITH_PEFT)
    outcome = call("predict", out, picture, "--json")
    assert outcome.exit_code == 0, outcome.output
    loaded = adaptkit.load(out / "adapter")
    assert loaded.predict_one(picture) in json.dumps(json.loads(outcome.stdout))


def test_a_peft_file_becomes_an_adapter(call, refused, photos, tmp_path, backbone):
    words = ["run", photos, "--method", "mllm-lora", "--backbone", backbone, "--shots", 2, "--set", "training.epochs=1"]
    assert call(*words, "--set", "r=4", "--set", "alpha=8", "--out", tmp_path / "out").exit_code == 0
    file = tmp_path / "out" / "adapter" / "peft" / "adapter_model.safetensors"
    onnx = ["--format", "onnx", "--out", tmp_path / "none"]
    assert "the language model reads every image" in refused("export", tmp_path / "out", *onnx)
    assert "mllm-lora can't be folded" in refused("serve", tmp_path / "out", "--port", 0).replace("\n", " ")
    words = ["import", file, "--method", "mllm-lora", "--backbone", backbone, "--classes", ",".join(CLASSES)]
    outcome = call(*words, "--set", "alpha=8", "--out", tmp_path / "imported")
    assert outcome.exit_code == 0, outcome.output
    pictures = [photos / label / "0.png" for label in CLASSES]
    one, two = (adaptkit.load(tmp_path / name) for name in ("out/adapter", "imported"))
    np.testing.assert_array_equal(one.predict_proba(pictures), two.predict_proba(pictures))
    learned = tmp_path / "imported" / "adapter_model.safetensors"
    state = {key.replace("self_attn", "attention"): value for key, value in read_safetensors(learned).items()}
    write_safetensors(learned, state)
    assert "made with other settings" in refused("predict", tmp_path / "imported", pictures[0])
    renamed = tmp_path / "renamed.safetensors"
    plain = read_safetensors(file).items()
    write_safetensors(renamed, {key.replace("self_attn", "attention"): value for key, value in plain})
    moved = ["import", renamed, *words[2:], "--set", "alpha=8", "--out", tmp_path / "none"]
    assert "no place in" in refused(*moved).replace("\n", " ")
    other = f"transformers:{tiny.save('blip2')}"
    words[words.index(backbone)] = other
    assert "has no layer named" in refused(*words, "--out", tmp_path / "none")
    config = tmp_path / "out" / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(backbone, other))
    assert "load the backbone it was trained on" in refused("predict", tmp_path / "out" / "adapter", pictures[0])


def test_many_methods_on_one_model(call, refused, photos, tmp_path, backbone):
    chosen = "mllm-zero-shot,mllm-lora,zero-shot,tip-adapter,linear-probe,gda"
    words = ["compare", photos, "--methods", chosen, "--backbone", backbone, "--shots", 2, "--out", tmp_path / "out"]
    outcome = call(*words, "--json")
    assert outcome.exit_code == 0, outcome.output
    found = {(run["key"]["method"], run["key"]["backbone"]) for run in json.loads(outcome.stdout)["runs"]}
    assert found == {(name, backbone) for name in chosen.split(",")} | {("zero-shot", "mini"), ("clip-adapter", "mini")}
    assert (tmp_path / "out" / "zero-shot@mini" / "result.json").is_file()
    again = call(*words)  # nothing is run again
    assert "gain: over zero-shot on the same backbone" in again.stdout
    alone = call(*words, "--clip-backbone", "none", "--json")
    assert {run["key"]["backbone"] for run in json.loads(alone.stdout)["runs"]} == {backbone}
    assert "is a multimodal language model itself" in refused(*words, "--clip-backbone", backbone)


def test_fewer_image_tokens(call, refused, photos, tmp_path, backbone):
    words = ["run", photos, "--shots", 2, "--set", "token_reduction=vscan", "--set", "token_keep=0.5"]
    out = tmp_path / "out"
    outcome = call(*words, "--method", "mllm-zero-shot", "--backbone", backbone, "--out", out)
    assert outcome.exit_code == 0, outcome.output
    fit = read_run(out).fit
    assert (fit["tokens_per_image"], fit["tokens_per_image_before"]) == (2, 4)
    none = ["--out", tmp_path / "none"]
    assert "allow_training=true" in refused(*words, "--method", "mllm-lora", "--backbone", backbone, *none)
    other = f"transformers:{tiny.save('blip2')}"
    assert "can't be left out" in refused(*words, "--method", "mllm-zero-shot", "--backbone", other, *none)
    misspelt = ["--set", "token_reduction=vscn", *none]
    assert "did you mean 'vscan'" in refused(*words, "--method", "mllm-icl", "--backbone", backbone, *misspelt)
    assert not (tmp_path / "none").exists()


def test_as_an_estimator(photos, tmp_path, backbone):
    pictures = [Image.open(path) for label in ("oak", "yew") for path in sorted((photos / label).iterdir())[:3]]
    labels = ["oak"] * 3 + ["yew"] * 3
    classifier = FewShotClassifier("mllm-zero-shot", backbone, settings={"normalisation": "calibrated"})
    classifier.fit(pictures, labels)
    tuned = FewShotClassifier("mllm-lora", backbone, training={"epochs": 2, "lr": 1e-2}).fit(pictures, labels)
    for place, made in enumerate((classifier, tuned)):
        before = made.predict_proba(pictures)
        made.save(tmp_path / str(place))
        np.testing.assert_allclose(adaptkit.load(tmp_path / str(place)).predict_proba(pictures), before, atol=1e-6)
    silent = FewShotClassifier("mllm-zero-shot", backbone, settings={"route": "open", "max_tokens": 1})
    with pytest.warns(AdaptKitWarning, match="no answer that names a class for 6 of 6 images"):
        assert silent.fit(pictures, labels).predict_proba(pictures) == pytest.approx(0.5)


def test_a_missing_package_is_one_sentence(refused, photos, tmp_path, backbone, monkeypatch):
    def run(method, name=backbone, *more):
        words = ["run", photos, "--method", method, "--backbone", name, "--shots", 2, "--out", tmp_path / "out", *more]
        message = " ".join(refused(*words).split())
        assert message.count("Error: ") == 1
        assert message.endswith(".")
        assert not (tmp_path / "out").exists()
        return message

    for package in ("peft", "bitsandbytes", "accelerate"):
        monkeypatch.setitem(sys.modules, package, None)
    short = [word for setting in ("tags=false", "max_tokens=2") for word in ("--set", setting)]
    for method, more in {**{key: [] for key in (*WITH_PEFT, "vladva")}, "virft": short, "dive-k": short}.items():
        assert "can't be imported" in (message := run(method, backbone, *more)), method
        assert "pip install 'adaptkit[lora]'" in message or "pip install 'adaptkit[quantised]'" in message, method
    assert "pip install 'adaptkit[quantised]'" in run("mllm-zero-shot", f"{backbone}@nf4")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "pip install 'adaptkit[scale]'" in run("mllm-soft-prompt")


def test_two_processes_that_can_not_share(refused, photos, tmp_path, backbone, monkeypatch):
    """As a second process sees it, before any work; two are started in tests/training/test_processes.py."""
    monkeypatch.setattr("adaptkit.training.processes._current", Processes(1, 2))
    monkeypatch.setattr("adaptkit.evaluation.protocols.run_method", lambda *given, **more: pytest.fail("work began"))
    for method in ("vladva", "dive-k", "twin"):
        words = ["run", photos, "--method", method, "--backbone", backbone, "--shots", 2, "--out", tmp_path / "out"]
        assert f"{method} can't share a batch among 2 processes: start it in one." in refused(*words)


def test_bad_input(refused, photos, tmp_path, backbone):
    def run(*more, dataset=photos, method="mllm-zero-shot"):
        message = refused("run", dataset, "--method", method, "--shots", 2, "--out", tmp_path / "out", *more)
        assert not (tmp_path / "out").exists()
        return " ".join(message.split())

    assert "isn't one" in run("--backbone", "mini")
    assert "can't be opened" in run("--backbone", backbone, method="coop")
    assert "did you mean 'letters'" in run("--backbone", backbone, "--set", "route=lettrs")
    assert "r is 0" in run("--backbone", backbone, "--set", "r=0", method="mllm-lora")
    assert "takes the place of" in run("--backbone", backbone, "--set", "variant=letters", method="mllm-soft-prompt")
    assert "has none: choose a BLIP-2" in run("--backbone", backbone, method="qformer")
    assert "no biases" in run("--backbone", backbone, "--set", "what=biases", method="mllm-bitfit")
    assert "more than the 512" in run("--backbone", backbone, "--set", "tokens=600", method="mllm-soft-prompt")
    leak = ["--protocol", "base-to-novel", "--set", "prompt=Is it a YEW or what?"]
    assert "name novel classes ('yew')" in run("--backbone", backbone, *leak, method="mllm-lora")
    assert "setting 'examples'" in run("--backbone", backbone, "--set", "examples=60", method="mllm-icl")
    assert "for multimodal language models" in run("--backbone", "mini@bf16", method="zero-shot")
    bare = tiny.save("qwen2_vl", tmp_path / "bare", template="")
    assert "no chat template" in run("--backbone", f"transformers:{bare}")
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"oak": "an <image> of an oak"}))
    assert "control token" in run("--backbone", backbone, "--display-names", names)
    names.write_text(json.dumps({"oak": "oak " * 200}))
    assert "more than the 512" in run("--backbone", backbone, "--display-names", names)
