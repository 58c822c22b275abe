"""`adaptkit export`: a merged checkpoint predicts as the adapter does; what can't be merged is refused in a line."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import torch.nn.functional as F

from adaptkit import FewShotClassifier
from adaptkit.backbones.load import load_backbone
from adaptkit.evaluation.calibration import CalibrationWarning
from adaptkit.methods.adapter import load_adapter

pytest.importorskip("peft")


@pytest.fixture
def trained(call, photos, tmp_path):
    def make(method: str, *extra: object):
        words = ("--shots", 2, "--set", "training.epochs=1", "--set", "training.views=0", *extra)
        outcome = call("run", photos, "--method", method, *words, "--out", tmp_path / method)
        assert outcome.exit_code == 0, outcome.output
        return tmp_path / method

    return make


def test_a_merged_checkpoint(call, trained, tmp_path):
    run = trained("clip-lora", "--set", "training.lr=0.01")
    outcome = call("export", run, "--merge", "--out", tmp_path / "merged", "--json")
    assert outcome.exit_code == 0, outcome.output
    written = json.loads(outcome.stdout)
    assert written["method"] == "clip-lora"
    assert written["files"] == [
        "README.md",
        "labels.json",
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "parity.json",
        "preprocessing.json",
    ]
    assert written["parity"]["models"]["open_clip_model.safetensors"]["top1_agreement"] == 1
    adapted, merged = load_adapter(run / "adapter"), load_backbone(f"local-dir:{tmp_path / 'merged'}")
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prompts = [f"a photo of a {name}." for name in adapted.class_names]
        cosine = F.normalize(merged.encode_image(pixels), dim=-1) @ F.normalize(merged.text_features(prompts), dim=-1).T
        logits = adapted(pixels)
        torch.testing.assert_close(
            merged.logit_scale * cosine, logits, rtol=1e-5, atol=1e-5 * float(logits.abs().max())
        )
        plain = adapted.method.zero_shot()
        assert not torch.allclose(100 * F.normalize(adapted.backbone.encode_image(pixels), dim=-1) @ plain.T, logits)


def test_what_cannot_be_exported(refused, trained, tmp_path):
    run, out = trained("coop"), tmp_path / "out"
    assert "nothing to merge" in refused("export", run, "--merge", "--out", out)
    assert "Say what to write: --format onnx, torch" in refused("export", run, "--out", out)
    assert "--merge is --format open-clip" in refused("export", run, "--merge", "--format", "onnx", "--out", out)
    assert "8 bits are for ONNX" in refused("export", run, "--format", "torch", "--int8", "--out", out)
    assert "There is no folder" in refused("export", run, "--format", "torch", "--images", "none", "--out", out)
    assert "is not one of" in refused("export", run, "--format", "coreml", "--out", out)
    assert "not an adapter folder" in refused("export", tmp_path, "--merge", "--out", out)
    assert not out.exists()


def test_onnx_compared_on_labelled_images(call, refused, photos, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    run, out = tmp_path / "probe", tmp_path / "out"
    outcome = call("run", photos, "--method", "linear-probe", "--shots", 2, "--out", run)
    assert outcome.exit_code == 0, outcome.output
    words = ("export", run, "--format", "onnx", "--int8", "--images", photos, "--out", out)
    outcome = call(*words)
    assert outcome.exit_code == 0, outcome.output
    assert "compared on the images in photos (32 files)" in " ".join(outcome.output.split())
    report = json.loads((out / "parity.json").read_text())
    assert report["probes"]["labelled"] == 32
    full, small = report["models"]["model.onnx"], report["models"]["model.int8.onnx"]
    assert full["accuracy"] == report["adapter_accuracy"] > 0.5
    assert abs(small["accuracy"] - full["accuracy"]) < 0.2
    assert "labelled images" in (out / "README.md").read_text()
    assert "not empty" in refused(*words)


def test_sets_of_labels(call, refused, photos, tmp_path):
    """Coverage is checked against the calibration before any work, measured while exporting, and warned about."""
    classifier = FewShotClassifier("linear-probe", settings={"search": False}).fit(photos)
    assert "needs a classifier that was calibrated" in refused(
        "export", classifier.save(tmp_path / "plain"), "--format", "torch", "--coverage", 0.9, "--out", tmp_path / "out"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        classifier.calibrate(photos, None)
    words = ("export", classifier.save(tmp_path / "saved"), "--format", "torch", "--images", photos)
    words = (*words, "--out", tmp_path / "out")
    assert "--abstain-below is 3.0" in refused(*words, "--abstain-below", 3)
    assert "coverage is 1.0" in refused(*words, "--coverage", 1)
    assert not (tmp_path / "out").exists()
    outcome = call(*words, "--coverage", 0.9, "--abstain-below", 0.7)
    assert outcome.exit_code == 0, outcome.output
    assert "warning: With 32 held-out images the promise of 0.9 holds on average" in outcome.stderr
    report = json.loads((tmp_path / "out/parity.json").read_text())
    facts = report["models"]["model.pt2"]
    assert facts["same_sets"] == 1
    assert facts["coverage"] == report["adapter_coverage"] >= 0.9
    assert facts["set_size"] == report["adapter_set_size"] >= 1
    assert json.loads((tmp_path / "out/labels.json").read_text())["abstain_below"] == 0.7


def test_the_adapter_is_not_replaced_by_its_export(call, refused, photos, tmp_path):
    run = tmp_path / "run"
    outcome = call("run", photos, "--method", "zero-shot", "--shots", 4, "--out", run)
    assert outcome.exit_code == 0, outcome.output
    for out in (run, run / "adapter", tmp_path / "link"):
        if out.name == "link":
            out.symlink_to(run)
        assert "would be replaced" in refused("export", run, "--format", "torch", "--out", out, "--overwrite")
    words = ("--format", "torch", "--images", photos / "oak", "--out", photos, "--overwrite")
    assert "would be replaced" in refused("export", run, *words)
    words = ("--method", "zero-shot", "--shots", 4, "--out", photos, "--overwrite")
    assert "would be replaced" in refused("run", photos, *words)
    assert (run / "adapter/adapter_config.json").is_file()
    assert len(list(photos.rglob("*.png"))) == 32


def test_what_cannot_be_folded(refused, trained, tmp_path):
    run, out = trained("cocoop"), tmp_path / "out"
    assert "every image shifts its text prompts" in refused("export", run, "--format", "torch", "--out", out)
    assert not out.exists()


def test_a_folder_that_is_not_empty(refused, call, trained, tmp_path):
    run = trained("clip-lora")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    assert "not empty" in refused("export", run, "--merge", "--out", tmp_path / "out")
    outcome = call("export", run, "--merge", "--out", tmp_path / "out", "--overwrite")
    assert outcome.exit_code == 0, outcome.output
    assert not (tmp_path / "out" / "mine").exists()


def test_bad_settings(refused, photos):
    words = ("run", photos, "--shots", 2, "--method")
    assert "choose a rank of at most 128" in refused(*words, "clip-lora", "--set", "method.rank=500")
    assert "letters out of q, k, v and o" in refused(*words, "clip-lora", "--set", "method.targets=qz")
    assert "which lora doesn't take" in refused(*words, "peft", "--set", "method.settings.rank=5")
