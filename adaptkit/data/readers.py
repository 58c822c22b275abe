"""Datasets' own index files and folders, read into lists of images.

One function per way of writing a split down; `adaptkit.data.catalogue` says which dataset needs which. Nothing here
opens an image. Paths in index files are another's: the image source checks them on every use.

Source: datasets sheet, sections 2, 3, 5 and 8.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from adaptkit.data.catalogue import CATALOGUE, Known, Layout, Reader
from adaptkit.data.folders import class_folders
from adaptkit.data.lists import Item, Lists, first_few, many
from adaptkit.data.templates import display_name
from adaptkit.errors import DataError, MissingPathError
from adaptkit.storage import check_relative, read_json

MAX_INDEX_BYTES = 512 * 2**20


class Place(NamedTuple):
    """Where a dataset was found: its table entry, its layout, and the data root."""

    known: Known
    layout: Layout
    data_root: Path

    @property
    def folder(self) -> Path:
        """Where its index files lie."""
        return self.data_root / self.layout.folder

    @property
    def images(self) -> Path:
        """What listed paths are relative to."""
        return self.folder / self.layout.images


@dataclass(frozen=True)
class Official:
    """What a dataset's own files say.

    Args:
        stored_names: Class names by label.
        lists: Images by split; under "all" where nothing is split.
        trusted: Whether the paths come from the file system itself.
        notes: What a reader of results must know.
    """

    stored_names: tuple[str, ...]
    lists: Lists
    trusted: bool = False
    notes: tuple[str, ...] = ()


def read_official(place: Place) -> Official:
    """Read a dataset's own index files or folders.

    Raises:
        MissingPathError: An index file isn't there.
        DataError: One holds something else than it should.
        StorageError: One can't be read.
    """
    found = _READERS[place.known.reader](place)
    for items in found.lists.values() if not found.trusted else ():
        for item in items:
            check_relative(item.path)
    return found


def shown_names(known: Known, stored: Sequence[str], data_root: Path) -> dict[str, str]:
    """The names to show by stored name, for datasets whose stored names aren't made to be read.

    Raises:
        MissingPathError: They are ImageNet's and aren't under the data root.
        DataError: A stored name isn't a wnid of ImageNet.
    """
    if known.reader == "imagenet":
        names = imagenet_names(data_root)
        unknown = [wnid for wnid in stored if wnid not in names]
        if unknown:
            raise DataError(
                f"{known.name} has {many(len(unknown), 'class folder')} that ImageNet's {len(names)} class names don't"
                f" cover ({first_few(unknown)}): one folder per wnid is expected."
            )
        return {wnid: names[wnid] for wnid in stored}  # told apart in the whole list, so the same in every variant
    if known.names:
        return distinct({name: known.names[name] for name in stored if name in known.names})
    rule = {"cub": bird_name, "dogs": breed_name, "split-folders": species_name}.get(known.reader)
    return distinct({name: display_name(rule(name)) for name in stored}) if rule is not None else {}


def bird_name(stored: str) -> str:
    """A bird's name without the number CUB puts in front.

    Example:
        >>> bird_name("001.Black_footed_Albatross")
        'Black_footed_Albatross'
    """
    return re.sub(r"^\d+\.", "", stored)


def breed_name(stored: str) -> str:
    """A dog's breed without its wnid.

    Example:
        >>> breed_name("n02085936-Maltese_dog")
        'Maltese_dog'
    """
    return re.sub(r"^n\d{8}-", "", stored)


def species_name(folder: str) -> str:
    """The scientific name in an iNaturalist folder's: its number, kingdom, phylum, class, order and family go.

    Example:
        >>> species_name("00000_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris")
        'Lumbricus terrestris'
    """
    return " ".join(folder.split("_")[6:]) or folder


def distinct(names: Mapping[str, str]) -> dict[str, str]:
    """Names to show, told apart where several classes have the same one.

    ImageNet has two classes "missile" and two "sunglasses". A blank behind the name tells them apart wherever names are
    compared, and tokenisers drop it: the prompts stay those of the papers.

    Example:
        >>> distinct({"n1": "missile", "n2": "tench", "n3": "missile"})
        {'n1': 'missile', 'n2': 'tench', 'n3': 'missile '}
    """
    seen: dict[str, int] = {}
    told: dict[str, str] = {}
    for stored, name in names.items():
        told[stored] = name + " " * seen.get(name, 0)
        seen[name] = seen.get(name, 0) + 1
    return told


# --- index files in general ----------------------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    """The lines of a text file that aren't blank.

    Raises:
        MissingPathError: No such file.
        DataError: It is too large or isn't text.
    """
    if not path.is_file():
        raise MissingPathError(f"There is no {path}, which lists the dataset's images or classes.")
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise DataError(f"{path} is too large for a list: at most {MAX_INDEX_BYTES:,} bytes are read.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} isn't UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _pairs(path: Path) -> list[tuple[str, str]]:
    """Lines of two parts: the first word, and the rest of the line.

    Raises:
        DataError: A line has one word only.
    """
    pairs = []
    for number, line in enumerate(_lines(path), 1):
        first, _, rest = line.partition(" ")
        if not rest.strip():
            raise DataError(f"{path}, line {number} is {line!r}; two words are expected.")
        pairs.append((first, rest.strip()))
    return pairs


def _matrix(path: Path) -> dict[str, Any]:
    """The variables of a .mat file.

    Raises:
        MissingPathError: No such file.
        DataError: scipy can't read it.
    """
    from scipy.io import loadmat  # type: ignore[import-untyped]

    if not path.is_file():
        raise MissingPathError(f"There is no {path}, which lists the dataset's images or classes.")
    try:
        content: dict[str, Any] = loadmat(path, squeeze_me=True, struct_as_record=True)
    except Exception as error:  # scipy raises all kinds of errors on damaged files
        raise DataError(f"{path} isn't a readable .mat file ({error}).") from error
    return content


def _variable(content: Mapping[str, Any], name: str, path: Path) -> Any:
    if name not in content:
        held = ", ".join(sorted(key for key in content if not key.startswith("__"))) or "nothing"
        raise DataError(f"{path} has no variable {name!r} (it has {held}).")
    return content[name]


def _number(text: str, path: Path) -> int:
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{path} has {text!r} where a whole number is expected.") from None


def _labelled(paths: Iterable[tuple[str, str]], names: Sequence[str], path: Path) -> list[Item]:
    """Items of (image path, class name) pairs.

    Raises:
        DataError: A class that isn't in `names`.
    """
    index = {name: label for label, name in enumerate(names)}
    items = []
    for image, name in paths:
        if name not in index:
            raise DataError(f"{path} names the class {name!r}, which isn't one of the {len(names)} known ones.")
        items.append(Item(image, index[name]))
    return items


# --- CoOp's suite --------------------------------------------------------------------------------------------------


def _folders(place: Place) -> Official:
    """Class folders without a split; labels follow the folders' order (capitals first)."""
    by_class, notes = class_folders(place.images, needs_images=False)
    kept = {folder: files for folder, files in by_class.items() if folder not in place.known.dropped}
    stored = tuple(place.known.renames.get(folder, folder) for folder in kept)
    items = [Item(f"{folder}/{file}", label) for label, (folder, files) in enumerate(kept.items()) for file in files]
    return Official(stored, {"all": items}, trusted=True, notes=tuple(notes))


