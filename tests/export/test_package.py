"""Exported folders: their README's Python gives the adapter's classes in a process without torch and adaptkit."""

from __future__ import annotations

import json
import re
import warnings

import numpy as np
import pytest
import torch

from adaptkit.backbones.load import load_backbone
from adaptkit.errors import ConfigError, StorageError, UnsupportedError
from adaptkit.estimator import FewShotClassifier
from adaptkit.evaluation.calibration import Calibration, CalibrationWarning
from adaptkit.export import formats, package, standalone
from adaptkit.export.fold import Folded, fold
from adaptkit.export.package import export_adapter, snippet
from adaptkit.export.probes import drawn_probes
from adaptkit.methods import methods
from adaptkit.methods.adapter import AdaptedModel
from tests.contract.test_methods import fitted
from tests.export.test_fold import KINDS
from tests.methods.tiny import tiny_clip

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def classifier():
    """Tip-Adapter on mini, whose labels aren't what the text tower reads."""
    from adaptkit.data.synthetic import load_embedded

    data = load_embedded("shapes")
    chosen = [np.flatnonzero(data.labels["train"] == label)[:4] for label in (0, 7, 20)]
    rows, labels = np.concatenate(chosen), np.repeat([10, 20, 30], 4)
    names = {label: data.class_names[place] for label, place in ((10, 0), (20, 7), (30, 20))}
    made = FewShotClassifier("tip-adapter", class_names=names, training={"views": 0})
    made.fit(data.images["train"][rows], labels)
    made.calibration_ = Calibration(4.0, tuple(np.linspace(0.02, 0.98, 60).tolist()))  # sets of one, two and three
    return made


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    return drawn_probes(tmp_path_factory.mktemp("probes"))


