"""An exported folder: the model, its labels and preprocessing, how near it is to the adapter, and how to run it."""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from adaptkit import __version__
from adaptkit.backbones.load import load_backbone
from adaptkit.errors import ConfigError
from adaptkit.evaluation.calibration import Calibration, check_probability
from adaptkit.export import formats, standalone
from adaptkit.export.fold import fold
from adaptkit.export.merge import check_mergeable, write_merged
from adaptkit.export.parity import Promise, check_near, measure
from adaptkit.export.probes import drawn_probes, own_probes
from adaptkit.methods.adapter import AdaptedModel
from adaptkit.methods.base import Method, render_prompts
from adaptkit.methods.lora._towers import TowerMethod
from adaptkit.storage import new_folder, write_json
from adaptkit.types import ProgressCallback

Format = Literal["onnx", "torch", "open-clip"]
FORMATS: tuple[Format, ...] = get_args(Format)
SCHEMA_VERSION = 1
PARITY_FILE = "parity.json"
COVERAGE = 0.9
"""Of the sets of a calibrated adapter, where nothing else is said."""

_MODEL_FILES = {
    "onnx": formats.ONNX_FILE,
    "torch": formats.TORCH_FILE,
    "open-clip": "open_clip_model.safetensors",
}


def check_exportable(method: type[Method], format: str, *, int8: bool = False) -> None:
    """Refuse what can't be written, as far as it shows before the backbone is loaded.

    Raises:
        ConfigError: An unknown format, or 8 bits of another than ONNX.
        UnsupportedError: A package is missing, or the method has nothing that the format holds.
    """
    if format not in FORMATS:
        raise ConfigError(f"The format {format!r} is unknown: choose {', '.join(FORMATS)}.")
    if int8 and format != "onnx":
        raise ConfigError(f"8 bits are for ONNX: leave out --int8, or write --format onnx instead of {format}.")
    if format == "onnx":
        formats.check_onnx()
    if format == "open-clip":
        check_mergeable(method)


def export_adapter(
    model: AdaptedModel,
    folder: str | Path,
    format: Format,
    *,
    labels: Sequence[Any] | None = None,
    calibration: Calibration | None = None,
    coverage: float | None = None,
    abstain_below: float | None = None,
    images: str | Path | None = None,
    int8: bool = False,
    overwrite: bool = False,
    progress: ProgressCallback = lambda what, done, total: None,
) -> dict[str, Any]:
    """Write an adapter as a folder that runs without adaptkit, for its current classes.

    Args:
        model: The adapter.
        folder: Where to; must not exist or be empty, unless `overwrite`. It appears whole or not at all.
        format: "onnx", "torch" (torch.export) or "open-clip" (a checkpoint, for methods that learn inside the towers).
        labels: What to call the classes, in their order; None for their names.
        calibration: What held-out images taught (see `FewShotClassifier.calibrate`). It is written down beside the
            labels, for probabilities and sets of labels; the model gives plain logits.
        coverage: How often the true class shall be in an image's set, between 0 and 1; None for 0.9.
        abstain_below: Of the probability: the README's Python gives no answer where the likeliest class has less.
        images: A folder of images to compare on; those in folders called like a class are labelled. None draws some.
        int8: Write ONNX in 8 bits as well, and measure what that changes.
        overwrite: Replace an existing folder.
        progress: Told how far it is.

    Returns:
        The parity report, as it stands in `parity.json`.

    Raises:
        ConfigError: An unknown format, settings that don't go together, or a coverage without a calibration.
        UnsupportedError: The method or its backbone has no such form, or what was written answers otherwise.
        DataError: The images can't be used.
        StorageError: The folder can't be written, or isn't empty.
    """
    check_exportable(type(model.method), format, int8=int8)
    promise = promise_of(calibration, coverage)
    if abstain_below is not None:
        check_probability("abstain_below", abstain_below)
    names = list(model.class_names) if labels is None else list(labels)
    with tempfile.TemporaryDirectory() as drawn:
        probes = drawn_probes(Path(drawn)) if images is None else own_probes(Path(images), names, model.class_names)
        with new_folder(folder, overwrite=overwrite) as building:
            answers = _write(model, building, format, int8, progress)
            report = {
                "schema_version": SCHEMA_VERSION,
                "adaptkit_version": __version__,
                "format": format,
                "method": model.method.name,
                "backbone": {"name": model.backbone.spec.name, "digest": model.backbone.spec.digest},
                **measure(model, probes, answers, progress, promise),
            }
            check_near(report["models"][_MODEL_FILES[format]], building / _MODEL_FILES[format])
            for name, facts in report["models"].items():
                facts["bytes"] = (building / name).stat().st_size
            _write_facts(model, building, names, promise, abstain_below, report)
            (building / "README.md").write_text(_readme(model, format, names, report), encoding="utf-8")
    return report