def _pets(place: Place) -> Official:
    """annotations/*.txt: `Abyssinian_100 1 1 1` is an image and the class's number; its name is the file's."""
    names: dict[int, str] = {}
    lists: Lists = {"train": [], "test": []}
    for split, file in (("train", "trainval"), ("test", "test")):
        path = place.folder / "annotations" / f"{file}.txt"
        for image, rest in _pairs(path):
            if image.startswith("#"):
                continue
            label = _number(rest.split()[0], path) - 1
            names.setdefault(label, image.rpartition("_")[0].lower())
            lists[split].append(Item(f"{image}.jpg", label))
    return Official(_by_label(names, place.folder / "annotations"), lists)


def _by_label(names: Mapping[int, str], path: Path) -> tuple[str, ...]:
    if sorted(names) != list(range(len(names))):
        raise DataError(f"{path} numbers {many(len(names), 'class')} with gaps; 1, 2, 3, … is expected.")
    return tuple(names[label] for label in range(len(names)))


def _cars(place: Place) -> Official:
    """devkit/*.mat; the year moves to the front of the name."""
    meta = place.folder / "devkit" / "cars_meta.mat"
    given = [str(name) for name in _variable(_matrix(meta), "class_names", meta)]
    lists: Lists = {}
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = _variable(_matrix(place.folder / file), "annotations", place.folder / file)
        lists[split] = [Item(f"cars_{split}/{row['fname']}", int(row["class"]) - 1) for row in rows.reshape(-1)]
    return Official(tuple(car_name(name) for name in given), lists)


