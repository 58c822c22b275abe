"""`adaptkit predict`: class names and probabilities for images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options, _runs
from adaptkit.errors import ConfigError, DataError


@click.command("predict", short_help="class names and probabilities for images")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top", type=click.IntRange(min=1), default=3, show_default=True, help="Classes shown per image.")
@click.option("--abstain-below", type=float, help="Give no answer where the likeliest class is less probable.")
@click.option(
    "--coverage",
    type=float,
    help="Show the classes among which the true one is, this often (for classifiers that were calibrated).",
)
@click.option("--backbone", help="Where the adapter's backbone lies now; it must be the same one.")
@click.option("--skip-unreadable", is_flag=True, help="Leave out images that can't be read, and list them.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Images encoded at once.")
@_options.device_option
@_options.json_option
def command(
    adapter: Path,
    images: tuple[Path, ...],
    top: int,
    abstain_below: float | None,
    coverage: float | None,
    backbone: str | None,
    skip_unreadable: bool,
    batch_size: int,
    device: str,
    as_json: bool,
) -> None:
    """Answer images with class names, using an adapter folder (or the folder of a run).

    IMAGES are files or folders of images.

    \b
    Example:
      adaptkit predict runs/first/best tests/images/three.png
    """
    from adaptkit.backbones.load import load_backbone
    from adaptkit.estimator import load
    from adaptkit.evaluation.calibration import check_probability

    for name, value in (("--abstain-below", abstain_below), ("--coverage", coverage)):
        if value is not None:
            check_probability(name, value)
    folder = _runs.adapter_folder(adapter)
    files = find_images(images)
    if coverage is not None:
        _check_calibrated(folder, coverage)
    given = None if backbone is None else load_backbone(backbone, device=device)
    classifier = load(folder, given, device=device, batch_size=batch_size)
    kept, skipped = readable(files) if skip_unreadable else (files, [])
    if not kept:
        raise DataError(f"None of the {len(files)} images can be read, the first being {files[0]}.")
    labels = [str(label) for label in classifier.classes_]
    answers: list[dict[str, Any]] = []
    with console.progress_bars(not as_json and len(kept) > batch_size) as progress:
        size = classifier.model_.method.images_at_once(len(kept), batch_size)
        for start in range(0, len(kept), size):
            chunk = kept[start : start + size]
            odds = classifier.predict_proba([str(path) for path in chunk])
            inside = classifier.calibration_.sets(odds, coverage) if coverage and classifier.calibration_ else None
            for place, (path, row) in enumerate(zip(chunk, odds, strict=True)):
                order = row.argsort()[::-1]
                shown = order[:top] if inside is None else [i for i in order if inside[place, i]]
                answer: dict[str, Any] = {"image": str(path), "classes": [[labels[i], float(row[i])] for i in shown]}
                if abstain_below is not None:
                    answer["abstains"] = bool(row.max() < abstain_below)
                answers.append(answer)
            progress("predicting", start + len(chunk), len(kept))
    if as_json:
        unreadable = [{"image": str(path), "why": why} for path, why in skipped]
        console.print_json({"adapter": str(folder), "predictions": answers, "skipped": unreadable})
        return
    rows = [[item["image"], *_cells(item)] for item in answers]
    width = max(map(len, rows))
    rows = [row + [""] * (width - len(row)) for row in rows]  # sets differ in size
    console.print_table("", ["image", *(f"{place}." for place in range(1, width))], rows, left=["image"])
    for _, why in skipped:
        console.say(f"skipped: {why}")


def _cells(answer: dict[str, Any]) -> list[str]:
    """An image's classes with their probabilities, behind a dash where the answer is withheld."""
    cells = [f"{name} {console.percent(p)} %" for name, p in answer["classes"]]
    return ["– (not sure)", *cells] if answer.get("abstains") else cells


def _check_calibrated(folder: Path, coverage: float) -> None:
    """Refuse sets without a calibration, and say so where the held-out images were few.

    Raises:
        ConfigError: It wasn't calibrated.
    """
    from adaptkit.evaluation.calibration import saved_calibration, warning_about
    from adaptkit.methods.adapter import read_adapter_config

    calibration = saved_calibration(read_adapter_config(folder), folder)
    if calibration is None:
        raise ConfigError(
            "--coverage needs a classifier that was calibrated: call FewShotClassifier.calibrate with held-out images"
            " and save it again."
        )
    warning = warning_about(len(calibration.scores), coverage)
    if warning:
        console.say(f"warning: {warning}")


def find_images(paths: tuple[Path, ...]) -> list[Path]:
    """Files as given, and the images below folders, sorted.

    Raises:
        DataError: A folder without images.
    """
    from adaptkit.data.images import IMAGE_SUFFIXES

    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for p in path.rglob("[!.]*") if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES)
        if not inside:
            raise DataError(f"The folder {path} holds no images: give image files, or a folder with some.")
        found += inside
    return found


def readable(files: list[Path]) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Files that can be read, and the others with the reason."""
    from adaptkit.data.images import load_rgb

    kept, skipped = [], []
    for path in files:
        try:
            load_rgb(path)
            kept.append(path)
        except DataError as error:
            skipped.append((path, str(error)))
    return kept, skipped