def promise_of(calibration: Calibration | None, coverage: float | None) -> Promise | None:
    """What is promised about sets of labels; None without a calibration.

    Raises:
        ConfigError: A coverage that is no probability, or that nothing stands behind.
    """
    if coverage is not None:
        check_probability("coverage", coverage)
    if calibration is None:
        if coverage is not None:
            raise ConfigError(
                "A coverage needs a classifier that was calibrated: call FewShotClassifier.calibrate with held-out"
                " images and save it again, or leave the coverage out."
            )
        return None
    return Promise(calibration, COVERAGE if coverage is None else coverage)


def _write(
    model: AdaptedModel, folder: Path, format: Format, int8: bool, progress: ProgressCallback
) -> dict[str, formats.Answer]:
    """Write the model's files; returns what answers with each."""
    steps = 2 + int8
    if format == "open-clip":
        progress("writing the checkpoint", 0, 1)
        write_merged(cast(TowerMethod, model.method), folder)
        return {_MODEL_FILES[format]: _checkpoint_answer(model.method, folder)}
    progress("writing the model: following its computation", 0, steps)
    program = formats.export_program(fold(model), model.backbone.spec.preprocessing.image_size)
    progress("writing the model: the file", 1, steps)
    if format == "torch":
        return {formats.TORCH_FILE: formats.write_torch(program, folder)}
    answers = {formats.ONNX_FILE: formats.write_onnx(program, folder)}
    if int8:
        progress("writing the model: in 8 bits", 2, steps)
        answers[formats.INT8_FILE] = formats.write_int8(folder)
    return answers