def car_name(given: str) -> str:
    """A car's name with the year in front.

    Example:
        >>> car_name("Acura TL Type-S 2008")
        '2008 Acura TL Type-S'
    """
    model, _, year = given.strip().rpartition(" ")
    return f"{year} {model}" if year.isdigit() else given.strip()


def _flowers(place: Place) -> Official:
    """imagelabels.mat: the class of image 1, 2, 3, …; names in cat_to_name.json."""
    path = place.folder / "imagelabels.mat"
    labels = [int(label) - 1 for label in _variable(_matrix(path), "labels", path).reshape(-1)]
    named = read_json(place.folder / "cat_to_name.json")
    if not isinstance(named, dict) or set(named) != {str(number + 1) for number in range(len(named))}:
        raise DataError(f"{place.folder / 'cat_to_name.json'} must give a name to the numbers 1, 2, 3, …")
    stored = tuple(str(named[str(label + 1)]) for label in range(len(named)))
    return Official(stored, {"all": [Item(f"image_{n:05d}.jpg", label) for n, label in enumerate(labels, 1)]})


def _sun397(place: Place) -> Official:
    """ClassName.txt, Training_01.txt and Testing_01.txt, with paths such as /i/ice_skating_rink/indoor/sun_1.jpg."""
    places = [line.strip("/") for line in _lines(place.folder / "ClassName.txt")]
    lists = {}
    for split, file in (("train", "Training_01.txt"), ("test", "Testing_01.txt")):
        images = [line.strip("/") for line in _lines(place.folder / file)]
        lists[split] = _labelled(((image, image.rpartition("/")[0]) for image in images), places, place.folder / file)
    return Official(tuple(map(scene_name, places)), lists)


def scene_name(folder: str) -> str:
    """A scene's name from its folder: without the letter, the most special part first.

    Example:
        >>> scene_name("i/ice_skating_rink/indoor"), scene_name("a/abbey")
        ('indoor ice_skating_rink', 'abbey')
    """
    return " ".join(reversed(folder.strip("/").split("/")[1:]))


def _ucf101(place: Place) -> Official:
    """ucfTrainTestlist/*.txt, with videos such as YoYo/v_YoYo_g08_c01.avi, whose middle frames lie under Yo_Yo/."""
    folder = place.folder / "ucfTrainTestlist"
    actions = [name for _, name in _pairs(folder / "classInd.txt")]
    lists = {}
    for split, file in (("train", "trainlist01.txt"), ("test", "testlist01.txt")):
        videos = [line.split()[0] for line in _lines(folder / file)]
        frames = ((video.removesuffix(".avi") + ".jpg", video.partition("/")[0]) for video in videos)
        pairs = ((f"{action_name(name)}/{frame.partition('/')[2]}", name) for frame, name in frames)
        lists[split] = _labelled(pairs, actions, folder / file)
    return Official(tuple(map(action_name, actions)), lists)


def action_name(given: str) -> str:
    """An action's name, split at capitals.

    Example:
        >>> action_name("ApplyEyeMakeup"), action_name("YoYo")
        ('Apply_Eye_Makeup', 'Yo_Yo')
    """
    return "_".join(re.findall("[A-Z][^A-Z]*", given)) or given


