"""Few-shot lists: the images of one draw in a small JSON file that fits every machine.

A list names a dataset, the digest of its split, how the images were drawn, and the images by relative path. Given as a
dataset, it is the dataset it names with the listed images in the place of its training and validation images; it is
refused where the dataset's split is another, so an outdated list is never used silently.

CoOp's ImageNet shots depended on the order in which a machine lists its files. Ours are drawn from sorted names, so one
seed means one list everywhere; `adaptkit data shots imagenet` writes it.

Source: datasets sheet, section 4.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptkit.data.few_shot import SAMPLER_VERSION, FewShot
from adaptkit.data.lists import LISTED, first_few, many
from adaptkit.data.splits import Dataset, Split
from adaptkit.errors import DataError
from adaptkit.storage import digest_json, read_json, write_json

FORMAT = "adaptkit few-shot list"
VERSION = 1
_MAX_BYTES = 512 * 2**20
_KEYS = {
    "dataset": str,
    "own_split": bool,
    "split_digest": str,
    "sampler": str,
    "sampler_version": int,
    "shots": int,
    "seed": int,
    "origin": str,
    "classes": list,
    "train": list,
    "val": list,
}


def lists_digest(dataset: Dataset) -> str:
    """sha256 over a dataset's stored class names and its splits; display names don't change it."""
    parts = {name: split.digest for name, split in dataset.splits.items()}
    return digest_json({"classes": list(dataset.stored_names), "splits": parts})


def shot_list(dataset: Dataset, argument: str, few: FewShot, origin: str = "drawn") -> dict[str, Any]:
    """The list of one draw.

    Args:
        dataset: What it was drawn from.
        argument: What `load_dataset` was given for it: a known name is portable, a path isn't.
        few: The draw.
        origin: Where the images come from: "drawn", or the name of a converted file.
    """
    train = dataset.train.subset(few.train_indices)
    val = dataset.val.subset(few.val_indices) if dataset.val is not None else None
    return {
        "format": FORMAT,
        "version": VERSION,
        "dataset": argument,
        "own_split": dataset.source.get("split") == "own",
        "split_digest": lists_digest(dataset),
        "sampler": few.sampler,
        "sampler_version": SAMPLER_VERSION,
        "shots": few.shots,
        "seed": few.seed,
        "origin": origin,
        "classes": list(dataset.stored_names),
        "train": [list(pair) for pair in zip(train.ids, train.labels.tolist(), strict=True)],
        "val": [] if val is None else [list(pair) for pair in zip(val.ids, val.labels.tolist(), strict=True)],
    }


def write_shot_list(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a list made by `shot_list`."""
    write_json(path, content)


def is_shot_list(path: Path) -> bool:
    """Whether a JSON is a few-shot list, by its beginning."""
    try:
        with open(path, "rb") as file:
            return f'"{FORMAT}"'.encode() in file.read(512)
    except OSError:
        return False


def read_shot_list(path: str | Path) -> dict[str, Any]:
    """Read and check a list; whether its images are the dataset's is checked by `apply_shot_list`.

    Raises:
        MissingPathError: No such file.
        StorageError: Not JSON, or too large.
        DataError: It isn't a few-shot list, or one of another version; everything wrong in one message.
    """
    content = read_json(path, _MAX_BYTES)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path} isn't a few-shot list of adaptkit.")
    if content.get("version") != VERSION:
        raise DataError(f"{path} is a few-shot list of version {content.get('version')!r}; {VERSION} is accepted.")
    problems = [
        f"{key} is missing or isn't a {kind.__name__}" for key, kind in _KEYS.items() if not _is(content.get(key), kind)
    ]
    if not problems:
        for split in ("train", "val"):
            wrong = [number for number, entry in enumerate(content[split]) if not _is_entry(entry)]
            problems += [f"{split}[{number}] isn't [path, label]" for number in wrong]
    if not problems and not content["train"]:
        problems = ["train has no images"]
    if problems:
        listed = "; ".join(problems[:LISTED]) + ("; …" if len(problems) > LISTED else "")
        raise DataError(f"{path} has {many(len(problems), 'problem')}: {listed}.")
    return content


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and _is(entry[0], str) and _is(entry[1], int)


def load_shot_list(path: str | Path, load: Callable[..., Dataset]) -> Dataset:
    """The dataset of a list.

    Args:
        path: The list.
        load: Loads the dataset it names: called with its name and `own_split`.

    Raises:
        DataError: The list isn't one, or doesn't fit the dataset.
    """
    content = read_shot_list(path)
    if is_shot_list(Path(content["dataset"])):
        raise DataError(f"{path} names another few-shot list ({content['dataset']}) as its dataset: name the dataset.")
    return apply_shot_list(load(content["dataset"], own_split=content["own_split"]), content, os.fspath(path))


def apply_shot_list(dataset: Dataset, content: Mapping[str, Any], where: str) -> Dataset:
    """A dataset with a list's images in the place of its training and validation images.

    Raises:
        DataError: Other classes, another split, or images that aren't in it.
    """
    if tuple(content["classes"]) != dataset.stored_names:
        raise DataError(f"{where} was made for other classes than those of {dataset.name} here: draw the list again.")
    if content["split_digest"] != lists_digest(dataset):
        raise DataError(
            f"{where} was made for another split of {dataset.name} than the one here (images were added or lost, or the"
            " split file changed): draw the list again, or restore the data."
        )
    kept = {split: chosen(dataset, split, content[split], where) for split in ("train", "val") if content[split]}
    note = f"few-shot list {Path(where).name}: {content['origin']}"
    if content["origin"] == "drawn":
        note += f" by {content['sampler']}, {content['shots']} shots, seed {content['seed']}"
    return replace(
        dataset,
        train=dataset.train.subset(kept["train"]),
        val=dataset.val.subset(kept["val"]) if dataset.val is not None and "val" in kept else None,
        source={**dataset.source, "few_shot_list": where},
        notes=(*dataset.notes, note),
    )


def chosen(dataset: Dataset, split: str, entries: Sequence[Sequence[Any]], where: str) -> list[int]:
    """Positions of listed images in a split.

    Args:
        dataset: The dataset.
        split: "train" or "val".
        entries: [path, label] of each.
        where: What lists them, for messages.

    Raises:
        DataError: Images that aren't in the split, or are of another class there.
    """
    held: Split | None = dataset.train if split == "train" else dataset.val
    ids: tuple[str, ...] = held.ids if held is not None else ()
    labels: list[int] = held.labels.tolist() if held is not None else []
    index = {name: position for position, name in enumerate(ids)}
    absent = [path for path, _ in entries if path not in index]
    if absent:
        raise DataError(
            f"{where} lists {many(len(absent), 'image')} not among the {split} images of {dataset.name}"
            f" ({first_few(absent)})."
        )
    wrong = [path for path, label in entries if labels[index[path]] != label]
    if wrong:
        raise DataError(
            f"{where} gives {many(len(wrong), 'image')} another class than {dataset.name} does ({first_few(wrong)})."
        )
    return [index[path] for path, _ in entries]
