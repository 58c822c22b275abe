"""`adaptkit export`: an adapter as a model that runs without adaptkit."""

from __future__ import annotations

from pathlib import Path

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options, _runs
from adaptkit.errors import ConfigError

_FORMATS = ("onnx", "torch", "open-clip")


@click.command("export", short_help="an adapter as a model that runs without adaptkit")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--format", "format_", type=click.Choice(_FORMATS), help="What to write; see above.")
@click.option("--merge", is_flag=True, help="The same as --format open-clip.")
@click.option("--int8", is_flag=True, help="Write ONNX in 8 bits as well, and measure what that changes.")
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Folder of images to compare on (class folders give accuracies); drawn ones otherwise.",
)
@click.option(
    "--coverage",
    type=float,
    help="How often the true class is in an image's set of labels, of calibrated classifiers [default: 0.9].",
)
@click.option("--abstain-below", type=float, help="The README's Python gives no answer where the probability is lower.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--backbone", help="Where the adapter's backbone lies now; it must be the same one.")
@click.option("--overwrite", is_flag=True, help="Replace what is in --out.")
@_options.device_option
@_options.json_option
def command(
    adapter: Path,
    format_: str | None,
    merge: bool,
    int8: bool,
    images: Path | None,
    coverage: float | None,
    abstain_below: float | None,
    out: Path,
    backbone: str | None,
    overwrite: bool,
    device: str,
    as_json: bool,
) -> None:
    """Write an adapter (an adapter folder or the folder of a run) for use without adaptkit.

    \b
    onnx       one model from pixels to logits, for ONNX Runtime; most methods
    torch      the same for torch.export.load (a file to trust or leave alone)
    open-clip  a checkpoint with what was learned merged in: clip-lora and peft

    The folder has the model, its labels and preprocessing, a report of how near it is to the adapter, and a README
    whose Python runs it.

    \b
    Example:
      adaptkit export runs/first/best --format onnx --out exported
    """
    from adaptkit.evaluation.calibration import check_probability, saved_calibration
    from adaptkit.export.package import check_exportable, export_adapter, promise_of
    from adaptkit.methods import methods
    from adaptkit.methods.adapter import load_adapter, read_adapter_config, saved_labels

    if merge and format_ not in (None, "open-clip"):
        raise ConfigError(f"--merge is --format open-clip: leave it out, or leave out --format {format_}.")
    format_ = "open-clip" if merge else format_
    folder = _runs.adapter_folder(adapter)
    config = read_adapter_config(folder)
    method = methods.get(config.method)
    if format_ is None:
        raise ConfigError("Say what to write: --format onnx, torch or open-clip (for clip-lora and peft).")
    check_exportable(method, format_, int8=int8)  # before the backbone is loaded
    calibration = saved_calibration(config, folder)
    promise_of(calibration, coverage)
    if abstain_below is not None:
        check_probability("--abstain-below", abstain_below)
    (_runs.check_writable if overwrite else _runs.check_out)(out)
    _runs.check_apart(out, folder, images)

    from adaptkit.backbones.load import load_backbone

    labels = saved_labels(config, folder)
    given = None if backbone is None else load_backbone(backbone, device=device)
    model = load_adapter(folder, given, device=device)
    with console.progress_bars(not as_json) as progress:
        report = export_adapter(
            model,
            out,
            format_,  # type: ignore[arg-type]  # click lets only the known ones through
            labels=labels,
            calibration=calibration,
            coverage=coverage,
            abstain_below=abstain_below,
            images=images,
            int8=int8,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        files = sorted(path.name for path in out.iterdir())
        facts = {"folder": str(out), "adapter": str(folder), "method": method.name, "files": files}
        console.print_json({**facts, "parity": report})
        return
    _show(report)
    if warning := report.get("sets", {}).get("warning"):
        console.say(f"warning: {warning}")
    console.say(f"Written to {out}; its README.md has the Python that runs it.")


def _show(report: dict) -> None:  # type: ignore[type-arg]
    labelled = bool(report["probes"]["labelled"])
    sets = ["same set"] * ("sets" in report)
    columns = ["file", "MB", "difference", "of", "same class", *sets]
    columns += ["accuracy", *(["coverage"] if sets else [])] if labelled else []
    rows = []
    for name, facts in report["models"].items():
        row = [name, f"{facts['bytes'] / 1e6:.1f}", f"{facts['max_difference']:.1e}", f"{facts['largest_logit']:.1f}"]
        shares = [facts[key] for key in ("top1_agreement", "same_sets", "accuracy", "coverage") if key in facts]
        rows.append(row + [f"{console.percent(share)} %" for share in shares])
    note = f"largest difference of a logit, compared on {report['probes']['what']} ({report['probes']['images']} files)"
    if labelled:
        note += f"; the adapter: {console.percent(report['adapter_accuracy'])} %"
    console.print_table("", columns, rows, left=["file"], note=note, wide=True)
