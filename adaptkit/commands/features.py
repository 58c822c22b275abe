"""`adaptkit features`: files of features, written from a dataset and looked at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options, _runs
from adaptkit.errors import StorageError

if TYPE_CHECKING:
    from adaptkit.data.feature_reader import FeatureFile
    from adaptkit.data.features import Precision


@click.group("features", short_help="files of features: write one, look at one")
def command() -> None:
    """Write a dataset's frozen features as one file, and look at such a file.

    A file of features is a dataset: `--dataset features:FILE` runs every method that works on features, without a
    backbone and without images. Add @test=val where the file has no test split, or @train=val to draw shots from its
    validation images; these then choose no settings.

    \b
    Examples:
      adaptkit features export my_photos --backbone ViT-B-16/openai --out my_photos.safetensors
      adaptkit features show my_photos.safetensors
      adaptkit compare features:my_photos.safetensors --shots 4
    """


@command.command("export")
@click.argument("dataset")
@_options.backbone_option
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="File to write.")
@click.option("--views", type=click.IntRange(min=0), default=0, show_default=True, help="Augmented looks per image.")
@click.option("--shots", type=_options.NameList(), help="Ready draws such as 1,2,4 [default: all training images].")
@click.option("--seed", default=1, show_default=True, help="Seeds the draws and the views.")
@click.option("--data-root", type=click.Path(file_okay=False), help="Folder that holds the datasets' folders.")
@click.option("--template", "templates", multiple=True, help="Prompt with one {}; repeat for an ensemble.")
@_options.descriptions_options
@_options.engine_options
@click.option("--overwrite", is_flag=True, help="Replace --out.")
@_options.json_option
def export(
    dataset: str,
    backbone: str,
    out: Path,
    views: int,
    shots: tuple[str, ...] | None,
    seed: int,
    data_root: str | None,
    templates: tuple[str, ...],
    descriptions: str | None,
    allow_undescribed: bool,
    device: str,
    batch_size: int,
    precision: Precision,
    cache: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Encode a dataset's images and texts once, and write them as one safetensors file.

    The file holds the training, validation and test features with their labels, the text features of every template
    (and of descriptions, where there are some), the class names, and the backbone's name and digest.

    \b
    Example:
      adaptkit features export digits --out digits.safetensors
    """
    counts = _shot_counts(shots or ())
    if out.exists() and not overwrite:
        raise StorageError(f"{out} is already there: choose another --out, or say --overwrite.")
    _runs.check_writable(out.parent)

    from adaptkit.backbones.load import load_backbone
    from adaptkit.data.descriptions import with_descriptions
    from adaptkit.data.feature_export import export_features
    from adaptkit.data.features import FeatureStore
    from adaptkit.data.sources import load_dataset

    most = max(counts, default=None)
    data = load_dataset(dataset, data_root=data_root, templates=list(templates) or None, shots=most)
    if descriptions is not None:
        data = with_descriptions(data, descriptions, allow_missing=allow_undescribed)
    with console.progress_bars(not as_json) as progress:
        images = export_features(
            data,
            load_backbone(backbone, device=device),
            out,
            shots=counts,
            seed=seed,
            views=views,
            store=FeatureStore(cache),
            batch_size=batch_size,
            precision=precision,
            progress=progress,
        )
    if as_json:
        console.print_json({"file": str(out), "images": images, "bytes": out.stat().st_size})
        return
    for note in data.notes:
        console.say(f"note: {note}")
    what = ", ".join(f"{console.count(number)} {name}" for name, number in images.items())
    size = out.stat().st_size / 2**20
    console.say(f"{what} images: {size:.1f} MiB in {out}; use it with: adaptkit compare features:{out}")


def _shot_counts(given: tuple[str, ...]) -> list[int]:
    """Numbers of shots.

    Raises:
        click.BadParameter: One isn't a whole number above 0.
    """
    wrong = [text for text in given if not text.isdecimal() or int(text) < 1]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is no number of shots: write whole numbers above 0, such as 1,2,4.")
    return [int(text) for text in given]


@command.command("show")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@_options.json_option
def show(file: Path, as_json: bool) -> None:
    """Check a file of features and say what it holds.

    \b
    Example:
      adaptkit features show digits.safetensors
    """
    from adaptkit.data.feature_reader import read_feature_file

    found = read_feature_file(file)
    facts = _facts(found)
    if as_json:
        console.print_json({"file": str(file), **facts, "class_names": list(found.class_names)})
        return
    images = facts.pop("images")
    lines = {name: f"{console.count(count)} images" for name, count in images.items()}
    shown = {
        key.replace("_", " "): str(value) for key, value in facts.items() if key != "notes" and value not in ("", 0)
    }
    console.print_facts(found.name, {**shown, **lines})
    for note in facts["notes"]:
        console.say(f"note: {note}")


def _facts(found: FeatureFile) -> dict[str, Any]:
    """Plain facts about a file."""
    views = next((len(split.views) for split in found.splits.values() if split.views is not None), 0)
    return {
        "backbone": found.backbone,
        "backbone_digest": found.digest,
        "numbers_per_feature": found.dim,
        "logit_scale": found.logit_scale,
        "classes": len(found.class_names),
        "templates": len(found.templates) if found.texts is not None else 0,
        "descriptions": len(found.sentence_labels),
        "views": views,
        "images": {name: len(split.labels) for name, split in found.splits.items()},
        "notes": list(found.notes),
    }