@pytest.fixture(scope="module")
def exported(classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "exported"
    report = export_adapter(
        classifier.model_,
        folder,
        "onnx",
        labels=classifier.classes_.tolist(),
        calibration=classifier.calibration_,
        coverage=0.9,
        abstain_below=0.6,
        int8=True,
    )
    return folder, report


def readme_python(folder):
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 1
    return blocks[0]


def asked_about(code, paths):
    assert '["image.jpg"]' in code
    return code.replace('["image.jpg"]', repr([str(path) for path in paths]))


def answers(printed):
    return [line.rsplit(" ", 2)[1:] for line in printed.splitlines()]


def test_the_folder(exported):
    folder, report = exported
    files = ["README.md", "labels.json", "model.int8.onnx", "model.onnx", "parity.json", "preprocessing.json"]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert json.loads((folder / "parity.json").read_text()) == report
    assert json.loads((folder / "labels.json").read_text())["labels"] == [10, 20, 30]
    assert report["probes"]["images"] == 32
    assert report["inputs_max_difference"] < 1e-6
    full, small = report["models"]["model.onnx"], report["models"]["model.int8.onnx"]
    assert full["max_difference"] < 1e-5 * full["largest_logit"]
    assert full["top1_agreement"] == 1
    assert small["bytes"] < 0.5 * full["bytes"]
    assert full["max_difference"] < small["max_difference"] < 0.2 * small["largest_logit"]
    assert small["top1_agreement"] > 0.8
    assert full["same_sets"] == 1
    assert report["sets"]["held_out"] == 60
    assert "With 60 held-out images the promise of 0.9" in report["sets"]["warning"]
    assert small["same_sets"] > 0.5


def test_the_readme_runs_without_torch_and_adaptkit(exported, classifier, probes, run_alone):
    folder, _ = exported
    refused = ("torch", "torchvision", "adaptkit", "open_clip", "transformers", "onnx", "sklearn", "scipy")
    printed = run_alone(asked_about(readme_python(folder), probes.files), folder, refused).splitlines()
    assert len(printed) == 2 * len(probes.files) == 64
    paths = [str(path) for path in probes.files]
    wanted, odds = classifier.predict(paths, abstain_below=0.6), classifier.predict_proba(paths)
    given = answers("\n".join(printed[:32]))
    assert [label for label, _ in given] == [str(label) for label in wanted]
    assert 0 < sum(label == "None" for label, _ in given) < 32
    np.testing.assert_allclose([float(odd) for _, odd in given], odds.max(axis=1), atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        sets = classifier.predict_sets(paths, coverage=0.9)
    assert [json.loads(line[line.index(" [") :]) for line in printed[32:]] == [sorted(one) for one in sets]
    assert {len(one) for one in sets} == {1, 2, 3}


def test_the_refusal_works(run_alone, tmp_path):
    code = "try:\n import torch\nexcept ModuleNotFoundError as error:\n print(error)"
    assert run_alone(code, tmp_path, ("torch",)).strip() == "refused: torch"


def test_onnx_of_any_batch_size_with_nothing_of_this_machine(exported, classifier):
    import onnx

    folder, _ = exported
    proto = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert str(folder.anchor + "tmp").encode() not in proto.SerializeToString()
    assert b"adaptkit/" not in proto.SerializeToString()
    answer, folded = formats.onnx_answer(folder / "model.onnx"), fold(classifier.model_)
    for batch in (1, 2, 5):
        pixels = np.random.default_rng(batch).normal(size=(batch, 3, 32, 32)).astype(np.float32)
        np.testing.assert_allclose(answer(pixels), folded(torch.from_numpy(pixels)).numpy(), rtol=1e-4, atol=1e-3)


def test_torch_export(classifier, probes, tmp_path, run_alone):
    report = export_adapter(classifier.model_, tmp_path / "out", "torch", labels=classifier.classes_.tolist())
    assert report["models"]["model.pt2"]["top1_agreement"] == 1
    assert "never to load such a file" in (tmp_path / "out" / "README.md").read_text()
    code = asked_about(readme_python(tmp_path / "out"), probes.files[:1])
    given = answers(run_alone(code, tmp_path / "out", ("adaptkit", "open_clip", "transformers")))
    assert int(given[0][0]) == classifier.predict([str(probes.files[0])])[0]


def test_open_clip(tmp_path, probes, run_alone):
    pytest.importorskip("peft")
    from adaptkit.methods.lora.clip_lora import ClipLora
    from tests.methods.test_clip_lora import shaken

    model = AdaptedModel(shaken(ClipLora(load_backbone("mini"), ("red circle", "blue_square"))))
    report = export_adapter(model, tmp_path / "out", "open-clip")
    facts = report["models"]["open_clip_model.safetensors"]
    assert facts["max_difference"] < 1e-5 * max(1.0, facts["largest_logit"])
    code = asked_about(readme_python(tmp_path / "out"), probes.files[:2])
    printed = run_alone(code, tmp_path / "out", ("adaptkit",))
    logits = classes_of(model, probes.files[:2])
    assert [" ".join(line.split()[1:-1]) for line in printed.splitlines()] == logits


def classes_of(model, paths):
    from adaptkit.data.images import load_rgb
    from adaptkit.data.transforms import to_pixels

    pixels = torch.stack([to_pixels(load_rgb(path), model.backbone.spec.preprocessing) for path in paths])
    with torch.no_grad():
        return [model.class_names[place] for place in model(pixels).argmax(dim=1).tolist()]


# --- sets of labels ---------------------------------------------------------------------------------------------------


def test_sets_without_adaptkit_are_adaptkit_s():
    numbers, compared = np.random.default_rng(0), 0
    for held_out in (1, 3, 9, 19, 100):
        scores = tuple(np.sort(numbers.uniform(size=held_out)).tolist())
        logits = numbers.normal(size=(200, 7)) * 3
        calibration = Calibration(1.7, scores)
        odds = standalone.probabilities(logits.astype(np.float32), 1.7)
        np.testing.assert_allclose(odds, calibration.probabilities(logits), rtol=1e-5)
        for coverage in (0.05, 0.5, 0.8, 0.9, 0.95, 0.999):
            wanted = calibration.sets(odds, coverage)
            assert (standalone.in_set(odds, list(scores), coverage) == wanted).all()
            assert wanted.any(axis=1).all()
            compared += 1
    assert compared == 30


def test_what_is_written_about_sets(classifier, tmp_path):
    few = Calibration(2.0, (0.1, 0.2, 0.4))
    report = export_adapter(classifier.model_, tmp_path / "out", "torch", calibration=few)
    assert report["sets"] == {
        "held_out": 3,
        "coverage": 0.9,
        "warning": "3 held-out images can't promise a coverage of 0.9, so every set holds all classes: hold out at"
        " least 9.",
    }
    assert "**Warning:** 3 held-out images can't promise" in (tmp_path / "out/README.md").read_text()
    facts = json.loads((tmp_path / "out/labels.json").read_text())
    assert (facts["temperature"], facts["scores"], facts["coverage"]) == (2.0, [0.1, 0.2, 0.4], 0.9)
    assert facts["abstain_below"] is None
    for wrong in ({"coverage": 0.9}, {"coverage": 2, "calibration": few}, {"abstain_below": 0}):
        with pytest.raises(ConfigError):
            export_adapter(classifier.model_, tmp_path / "none", "torch", **wrong)
    assert not (tmp_path / "none").exists()


# --- what isn't written -----------------------------------------------------------------------------------------------


def test_refusals(tmp_path):
    backbone = tiny_clip(layers=1)
    plain, out = AdaptedModel(methods.get("zero-shot")(backbone, ("cat", "dog"))), tmp_path / "out"
    with pytest.raises(ConfigError, match="choose onnx, torch, open-clip"):
        export_adapter(plain, out, "coreml")
    with pytest.raises(ConfigError, match="8 bits are for ONNX"):
        export_adapter(plain, out, "torch", int8=True)
    with pytest.raises(UnsupportedError, match="nothing to merge into a checkpoint"):
        export_adapter(plain, out, "open-clip")
    with pytest.raises(UnsupportedError, match="cocoop can't be folded"):
        export_adapter(AdaptedModel(methods.get("cocoop")(backbone, ("cat", "dog"))), out, "onnx")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        export_adapter(plain, out, "onnx", images=tmp_path / "none")
    assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("keep")
    with pytest.raises(StorageError):
        export_adapter(plain, out, "onnx")
    assert (out / "mine").read_text() == "keep"


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(UnsupportedError, match=r"needs onnxruntime: pip install 'adaptkit\[onnx\]'"):
        formats.check_onnx()


def test_a_model_that_answers_otherwise_is_not_left_behind(tmp_path, monkeypatch):
    model = AdaptedModel(methods.get("zero-shot")(tiny_clip(layers=1), ("cat", "dog")))
    monkeypatch.setattr(package.formats, "export_program", lambda folded, side: None)
    monkeypatch.setattr(
        package.formats, "write_torch", lambda program, folder: lambda pixels: np.zeros((len(pixels), 2), np.float32)
    )
    with pytest.raises(UnsupportedError, match="answers otherwise"):
        export_adapter(model, tmp_path / "out", "torch")
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_torch_cannot_follow():
    class Fickle(torch.nn.Module):
        def forward(self, pixels):
            return pixels.mean(dim=(2, 3)) if bool(pixels.sum() > 0) else pixels.amax(dim=(2, 3))

    folded = Folded(methods.get("zero-shot")(tiny_clip(layers=1), ("a", "b")).fold(), Fickle(), ("a", "b"))
    with pytest.raises(UnsupportedError, match="can't follow this image encoder"):
        formats.export_program(folded, 16)


def test_snippets_hold_no_leftovers():
    for format in package.FORMATS:
        code = snippet(format)
        compile(code, "README.md", "exec")
        assert "Any" not in code
        assert "->" not in code
        assert "adaptkit" not in code


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set.union(*KINDS.values())))
def test_every_folded_method_becomes_onnx(name, tmp_path):
    pytest.importorskip("peft")
    backbone = tiny_clip(layers=12)
    method, _ = fitted(backbone, name)
    report = export_adapter(AdaptedModel(method), tmp_path / "out", "onnx")
    assert report["models"]["model.onnx"]["top1_agreement"] == 1
