"""A model card made from facts: what was recorded, and where nothing was, that it isn't known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from adaptkit.data.catalogue import CATALOGUE
from adaptkit.errors import DataError
from adaptkit.evaluation.calibration import saved_calibration
from adaptkit.evaluation.results import RunResult, read_run
from adaptkit.methods.adapter import AdapterConfig

_MOST_NAMES = 50
_LEVEL = 0.95


def model_card(folder: str | Path, config: AdapterConfig, licence: str | None = None) -> str:
    """The card of an adapter as Markdown with the Hub's header.

    Args:
        folder: The adapter's; that of a run lies in the run's folder, whose `result.json` is then read.
        config: What its `adapter_config.json` says.
        licence: Of the adapter, as the Hub calls it; None where none is stated.
    """
    result = _result_of(Path(folder), config)
    header: dict[str, Any] = {"library_name": "adaptkit", "pipeline_tag": "zero-shot-image-classification"}
    header |= {"tags": ["adaptkit", config.method, "few-shot"]} | ({"license": licence} if licence else {})
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {config.method} on {config.backbone['name']}",
        "A few-shot adapter made with adaptkit: what was learned, without the weights of the backbone.",
        "```python\nimport adaptkit\n\n"
        'classifier = adaptkit.load("hf-hub:USER/NAME@COMMIT")\nclassifier.predict(["image.png"])\n```',
        _section("Adapter", _about(config)),
        *([] if result is None else [_figures(result), _section("Training", _training(result))]),
        _section("Settings", {key: json.dumps(value) for key, value in config.config.items()} or {"none": "-"}),
        _section("Data", _data(config, result)),
        _section("Licences", _licences(config, result, licence)),
        _limits(config, measured=result is not None),
    ]
    return "\n\n".join(parts) + "\n"


def _result_of(folder: Path, config: AdapterConfig) -> RunResult | None:
    """The result of the run that wrote the adapter, or None."""
    try:
        result = read_run(folder.resolve().parent)
    except DataError:
        return None
    same = result.key.method == config.method and result.key.backbone_digest == config.backbone["digest"]
    return result if same and result.few_shot_digest == config.facts.get("few-shot digest") else None


def _section(title: str, facts: dict[str, Any]) -> str:
    return "\n".join([f"## {title}", "", *(f"- {key}: {value}" for key, value in facts.items())])


def _about(config: AdapterConfig) -> dict[str, Any]:
    names = config.class_names
    shown = ", ".join(names[:_MOST_NAMES]) + (", …" if len(names) > _MOST_NAMES else "")
    facts = {
        "method": config.method,
        "backbone": f"{config.backbone['name']}, digest `{config.backbone['digest']}` (another one is refused)",
        f"classes ({len(names)})": shown,
        "templates": "; ".join(config.templates),
        "adaptkit": f"{config.adaptkit_version}, schema {config.schema_version}",
    }
    calibration = saved_calibration(config, "the adapter")
    if calibration is not None:
        facts["calibrated on"] = f"{len(calibration.scores)} held-out images"
    return facts


def _figures(result: RunResult) -> str:
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    columns = ["tested on", "classes", "right", "images", "accuracy", "95 % interval"]
    lines = ["## Results", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for part in result.parts:
        low, high = binomtest(part.correct, part.total).proportion_ci(_LEVEL, method="wilson")
        star = " (zero-shot)" if part.fallback else ""
        lines.append(
            f"| {part.name}{star} | {part.num_classes} | {part.correct} | {part.total} | {100 * part.accuracy:.1f} % |"
            f" {100 * low:.1f}–{100 * high:.1f} % |"
        )
    if result.harmonic_mean is not None:
        lines += ["", f"Harmonic mean of base and novel: {100 * result.harmonic_mean:.1f} %."]
    if result.target_average is not None:
        lines += ["", f"Mean of the targets: {100 * result.target_average:.1f} %."]
    return "\n".join(
        [*lines, "", "Intervals are Wilson's, over test images; one run with one seed says nothing of other shots."]
    )


def _training(result: RunResult) -> dict[str, Any]:
    key, machine = result.key, result.environment
    return {
        "protocol": ", ".join([key.protocol, *key.marks]),
        "shots": f"{key.shots} per class, drawn as {key.sampler} does, seed {key.seed}",
        "trained numbers": f"{result.trained_parameters:,}",
        "settings chosen on": result.tuned_on,
        "seconds": ", ".join(f"{name} {value:.1f}" for name, value in result.seconds.items()),
        "peak memory": f"{result.peak_memory_bytes / 2**20:,.0f} MiB",
        "hardware": f"{machine.get('device', 'not known')}, {machine.get('precision', 'not known')}",
        "versions": ", ".join(f"{name} {value}" for name, value in machine.get("versions", {}).items()) or "not known",
    }


def _data(config: AdapterConfig, result: RunResult | None) -> dict[str, Any]:
    facts = {key: value for key, value in config.facts.items() if isinstance(value, (str, int, float))}
    if result is None:
        return facts or {"data": "nothing was recorded"}
    return {
        "dataset": Path(result.key.dataset).name,
        "test images": sum(part.total for part in result.parts),
        "split digest": f"`{result.key.split_digest}`",
        "few-shot digest": f"`{result.few_shot_digest}`",
    }


def _licences(config: AdapterConfig, result: RunResult | None, licence: str | None) -> dict[str, Any]:
    name = str(config.facts.get("dataset", "")) if result is None else result.key.dataset
    known = CATALOGUE.get(name)
    return {
        "adapter": licence or "not stated",
        "backbone": f"that of {config.backbone['name']}, which isn't part of this repository",
        "data": getattr(known, "licence", "") or "not known",
    }


def _limits(config: AdapterConfig, *, measured: bool) -> str:
    lines = [
        "## Limits",
        "",
        "- It chooses among its classes whatever the image shows.",
        "- Images unlike those it was made from may be answered worse than the figures say.",
    ]
    if not measured:
        lines.append("- No test figures were recorded.")
    if config.backbone["name"] == "mini":
        lines.append("- `mini` is a test bed trained on drawn pictures; it isn't meant for photographs.")
    return "\n".join(lines)