def _aircraft(place: Place) -> Official:
    """variants.txt, and images_variant_*.txt with an image's number and its variant per line."""
    stored = tuple(_lines(place.folder / "variants.txt"))
    lists = {}
    for split in ("train", "val", "test"):
        path = place.folder / f"images_variant_{split}.txt"
        lists[split] = _labelled(((f"{image}.jpg", name) for image, name in _pairs(path)), stored, path)
    return Official(stored, lists)


# --- ImageNet and its variants -------------------------------------------------------------------------------------


def _imagenet(place: Place) -> Official:
    """Folders per wnid, or (ImageNet-V2) per position in the list of names; stored names are wnids."""
    wnids = tuple(imagenet_names(place.data_root)) if place.known.name == "imagenetv2" else ()
    lists: Lists = {}
    stored: tuple[str, ...] = ()
    notes: list[str] = []
    for split, part in (place.layout.parts or {"test": ""}).items():
        by_class, more = class_folders(place.images / part, needs_images=False)
        notes += more
        folders = _positions(by_class, wnids, place) if wnids else dict(zip(by_class, by_class, strict=True))
        by_class = {wnid: by_class[folder] for wnid, folder in folders.items()}
        stored = stored or tuple(by_class)
        extra = sorted(set(by_class) - set(stored))
        if extra:
            raise DataError(f"{place.images / part} has classes that the training images don't: {first_few(extra)}.")
        prefix = f"{part}/" if part else ""
        lists[split] = [
            Item(f"{prefix}{folders[wnid]}/{file}", label)
            for label, wnid in enumerate(stored)
            for file in by_class.get(wnid, ())
        ]
    return Official(stored, lists, trusted=True, notes=tuple(notes))


def _positions(by_class: Mapping[str, list[str]], wnids: Sequence[str], place: Place) -> dict[str, str]:
    """ImageNet-V2's folders 0, 1, 2, … by wnid, in that order: as texts they would be sorted 0, 1, 10, 100."""
    wrong = [folder for folder in by_class if not folder.isdecimal() or int(folder) >= len(wnids)]
    if wrong:
        raise DataError(
            f"{place.images} has the folders {first_few(wrong)}; ImageNet-V2's are numbered 0 to {len(wnids) - 1}."
        )
    return {wnids[int(folder)]: folder for folder in sorted(by_class, key=int)}


def imagenet_names(data_root: Path) -> dict[str, str]:
    """ImageNet's class names by wnid, in wnid order, told apart where two are the same.

    They are read from the first CoOp `classnames.txt` under the data root; without one they are open_clip's, in the
    order of the 1,000 class folders of ImageNet or ImageNet-Sketch.

    Raises:
        MissingPathError: Neither is there.
        DataError: The file is damaged.
    """
    layouts = [(CATALOGUE[name], layout) for name in _IMAGENETS for layout in CATALOGUE[name].layouts]
    for folder in dict.fromkeys(["", *(layout.folder for _, layout in layouts)]):
        path = data_root / folder / "classnames.txt"
        if path.is_file():
            return distinct(dict(sorted(_pairs(path))))
    for known, layout in layouts:
        images = data_root / layout.image_path / layout.parts.get("train", "")
        if known.classes != 1000 or known.name == "imagenetv2" or not images.is_dir():
            continue
        wnids = sorted(folder.name for folder in images.iterdir() if re.fullmatch(r"n\d{8}", folder.name))
        if len(wnids) == 1000:
            from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

            return distinct(dict(zip(wnids, IMAGENET_CLASSNAMES, strict=True)))
    raise MissingPathError(
        f"ImageNet's class names aren't under {data_root}: put CoOp's classnames.txt (a wnid and a name per line) into"
        " it or into imagenet/. With the 1,000 folders of ImageNet or ImageNet-Sketch there it isn't needed."
    )


_IMAGENETS = ("imagenet", "imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")


# --- further ones --------------------------------------------------------------------------------------------------


