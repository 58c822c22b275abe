"""Few-shot caches of CoOp and its followers, which are pickles: read without running anything, made into our lists.

`split_fewshot/shot_16-seed_1.pkl` holds a dict of lists of dassl's `Datum`, `imagenet/preprocessed.pkl` the same of all
of ImageNet. A pickle can run any code when it is loaded, so only what these files need is let through: the opcodes that
build dicts, lists, texts and numbers, and one class, which is replaced by an empty one of ours. Paths are absolute ones
of the machine that wrote them; what lies before the image folder is dropped.

Source: datasets sheet, section 4.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adaptkit.data.few_shot import FewShot, sample_few_shot
from adaptkit.data.lists import LISTED, first_few, many
from adaptkit.data.shot_lists import chosen, shot_list
from adaptkit.data.splits import Dataset
from adaptkit.errors import AdaptKitError, DataError, MissingPathError
from adaptkit.types import ProgressCallback

_MAX_BYTES = 2 * 2**30
_MAX_MEMO = 50_000_000
_DATUM = ("dassl.data.datasets.base_dataset", "Datum")
_OPCODES = frozenset(
    {
        *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"),
        *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWTRUE", "NEWFALSE"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "INT", "BININT", "BININT1", "BININT2", "LONG1"),
        *("GLOBAL", "STACK_GLOBAL", "NEWOBJ", "BUILD"),
    }
)
"""What a pickle of dicts, lists, texts, numbers and plain objects is made of: nothing that calls a function."""

_FILE_NAME = re.compile(r"shot_(\d+)-seed_(-?\d+)")


class LegacyImage(NamedTuple):
    """One image of a legacy cache: absolute path on another machine, and label."""

    path: str
    label: int


def read_legacy(path: str | Path, progress: ProgressCallback | None = None) -> dict[str, list[LegacyImage]]:
    """Read a legacy cache without running anything in it.

    Args:
        path: A pickle that CoOp's code wrote.
        progress: Called as (what, MiB done, MiB in all).

    Returns:
        Images by split, in the file's order.

    Raises:
        MissingPathError: No such file.
        DataError: It is too large, damaged, holds something else, or asks for anything but lists of images.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingPathError(f"There is no file {path}.")
    if path.stat().st_size > _MAX_BYTES:
        raise DataError(f"{path} is too large: at most {_MAX_BYTES:,} bytes are read.")
    content = path.read_bytes()
    _check_opcodes(path, content, progress)
    try:
        held = _Unpickler(io.BytesIO(content)).load()
    except AdaptKitError:
        raise
    except Exception as error:  # whatever a damaged pickle makes the standard library raise
        raise DataError(f"{path} is a damaged pickle ({error}).") from error
    return _images(path, held)


def _check_opcodes(path: Path, content: bytes, progress: ProgressCallback | None) -> None:
    """Read the pickle's opcodes, without carrying any out.

    Raises:
        DataError: It isn't a whole pickle, or has an opcode that lists of images don't need.
    """
    try:
        for number, (opcode, argument, position) in enumerate(pickletools.genops(content)):
            if opcode.name not in _OPCODES:
                raise DataError(
                    f"{path} isn't a list of images: it holds the pickle opcode {opcode.name}, which is refused."
                )
            if opcode.name.endswith("PUT") and int(str(argument)) > min(_MAX_MEMO, len(content)):
                raise DataError(f"{path} is a damaged pickle (its memo is larger than the file).")
            if progress and position is not None and number % 1_000_000 == 0:
                progress("reading the pickle (MiB)", position >> 20, len(content) >> 20)
    except AdaptKitError:
        raise
    except Exception as error:  # genops raises ValueError and others on damaged input
        raise DataError(f"{path} isn't a pickle, or is damaged ({str(error) or type(error).__name__}).") from error


