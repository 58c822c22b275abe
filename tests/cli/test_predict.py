"""`adaptkit predict`: the same answers as the run recorded, which images it takes, and adapters it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from adaptkit.backbones import mini
from adaptkit.data.sources import load_dataset
from adaptkit.storage import read_safetensors


@pytest.fixture
def adapter(call, photos, tmp_path):
    """A finished run of linear-probe."""
    outcome = call("run", photos, "--method", "linear-probe", "--shots", 4, "--out", tmp_path / "out")
    assert outcome.exit_code == 0, outcome.output
    return tmp_path / "out"


def predict(call, *words: object) -> list[dict]:
    outcome = call("predict", *words, "--json")
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout)["predictions"]


@pytest.mark.parametrize("method", ["zero-shot", "linear-probe", "tip-adapter", "coop", "maple"])
def test_predictions_are_those_of_the_run(call, photos, tmp_path, method):
    quick = [] if method in ("zero-shot", "linear-probe") else ["--set", "training.views=0"]
    quick += ["--set", "training.epochs=1"] if method in ("coop", "maple") else []
    outcome = call("run", photos, "--method", method, "--shots", 4, "--out", tmp_path / "out", *quick)
    assert outcome.exit_code == 0, outcome.output
    data = load_dataset(photos, shots=4)
    recorded = read_safetensors(tmp_path / "out/predictions.safetensors")
    answers = predict(call, tmp_path / "out", *(photos / name for name in data.test.ids), "--top", 9)
    assert len(answers) == len(data.test) == len(recorded["all.predicted"])
    for answer, predicted, confidence in zip(
        answers, recorded["all.predicted"].tolist(), recorded["all.confidence"].tolist(), strict=True
    ):
        name, probability = answer["classes"][0]
        assert name == data.class_names[predicted]
        assert probability == pytest.approx(confidence, abs=1e-5)
        assert sorted(pair[0] for pair in answer["classes"]) == sorted(data.class_names)  # --top beyond the classes
        assert sum(pair[1] for pair in answer["classes"]) == pytest.approx(1, abs=1e-6)


def test_folders_give_their_images_sorted_and_nothing_else(call, refused, adapter, tmp_path):
    folder = tmp_path / "new"
    (folder / "deep").mkdir(parents=True)
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 30, 3), dtype=np.uint8))
    for name in ("b.png", "a.JPG", "deep/c.webp"):
        noise.save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / "._a.JPG").write_bytes(b"what macOS leaves beside a file")
    found = [answer["image"] for answer in predict(call, adapter, folder, "--batch-size", 1)]
    assert found == [str(folder / name) for name in ("a.JPG", "b.png", "deep/c.webp")]
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused("predict", adapter, tmp_path / "empty").replace("\n", " ")
    assert "Missing argument" in refused("predict", adapter)


def test_names_are_printed_as_they_are(call, photos, tmp_path):
    (photos / "oak").rename(photos / "[red]oak[-red]")
    outcome = call("run", photos, "--method", "linear-probe", "--shots", 4, "--out", tmp_path / "out")
    assert outcome.exit_code == 0, outcome.output
    outcome = call("predict", tmp_path / "out", photos / "[red]oak[-red]" / "0.png", "--top", 1)
    assert outcome.exit_code == 0, outcome.output
    assert "[red]oak[-red]" in outcome.output.replace("\n", "")


def test_another_backbone_is_refused(refused, photos, adapter, monkeypatch):
    plain = mini.mini_state_dict()
    monkeypatch.setattr(mini, "mini_state_dict", lambda: {**plain, "text_projection": 2 * plain["text_projection"]})
    message = refused("predict", adapter, photos / "oak/0.png", "--backbone", "mini").replace("\n", " ")
    assert "was trained on 'mini' with digest" in message
    assert "Did you mean 'mini'" in refused("predict", adapter, photos / "oak/0.png", "--backbone", "minni")


def test_hostile_and_damaged_adapters_are_refused(refused, photos, adapter):
    image, folder = photos / "oak/0.png", adapter / "adapter"
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    good, facts = weights.read_bytes(), json.loads(config.read_text())
    damage = {"pickled": b"\x80\x04\x95" + good, "empty": b"", "claims much": (2**62).to_bytes(8, "little") + good[8:]}
    for content in damage.values():
        weights.write_bytes(content)
        assert "save the adapter again" in refused("predict", adapter, image).replace("\n", " ")
    weights.unlink()
    assert "save the adapter again" in refused("predict", adapter, image).replace("\n", " ")
    weights.write_bytes(good)
    for change, says in (
        ({"method": "linear-prob"}, "Did you mean 'linear-probe'"),
        ({"method": "../linear-probe"}, "Unknown method"),
        ({"schema_version": 99}, "update adaptkit"),
        ({"config": {"unknown": 1}}, "unknown"),
        ({"class_names": facts["class_names"][:3]}, "shape"),
        ({"backbone": {}}, "backbone"),
    ):
        config.write_text(json.dumps({**facts, **change}))
        assert says in refused("predict", adapter, image).replace("\n", " ")
    config.write_text(json.dumps(facts)[:-30])
    assert "damaged" in refused("predict", adapter, image).replace("\n", " ")