def _cub(place: Place) -> Official:
    """images.txt, image_class_labels.txt, train_test_split.txt and classes.txt: ids and values. NABirds has classes
    without images, and ids that aren't numbers."""
    folder = place.folder
    images, labels = dict(_pairs(folder / "images.txt")), dict(_pairs(folder / "image_class_labels.txt"))
    trains, names = dict(_pairs(folder / "train_test_split.txt")), dict(_pairs(folder / "classes.txt"))
    if not images.keys() == labels.keys() == trains.keys():
        raise DataError(f"The lists in {folder} don't name the same images: get the dataset again.")
    used = sorted(set(labels.values()), key=lambda label: _number(label, folder / "image_class_labels.txt"))
    without = [label for label in used if label not in names]
    if without:
        raise DataError(f"{folder / 'classes.txt'} has no name for the classes {first_few(without)}.")
    index = {label: position for position, label in enumerate(used)}
    lists: Lists = {"train": [], "test": []}
    for image, path in images.items():
        lists["train" if trains[image] == "1" else "test"].append(Item(path, index[labels[image]]))
    return Official(tuple(names[label] for label in used), lists)


def _dogs(place: Place) -> Official:
    """train_list.mat and test_list.mat: files such as n02085620-Chihuahua/n02085620_5927.jpg."""
    images = {}
    for split in ("train", "test"):
        path = place.folder / f"{split}_list.mat"
        images[split] = [str(file) for file in _variable(_matrix(path), "file_list", path).reshape(-1)]
    stored = tuple(sorted({file.partition("/")[0] for files in images.values() for file in files}))
    lists = {
        split: _labelled(((file, file.partition("/")[0]) for file in files), stored, place.folder)
        for split, files in images.items()
    }
    return Official(stored, lists)


def _resisc45(place: Place) -> Official:
    """resisc45-*.txt: a file such as airplane_001.jpg per line, which lies in its class's folder."""
    files = {split: _lines(place.folder / f"resisc45-{split}.txt") for split in ("train", "val", "test")}
    stored = tuple(sorted({file.rpartition("_")[0] for names in files.values() for file in names}))
    lists = {
        split: _labelled(
            ((f"{file.rpartition('_')[0]}/{file}", file.rpartition("_")[0]) for file in names), stored, place.folder
        )
        for split, names in files.items()
    }
    return Official(stored, lists)


def _gtsrb(place: Place) -> Official:
    """Training/ has class folders; the test images' classes are in GT-final_test.csv."""
    by_class, notes = class_folders(place.images / "Training", needs_images=True)
    stored = tuple(by_class)
    train = [
        Item(f"Training/{name}/{file}", label) for label, (name, files) in enumerate(by_class.items()) for file in files
    ]
    path = place.folder / "GT-final_test.csv"
    rows = list(csv.DictReader(_lines(path), delimiter=";"))
    if not rows or not {"Filename", "ClassId"} <= set(rows[0]):
        raise DataError(f"{path} must have the columns Filename and ClassId, separated by semicolons.")
    pairs = ((f"Final_Test/Images/{row['Filename']}", f"{_number(row['ClassId'], path):05d}") for row in rows)
    return Official(stored, {"train": train, "test": _labelled(pairs, stored, path)}, notes=tuple(notes))


def _split_folders(place: Place) -> Official:
    """Class folders inside folders of splits."""
    lists: Lists = {}
    stored: tuple[str, ...] = ()
    notes: list[str] = []
    for split, part in place.layout.parts.items():
        by_class, more = class_folders(place.images / part, needs_images=split == "train")
        stored, notes = stored or tuple(by_class), notes + more
        pairs = ((f"{part}/{name}/{file}", name) for name, files in by_class.items() for file in files)
        lists[split] = _labelled(pairs, stored, place.images / part)
    return Official(stored, lists, trusted=True, notes=tuple(notes))


_READERS: Mapping[Reader, Callable[[Place], Official]] = {
    "folders": _folders,
    "pets": _pets,
    "cars": _cars,
    "flowers": _flowers,
    "sun397": _sun397,
    "ucf101": _ucf101,
    "aircraft": _aircraft,
    "imagenet": _imagenet,
    "cub": _cub,
    "dogs": _dogs,
    "resisc45": _resisc45,
    "gtsrb": _gtsrb,
    "split-folders": _split_folders,
}
