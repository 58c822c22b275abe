"""`adaptkit data`: what is there, what is missing, what to do; and the feature store."""

from __future__ import annotations

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options
from adaptkit.errors import DataError


@click.group("data", short_help="what is there, what is missing, what to do")
def command() -> None:
    """Look at datasets and at stored features.

    \b
    Examples:
      adaptkit data check my_photos
      adaptkit data features
    """


@command.command("check")
@click.argument("dataset")
@click.option("--data-root", type=click.Path(file_okay=False), help="Folder that holds the datasets' folders.")
@click.option("--quick", is_flag=True, help="Look for the files without opening them.")
@_options.descriptions_options
@_options.json_option
def check(
    dataset: str, data_root: str | None, quick: bool, descriptions: str | None, allow_undescribed: bool, as_json: bool
) -> None:
    """Count classes and images, open every image, look for images that are in two splits.

    With descriptions, find every class in them by its name, and count its sentences.

    \b
    Examples:
      adaptkit data check my_photos
      adaptkit data check my_photos --descriptions my_descriptions.json
    """
    from adaptkit.data.checks import check_dataset
    from adaptkit.data.descriptions import with_descriptions
    from adaptkit.data.sources import load_dataset
    from adaptkit.data.templates import preview

    found = load_dataset(dataset, data_root=data_root)
    if descriptions is not None:
        found = with_descriptions(found, descriptions, allow_missing=allow_undescribed)
    described = {name: len(found.descriptions.get(name, ())) for name in found.class_names}
    with console.progress_bars(not as_json) as progress:
        report = check_dataset(found, images=not quick, progress=progress)
    if as_json:
        extra = {"split_digest": found.digest, "prompts": preview(found, 5), "descriptions": described}
        console.print_json({**report.to_dict(), **extra})
    else:
        splits = {name: f"{sum(counts.values()):,} images" for name, counts in report.counts.items()}
        fewest = ", ".join(f"{name} {count}" for name, count in report.fewest[:3])
        facts = {"classes": len(found.class_names), **splits, "fewest training images": fewest}
        if any(described.values()):
            facts["descriptions"] = _counted(described)
        console.print_facts(found.name, {**facts, "prompts": "\n".join(preview(found, 3))})
        for note in found.notes:
            console.say(f"note: {note}")
        if not report.problems:
            console.say("Everything can be used.")
    if report.problems:
        shown = report.problems[:20]
        more = f" … and {len(report.problems) - 20} more." if len(report.problems) > 20 else ""
        count = f"{len(report.problems)} problem{'s' if len(report.problems) > 1 else ''}"
        raise DataError(f"{found.name} has {count}: " + " ".join(shown) + more)


def _counted(described: dict[str, int]) -> str:
    """Sentences by class, in one line."""
    counts = [count for count in described.values() if count]
    span = str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    without = len(described) - len(counts)
    return f"{sum(counts):,} sentences, {span} per class" + (f"; {without} classes without any" if without else "")


@command.command("features")
@click.option("--clear", is_flag=True, help="Delete stored features.")
@click.option("--backbone", help="Only those of this backbone.")
@click.option(
    "--cache", type=click.Path(file_okay=False), help="The store's folder [default: adaptkit's cache folder]."
)
@_options.json_option
def features(clear: bool, backbone: str | None, cache: str | None, as_json: bool) -> None:
    """List the stored features, or clear them.

    \b
    Example:
      adaptkit data features --clear --backbone mini
    """
    from adaptkit.data.features import FeatureStore

    store = FeatureStore(cache)
    if clear:
        freed = store.clear(backbone)
        return console.print_json({"freed_bytes": freed}) if as_json else console.say(f"Freed {freed / 2**20:.1f} MiB.")
    entries = [entry for entry in store.entries() if backbone in (None, entry.backbone, entry.digest)]
    if as_json:
        return console.print_json(
            [
                {"backbone": e.backbone, "pool": e.pool, "view": e.view, "images": e.images, "bytes": e.bytes}
                for e in entries
            ]
        )
    rows = [[e.backbone, e.pool[:60], str(e.view), console.count(e.images), f"{e.bytes / 2**20:.2f}"] for e in entries]
    total = sum(entry.bytes for entry in entries) / 2**20
    return console.print_table(
        f"Stored features, {total:.1f} MiB", ["backbone", "images from", "view", "images", "MiB"], rows,
        left=["backbone", "images from", "view"],
    )  # fmt: skip