def _checkpoint_answer(method: Method, folder: Path) -> formats.Answer:
    """What answers by the checkpoint alone: its towers, the adapter's templates and names."""
    loaded = load_backbone(f"local-dir:{folder}")
    prompts = [text for template in method.templates for text in render_prompts(method.class_names, template)]
    with torch.no_grad():
        texts = F.normalize(loaded.text_features(prompts), dim=-1).unflatten(0, (len(method.templates), -1))
        weights = F.normalize(texts.mean(dim=0), dim=-1)  # [classes, dim]

    def answer(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            cosine = F.normalize(loaded.encode_image(torch.from_numpy(pixels)), dim=-1) @ weights.T
            logits: NDArray[np.float32] = (loaded.logit_scale * cosine + loaded.logit_bias).numpy()
        return logits

    return answer


def _write_facts(
    model: AdaptedModel,
    folder: Path,
    labels: Sequence[Any],
    promise: Promise | None,
    abstain_below: float | None,
    report: Mapping[str, Any],
) -> None:
    facts = {
        "labels": list(labels),
        "class_names": list(model.class_names),
        "templates": list(model.method.templates),
        "temperature": 1.0 if promise is None else promise.calibration.temperature,
        "scores": None if promise is None else list(promise.calibration.scores),
        "coverage": None if promise is None else promise.coverage,
        "abstain_below": abstain_below,
    }
    write_json(folder / "labels.json", facts)
    write_json(folder / "preprocessing.json", model.backbone.spec.preprocessing.to_dict())
    write_json(folder / PARITY_FILE, dict(report))


# --- README -----------------------------------------------------------------------------------------------------------

_RUN = {
    "onnx": """session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
logits = session.run(["logits"], {"pixels": pixels})[0]  # [images, classes]""",
    "torch": """program = torch.export.load(f"{folder}/model.pt2").module()
logits = program(torch.from_numpy(pixels)).detach().numpy()  # [images, classes]""",
}
_IMPORTS = {"onnx": "import onnxruntime\n", "torch": "import torch\n", "open-clip": "import open_clip\nimport torch\n"}
_FACTS = """
folder, paths = ".", ["image.jpg"]  # this folder, and your images
facts = json.load(open(f"{folder}/labels.json", encoding="utf-8"))
"""
_PIXELS = """settings = json.load(open(f"{folder}/preprocessing.json", encoding="utf-8"))
pixels = np.stack([to_input(read_rgb(path), settings) for path in paths])  # float32 [images, 3, size, size]
"""
_OPEN_CLIP = """model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
names = [name.replace("_", " ") for name in facts["class_names"]]
with torch.no_grad():
    texts = sum(
        model.eval().encode_text(tokenizer([template.format(name) for name in names]), normalize=True)
        for template in facts["templates"]
    )
    texts = torch.nn.functional.normalize(texts, dim=-1)
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    logits = (model.logit_scale.exp() * model.encode_image(images, normalize=True) @ texts.T).numpy()
"""
_TAIL = """
odds = probabilities(logits, facts["temperature"])
for path, row in zip(paths, odds):
    sure = row.max() >= (facts["abstain_below"] or 0)
    print(path, facts["labels"][row.argmax()] if sure else None, f"{row.max():.3f}")
if facts["scores"]:  # of a calibrated classifier: the true label is among these as often as facts["coverage"] says
    for path, row in zip(paths, in_set(odds, facts["scores"], facts["coverage"])):
        print(path, [label for label, inside in zip(facts["labels"], row) if inside])
"""
_NEEDS = {
    "onnx": "It needs onnxruntime, NumPy and Pillow; neither torch nor adaptkit.",
    "torch": "It needs torch, NumPy and Pillow, and not adaptkit.",
    "open-clip": "It needs open_clip_torch, and not adaptkit. `--backbone local-dir:FOLDER` takes it here.",
}
_TRUST = """
**Whom to trust.** `torch.export.load` reads pickled parts, and PyTorch's documentation says never to load such a file
from a source you don't trust: it can run code. Load this file only if you made it, or know who did. It was written by
torch {version}; PyTorch doesn't promise that other versions read it. The ONNX format has neither limit.
"""


def snippet(format: Format) -> str:
    """The Python that an exported folder's README shows."""
    reading = () if format == "open-clip" else (standalone.read_rgb, standalone.to_input)
    parts = "\n\n".join(map(_shown, (*reading, standalone.probabilities, standalone.in_set)))
    pillow = "from PIL import Image" + (", ImageOps" if reading else "")
    head = f"import json\n\nimport numpy as np\n{_IMPORTS[format]}{pillow}\n\n\n"
    return head + parts + "\n" + _FACTS + (_PIXELS + _RUN[format] if reading else _OPEN_CLIP.rstrip()) + _TAIL


def _shown(function: Callable[..., Any]) -> str:
    """A function's text without its types."""
    first, rest = inspect.getsource(function).split("\n", 1)
    return re.sub(r": (dict\[.*?\]|[\w.]+)(?=[,)])| -> [\w.]+(?=:)", "", first) + "\n" + rest


def _readme(model: AdaptedModel, format: Format, labels: Sequence[Any], report: Mapping[str, Any]) -> str:
    shown = ", ".join(str(label) for label in labels[:20]) + (", …" if len(labels) > 20 else "")
    lines = [
        f"# {model.method.name} on {model.backbone.spec.name}, as {format}",
        "",
        f"Written by adaptkit {__version__}. {len(labels)} classes: {shown}",
        "",
        _NEEDS[format],
        "",
        "```python",
        snippet(format).rstrip(),
        "```",
        *([_TRUST.format(version=torch.__version__)] if format == "torch" else [""]),
        *_promise_lines(report),
        "## How near it is to the adapter",
        "",
        *_parity_lines(report),
        *(["", f"`{formats.INT8_FILE}` is run in the same way."] if formats.INT8_FILE in report["models"] else []),
        "",
        f"All of it is in `{PARITY_FILE}`. `labels.json` has the classes in the order of the logits,"
        " `preprocessing.json` what is done to an image first.",
        "",
    ]
    return "\n".join(lines)


def _parity_lines(report: Mapping[str, Any]) -> list[str]:
    """The report as a table; counts of images say how much it is worth."""
    probes, sets = report["probes"], report.get("sets")
    columns = ["File", "MB", "Largest difference of a logit", "Same first class", *(["Same set"] if sets else [])]
    columns += (["Accuracy"] + ["True class in the set", "Classes in a set"] * bool(sets)) * bool(probes["labelled"])
    rows = [
        f"Measured while exporting, on {probes['what']} ({probes['images']} files), preprocessing included; the largest"
        f" difference of an input's value is {report['inputs_max_difference']:.1e}.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for name, facts in report["models"].items():
        cells = [f"`{name}`", f"{facts['bytes'] / 1e6:.1f}"]
        cells.append(f"{facts['max_difference']:.1e} of {facts['largest_logit']:.1f}")
        shares = [facts[key] for key in ("top1_agreement", "same_sets", "accuracy", "coverage") if key in facts]
        cells += [f"{100 * share:.1f} %" for share in shares]
        cells += [f"{facts['set_size']:.1f}"] if "set_size" in facts else []
        rows.append(f"| {' | '.join(cells)} |")
    if probes["labelled"]:
        adapter = 100 * report["adapter_accuracy"]
        rows += ["", f"The adapter itself is right on {adapter:.1f} % of the {probes['labelled']} labelled images."]
    return rows


def _promise_lines(report: Mapping[str, Any]) -> list[str]:
    """What the sets of labels are worth."""
    if (sets := report.get("sets")) is None:
        return []
    lines = [
        "## Sets of labels",
        "",
        f"Calibrated on {sets['held_out']} held-out images. The true class is in an image's set in"
        f" {100 * sets['coverage']:g} % of cases on average, for images like those; any coverage can be written into"
        " `labels.json`. The promise is the adapter's, in full precision.",
        "",
    ]
    return [*lines, f"**Warning:** {sets['warning']}", ""] if sets["warning"] else lines