class _Unpickler(pickle.Unpickler):
    """Knows one class."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._datum = type("Datum", (), {})  # of this file alone: nothing it does to the class outlives it

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) != _DATUM:
            raise DataError(f"The pickle asks for {module}.{name}, which is refused: only lists of images are read.")
        return self._datum


def _images(path: Path, held: Any) -> dict[str, list[LegacyImage]]:
    """The images of an unpickled cache.

    Raises:
        DataError: It holds something else; everything wrong in one message.
    """
    if not isinstance(held, dict) or "train" not in held or not set(held) <= {"train", "val", "test"}:
        raise DataError(f"{path} doesn't hold CoOp's lists: a dict of 'train' and maybe 'val' or 'test' is expected.")
    problems: list[str] = []
    lists: dict[str, list[LegacyImage]] = {}
    for split, entries in held.items():
        if not isinstance(entries, list):
            problems.append(f"{split} is a {type(entries).__name__}, not a list")
            continue
        lists[split] = []
        for number, entry in enumerate(entries):
            facts: dict[str, Any] = vars(entry) if type(entry).__name__ == "Datum" else {}
            image, label = facts.get("_impath"), facts.get("_label")
            if isinstance(image, str) and image and isinstance(label, int) and not isinstance(label, bool):
                lists[split].append(LegacyImage(image, label))
            else:
                problems.append(f"{split}[{number}] isn't an image with a path and a label")
    if problems:
        listed = "; ".join(problems[:LISTED]) + ("; …" if len(problems) > LISTED else "")
        raise DataError(f"{path} has {many(len(problems), 'problem')}: {listed}.")
    return lists


class Conversion(NamedTuple):
    """A legacy cache as a list of ours, and whether drawing again gives the same images (None: it isn't a draw)."""

    content: dict[str, Any]
    same_as_drawn: bool | None


def convert_legacy(
    path: str | Path,
    dataset: Dataset,
    argument: str,
    *,
    shots: int | None = None,
    seed: int | None = None,
    progress: ProgressCallback | None = None,
) -> Conversion:
    """Make a few-shot list of a legacy cache.

    Args:
        path: The pickle.
        dataset: The dataset it belongs to.
        argument: What `load_dataset` was given for it.
        shots: Its shots; read from a name such as shot_16-seed_1.pkl by default, 0 for the whole list of all images.
        seed: Its seed; the same.
        progress: Called as (what, done, in all).

    Raises:
        MissingPathError: No such file.
        DataError: It isn't a cache, or of other images than the dataset's.
    """
    path = Path(path)
    lists = read_legacy(path, progress)
    named = _FILE_NAME.search(path.name)
    shots = shots if shots is not None else int(named[1]) if named else 0
    seed = seed if seed is not None else int(named[2]) if named else 0
    entries = {"train": _anchored(lists["train"], dataset.train.ids)}
    if dataset.val is not None and "val" in lists:
        entries["val"] = _anchored(lists["val"], dataset.val.ids)
    indices = {
        split: np.array(chosen(dataset, split, entries.get(split, ()), path.name), dtype=np.int64)
        for split in ("train", "val")
    }
    few = FewShot(indices["train"], indices["val"], shots, seed, "coop", "", "")
    same = None
    if shots:
        drawn = sample_few_shot(dataset.train, dataset.val, shots, seed, "coop", allow_fewer=True)
        same = np.array_equal(drawn.train_indices, few.train_indices) and (
            "val" not in entries or np.array_equal(drawn.val_indices, few.val_indices)
        )
    return Conversion(shot_list(dataset, argument, few, origin=path.name), same)


def _anchored(images: Iterable[LegacyImage], ids: Iterable[str]) -> list[tuple[str, int]]:
    """Relative path and label of each image: the longest end of its path that the dataset knows.

    Raises:
        DataError: Images the dataset doesn't have.
    """
    known = set(ids)
    found, lost = [], []
    for image in images:
        parts = image.path.replace("\\", "/").split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        name = next((end for end in ends if end in known), None)
        if name is None:
            lost.append(image.path)
        else:
            found.append((name, image.label))
    if lost:
        raise DataError(
            f"The dataset lacks {many(len(lost), 'listed image')} ({first_few(lost)}): give the dataset and the data"
            " root that the file was made for."
        )
    return found
