"""`adaptkit data`: what is there, what is missing, what to do; and the feature store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options
from adaptkit.errors import DataError

if TYPE_CHECKING:
    from adaptkit.data.checks import DatasetReport


@click.group("data", short_help="what is there, what is missing, what to do")
def command() -> None:
    """Get datasets, look at them, and at stored features.

    \b
    Examples:
      adaptkit data prepare eurosat --data-root ~/data
      adaptkit data check my_photos
      adaptkit data features
    """


@command.command("prepare")
@click.argument("dataset")
@_options.data_root_option
@_options.own_split_option
@_options.json_option
def prepare(dataset: str, data_root: str | None, own_split: bool, as_json: bool) -> None:
    """Get a known dataset: what is missing is downloaded, verified and unpacked; what is there stays.

    An interrupted download goes on where it stopped. Where no source works, the folder tree that is needed and the
    steps by hand are printed, and the exit code is 1. With --own-split, a split of ours is written beside the images.

    \b
    Example:
      adaptkit data prepare eurosat --data-root ~/data
    """
    from adaptkit.data.known import data_root_for
    from adaptkit.data.prepare import known_dataset, write_own_split
    from adaptkit.data.prepare import prepare as make_ready

    known = known_dataset(dataset)
    root = data_root_for(dataset, data_root)
    if not as_json:
        console.say(f"{known.title}: {known.citation}. Licence of the images: {known.licence}.")
    with console.progress_bars(not as_json) as progress:
        state = make_ready(dataset, root, own_split=own_split, progress=progress)
    written = write_own_split(dataset, root)[0] if state.ready and own_split and known.torch is None else None
    if as_json:
        console.print_json({**state.to_dict(), "own_split": None if written is None else str(written)})
    elif state.ready:
        console.say(f"{dataset} is ready in {root}" + (f", fetched from {state.fetched}." if state.fetched else "."))
        if written is not None:
            console.say(f"Own split, not comparable with published figures: {written}")
        console.say(f"Look at every image: adaptkit data check {dataset} --data-root {root}")
    else:
        for where, reason in state.tried:
            console.say(f"{where}: {reason}")
        steps = state.steps or "Download the images by hand."
        click.echo(f"{dataset} isn't ready: {state.missing}\n\n{steps} This tree is needed:\n\n{state.tree}")
    if not state.ready:
        raise SystemExit(1)


@command.command("check")
@click.argument("dataset")
@_options.data_root_option
@_options.own_split_option
@click.option("--quick", is_flag=True, help="Look for the files without opening them.")
@_options.descriptions_options
@_options.json_option
def check(
    dataset: str,
    data_root: str | None,
    own_split: bool,
    quick: bool,
    descriptions: str | None,
    allow_undescribed: bool,
    as_json: bool,
) -> None:
    """Count classes and images, open every image, look for images that are in two splits.

    Known datasets are compared with the table of 'adaptkit list datasets'. With descriptions, find every class in them
    by its name, and count its sentences.

    \b
    Examples:
      adaptkit data check my_photos
      adaptkit data check eurosat --data-root ~/data
      adaptkit data check my_photos --descriptions my_descriptions.json
    """
    from adaptkit.data.checks import check_dataset, differences_from_table
    from adaptkit.data.descriptions import with_descriptions
    from adaptkit.data.sources import load_dataset
    from adaptkit.data.templates import preview

    found = load_dataset(dataset, data_root=data_root, own_split=own_split)
    if descriptions is not None:
        found = with_descriptions(found, descriptions, allow_missing=allow_undescribed)
    different = differences_from_table(found)
    described = {name: len(found.descriptions.get(name, ())) for name in found.class_names}
    with console.progress_bars(not as_json) as progress:
        report = check_dataset(found, images=not quick, progress=progress)
    if as_json:
        extra = {
            "split_digest": found.digest,
            "prompts": preview(found, 5),
            "descriptions": described,
            "differences": different,
        }
        console.print_json({**report.to_dict(), **extra})
    else:
        splits = {name: f"{sum(counts.values()):,} images" for name, counts in report.counts.items()}
        fewest = ", ".join(f"{name} {count}" for name, count in report.fewest[:3])
        facts = {"classes": len(found.class_names), **splits, "fewest training images": fewest}
        if any(described.values()):
            facts["descriptions"] = _counted(described)
        console.print_facts(found.name, {**facts, "prompts": "\n".join(preview(found, 3))})
        for note in (*found.notes, *_identical(report)):
            console.say(f"note: {note}")
        if not report.problems + different:
            console.say("Everything can be used.")
    problems = [sentence.rstrip(".") + "." for sentence in different + report.problems]
    if problems:
        more = f" … and {len(problems) - 20} more." if len(problems) > 20 else ""
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise DataError(f"{found.name} has {count}: " + " ".join(problems[:20]) + more)


def _identical(report: DatasetReport) -> list[str]:
    """A note about equal files in different splits, where there are some."""
    if not report.identical:
        return []
    count, first = len(report.identical), " and ".join(report.identical[0])
    return [f"{count:,} picture{'s are' if count > 1 else ' is'} in several splits, byte for byte, such as {first}"]


def _counted(described: dict[str, int]) -> str:
    """Sentences by class, in one line."""
    counts = [count for count in described.values() if count]
    span = str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    without = len(described) - len(counts)
    return f"{sum(counts):,} sentences, {span} per class" + (f"; {without} classes without any" if without else "")


@command.command("shots")
@click.argument("dataset")
@_options.data_root_option
@_options.own_split_option
@click.option("--shots", type=click.IntRange(min=1), default=16, show_default=True, help="Images per class.")
@click.option("--seed", default=1, show_default=True, help="Seeds the draw.")
@click.option("--sampler", default="coop", show_default=True, help="Whose draws.")
@click.option("--allow-fewer", is_flag=True, help="Accept classes with fewer images than shots.")
@click.option("--out", type=click.Path(dir_okay=False), required=True, help="The JSON file to write.")
@_options.json_option
def shots(
    dataset: str,
    data_root: str | None,
    own_split: bool,
    shots: int,
    seed: int,
    sampler: str,
    allow_fewer: bool,
    out: str,
    as_json: bool,
) -> None:
    """Write which images a seed draws: a small file that gives the same shots on every machine.

    Give the file as the dataset of another command. It is refused where the dataset's split is another.

    \b
    Examples:
      adaptkit data shots imagenet --shots 16 --seed 1 --out imagenet-16-1.json
      adaptkit run imagenet-16-1.json --method coop --shots 16
    """
    from adaptkit.data.few_shot import sample_few_shot
    from adaptkit.data.shot_lists import shot_list, write_shot_list
    from adaptkit.data.sources import load_dataset

    found = load_dataset(dataset, data_root=data_root, own_split=own_split)
    few = sample_few_shot(found.train, found.val, shots, seed, sampler, allow_fewer=allow_fewer)
    write_shot_list(out, shot_list(found, dataset, few))
    counts = {"train": len(few.train_indices), "val": len(few.val_indices)}
    if as_json:
        console.print_json({"path": out, **counts, "digest": few.digest})
    else:
        console.say(f"{out}: {counts['train']:,} training and {counts['val']:,} validation images of {found.name}.")


@command.command("convert")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--dataset", required=True, help="The dataset it belongs to.")
@_options.data_root_option
@click.option("--shots", type=click.IntRange(min=0), help="Its shots [default: as its name says].")
@click.option("--seed", type=int, help="Its seed [default: as its name says].")
@click.option("--out", type=click.Path(dir_okay=False), help="The JSON file to write [default: FILE with .json].")
@_options.json_option
def convert(
    file: str,
    dataset: str,
    data_root: str | None,
    shots: int | None,
    seed: int | None,
    out: str | None,
    as_json: bool,
) -> None:
    """Make a few-shot list of a cache that CoOp's code wrote (shot_16-seed_1.pkl, or ImageNet's preprocessed.pkl).

    No code in the file is run. Its images must be in the dataset; whether drawing again gives the same ones is said.

    \b
    Example:
      adaptkit data convert ~/data/eurosat/split_fewshot/shot_16-seed_1.pkl --dataset eurosat --out shots.json
    """
    from pathlib import Path

    from adaptkit.data.legacy import convert_legacy
    from adaptkit.data.shot_lists import write_shot_list
    from adaptkit.data.sources import load_dataset

    found = load_dataset(dataset, data_root=data_root)
    with console.progress_bars(not as_json) as progress:
        content, same = convert_legacy(file, found, dataset, shots=shots, seed=seed, progress=progress)
    path = out or str(Path(file).with_suffix(".json"))
    write_shot_list(path, content)
    counts = {"train": len(content["train"]), "val": len(content["val"])}
    if as_json:
        return console.print_json({"path": path, **counts, "same_as_drawn": same})
    console.say(f"{path}: {counts['train']:,} training and {counts['val']:,} validation images of {found.name}.")
    if same is not None:
        drawn = "the same images" if same else "other images: the split or the code that drew them was another"
        console.say(f"Drawing {content['shots']} shots with seed {content['seed']} again gives {drawn}.")
    return None


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
