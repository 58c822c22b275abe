"""Tiny datasets on disk, in the exact layouts of the known ones."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np

from adaptkit.data.catalogue import Known, Layout
from tests.data.pictures import save_picture

WNIDS = {"n01440764": "tench", "n03773504": "missile", "n04008634": "missile"}
BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross")
DOGS = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel")
SPECIES = (
    "00000_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris",
    "00001_Animalia_Chordata_Aves_Passeriformes_Paridae_Parus_major",
)
CLASSES = {
    "caltech101": ("Faces", "Leopards", "accordion"),
    "food101": ("apple_pie", "waffles"),
    "dtd": ("banded", "dotted"),
    "eurosat": ("AnnualCrop", "Forest"),
    "country211": ("AD", "XK"),
    "fer2013": ("angry", "happy"),
    "inaturalist_mini": SPECIES,
}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def grow(root: Path, known: Known, layout: Layout | None = None, per_class: int = 5) -> Path:
    """A tiny data root with one dataset: images, its own index files, and its split file where it has one.

    Every class has `per_class` training images (all images, where nothing is split) and two test images.
    """
    layout = layout or known.layouts[0]
    folder, images = root / layout.folder, root / layout.image_path
    folder.mkdir(parents=True, exist_ok=True)
    _GROW[known.reader](known, layout, folder, images, per_class)
    if known.json:
        _split_json(known, folder, images)
    return root


def _split_json(known: Known, folder: Path, images: Path) -> None:
    """A split file over the pictures that lie there: two classes, by turns."""
    files = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.jpg"))[:6]
    entries = [[file, number % 2, ("zebra_crossing", "ant")[number % 2]] for number, file in enumerate(files)]
    write(folder / known.json, json.dumps({"train": entries[:2], "val": entries[2:4], "test": entries[4:]}))


def _pictures(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        save_picture(folder / name, seed=number)


def _folders(known, layout, folder, images, per_class):
    for name in (*CLASSES[known.name], *known.dropped):
        _pictures(images / name, [f"{name}_{n}.jpg" for n in range(per_class)])


def _pets(known, layout, folder, images, per_class):
    lines: dict[str, list[str]] = {"trainval": [], "test": []}
    for number, breed in enumerate(("Abyssinian", "american_bulldog"), 1):
        for split, count in (("trainval", per_class), ("test", 2)):
            names = [f"{breed}_{split}{n}" for n in range(count)]
            _pictures(images, [f"{name}.jpg" for name in names])
            lines[split] += [f"{name} {number} 1 1" for name in names]
    for split, listed in lines.items():
        write(folder / "annotations" / f"{split}.txt", "#Image CLASS-ID SPECIES BREED-ID\n" + "\n".join(listed) + "\n")


def _cars(known, layout, folder, images, per_class):
    from scipy.io import savemat

    (folder / "devkit").mkdir()
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(["Acura TL 2008", "Ram C/V Van 2012"], object)})
    for split, file, count in (
        ("train", "devkit/cars_train_annos.mat", per_class),
        ("test", "cars_test_annos_withlabels.mat", 2),
    ):
        rows = [(f"{n:05d}.jpg", 1 + n % 2) for n in range(1, 2 * count + 1)]
        _pictures(images / f"cars_{split}", [name for name, _ in rows])
        table = np.array(rows, dtype=[("fname", object), ("class", object)])
        savemat(folder / file, {"annotations": table})


def _flowers(known, layout, folder, images, per_class):
    from scipy.io import savemat

    labels = [1 + n % 2 for n in range(2 * per_class)]
    _pictures(images, [f"image_{n:05d}.jpg" for n in range(1, len(labels) + 1)])
    savemat(folder / "imagelabels.mat", {"labels": np.array(labels)})
    write(folder / "cat_to_name.json", json.dumps({"2": "colt's foot", "1": "pink primrose"}))


def _sun397(known, layout, folder, images, per_class):
    scenes = ("/a/abbey", "/i/ice_skating_rink/indoor")
    write(folder / "ClassName.txt", "\n".join(scenes) + "\n")
    for file, count in (("Training_01.txt", per_class), ("Testing_01.txt", 2)):
        names = [f"{scene}/sun_{file[:2]}{n}.jpg" for scene in scenes for n in range(count)]
        _pictures(images, [name.strip("/") for name in names])
        write(folder / file, "\n".join(names) + "\n")


def _ucf101(known, layout, folder, images, per_class):
    actions = {"HandstandPushups": ("Handstand_Pushups", "HandStandPushups"), "YoYo": ("Yo_Yo", "YoYo")}
    lists = folder / "ucfTrainTestlist"
    write(lists / "classInd.txt", "1 HandstandPushups\r\n2 YoYo\r\n")
    for file, count in (("trainlist01.txt", per_class), ("testlist01.txt", 2)):
        lines = []
        for number, (action, (shown, stem)) in enumerate(actions.items(), 1):
            names = [f"v_{stem}_{file[:2]}{n}" for n in range(count)]
            _pictures(images / shown, [f"{name}.jpg" for name in names])
            lines += [f"{action}/{name}.avi" + (f" {number}" if count > 2 else "") for name in names]
        write(lists / file, "\r\n".join(lines) + "\r\n")


def _aircraft(known, layout, folder, images, per_class):
    variants = ("707-320", "Cessna 525")
    write(folder / "variants.txt", "\n".join(variants) + "\n")
    first = 0
    for split, count in (("train", per_class), ("val", 2), ("test", 2)):
        numbers = [f"{first + n:07d}" for n in range(2 * count)]
        first += 2 * count
        _pictures(images, [f"{number}.jpg" for number in numbers])
        lines = [f"{number} {variants[n % 2]}" for n, number in enumerate(numbers)]
        write(folder / f"images_variant_{split}.txt", "\n".join(lines) + "\n")


def _imagenet(known, layout, folder, images, per_class):
    root = folder.parents[len(Path(layout.folder).parts) - 1]
    write(root / "imagenet" / "classnames.txt", "".join(f"{wnid} {name}\n" for wnid, name in WNIDS.items()))
    folders = [str(n) for n in range(len(WNIDS))] if known.name == "imagenetv2" else list(WNIDS)
    for part, count in ((layout.parts.get("train", ""), per_class), (layout.parts.get("test", ""), 2)):
        for name in folders:
            _pictures(images / part / name, [f"{name}_{part}{n}.JPEG" for n in range(count)])
        if not layout.parts:
            write(images / "README.txt", "words")
            break


def _cub(known, layout, folder, images, per_class):
    cub = known.name == "cub200"
    names = BIRDS if cub else ("Common Eider (Adult male)", "Oak Titmouse")
    numbers = ("1", "2") if cub else ("295", "1010")
    write(
        folder / "classes.txt", "".join(f"{n} {name}\n" for n, name in zip(numbers, names, strict=True)) + "0 Birds\n"
    )
    paths, labels, trains = [], [], []
    for number, name in zip(numbers, names, strict=True):
        for n in range(per_class + 2):
            image = f"{len(paths) + 1}" if cub else f"0000139e-21dc-4d0c-bfe1-{len(paths):012x}"
            path = f"{name if cub else number.zfill(4)}/{n}.jpg"
            paths.append(f"{image} {path}")
            labels.append(f"{image} {number}")
            trains.append(f"{image} {int(n < per_class)}")
            save_picture(images / path, seed=n)
    for file, lines in (("images", paths), ("image_class_labels", labels), ("train_test_split", trains)):
        write(folder / f"{file}.txt", "\n".join(lines) + "\n")


def _dogs(known, layout, folder, images, per_class):
    from scipy.io import savemat

    for split, count in (("train", per_class), ("test", 2)):
        files = [f"{dog}/{dog[:9]}_{split}{n}.jpg" for dog in DOGS for n in range(count)]
        _pictures(images, files)
        savemat(folder / f"{split}_list.mat", {"file_list": np.array([[name] for name in files], object)})


def _resisc45(known, layout, folder, images, per_class):
    for split, count in (("train", per_class), ("val", 2), ("test", 2)):
        files = [f"{name}_{split}{n}.jpg" for name in ("airplane", "sea_ice") for n in range(count)]
        _pictures(images, [f"{file.rpartition('_')[0]}/{file}" for file in files])
        write(folder / f"resisc45-{split}.txt", "\n".join(files) + "\n")


def _gtsrb(known, layout, folder, images, per_class):
    for label in range(2):
        _pictures(images / "Training" / f"{label:05d}", [f"{label:05d}_{n:05d}.ppm" for n in range(per_class)])
    _pictures(images / "Final_Test" / "Images", [f"{n:05d}.ppm" for n in range(4)])
    rows = "".join(f"{n:05d}.ppm;53;54;6;5;48;49;{n % 2}\n" for n in range(4))
    write(folder / "GT-final_test.csv", "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n" + rows)


def _split_folders(known, layout, folder, images, per_class):
    for split, part in layout.parts.items():
        for name in CLASSES[known.name]:
            _pictures(images / part / name, [f"{split}{n}.jpg" for n in range(per_class if split == "train" else 2)])


# --- what torchvision reads; its checksums must be switched off, see `no_checksums` ----------------------------------

CHECKED_BY = ("cifar", "svhn", "stl10")


def no_checksums(monkeypatch) -> None:
    """Let torchvision take tiny files for the published ones."""
    for module in CHECKED_BY:
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).is_file()
        )


def _torchvision(known, layout, folder, images, per_class):
    _TORCH[known.name](folder, per_class)


def _pixels(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


def _by_turns(count: int) -> list[int]:
    return [n % 2 for n in range(count)]


def _pickle(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


def _cifar10(folder, per_class):
    count = 2 * per_class
    for number in range(1, 6):
        share = {"data": _pixels(count if number == 1 else 0, 3072), "labels": _by_turns(count) if number == 1 else []}
        _pickle(folder / f"cifar-10-batches-py/data_batch_{number}", share)
    _pickle(folder / "cifar-10-batches-py/test_batch", {"data": _pixels(4, 3072), "labels": _by_turns(4)})
    _pickle(folder / "cifar-10-batches-py/batches.meta", {"label_names": ["airplane", "automobile"]})


def _cifar100(folder, per_class):
    for split, count in (("train", 2 * per_class), ("test", 4)):
        _pickle(folder / "cifar-100-python" / split, {"data": _pixels(count, 3072), "fine_labels": _by_turns(count)})
    _pickle(folder / "cifar-100-python/meta", {"fine_label_names": ["apple", "aquarium_fish"]})


def _svhn(folder, per_class):
    from scipy.io import savemat

    for split, count in (("train", 2 * per_class), ("test", 4)):
        labels = np.array([10 if n % 2 == 0 else 1 for n in range(count)])  # the files call the digit 0 ten
        savemat(
            folder / f"{split}_32x32.mat", {"X": _pixels(count, 32, 32, 3).transpose(1, 2, 3, 0), "y": labels[:, None]}
        )


def _stl10(folder, per_class):
    base = folder / "stl10_binary"
    base.mkdir()
    for split, count in (("train", 2 * per_class), ("test", 4)):
        (base / f"{split}_X.bin").write_bytes(_pixels(count, 3, 96, 96).tobytes())
        (base / f"{split}_y.bin").write_bytes(bytes(label + 1 for label in _by_turns(count)))
    (base / "unlabeled_X.bin").write_bytes(b"")
    write(base / "class_names.txt", "airplane\nbird\n")


def _mnist(folder, per_class):
    base = folder / "MNIST" / "raw"
    base.mkdir(parents=True)
    for split, count in (("train", 2 * per_class), ("t10k", 4)):
        head = b"".join(number.to_bytes(4, "big") for number in (2051, count, 28, 28))
        (base / f"{split}-images-idx3-ubyte").write_bytes(head + _pixels(count, 28, 28).tobytes())
        head = b"".join(number.to_bytes(4, "big") for number in (2049, count))
        (base / f"{split}-labels-idx1-ubyte").write_bytes(head + bytes(_by_turns(count)))


def _pcam(folder, per_class):
    import h5py

    (folder / "pcam").mkdir()
    for split, count in (("train", 2 * per_class), ("valid", 4), ("test", 4)):
        stem = folder / "pcam" / f"camelyonpatch_level_2_split_{split}"
        with h5py.File(f"{stem}_x.h5", "w") as file:
            file["x"] = _pixels(count, 96, 96, 3)
        with h5py.File(f"{stem}_y.h5", "w") as file:
            file["y"] = np.array(_by_turns(count), dtype=np.uint8).reshape(-1, 1, 1, 1)


_TORCH = {"cifar10": _cifar10, "cifar100": _cifar100, "svhn": _svhn, "stl10": _stl10, "mnist": _mnist, "pcam": _pcam}
_GROW = {
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
    "torchvision": _torchvision,
}


def move(root: Path, old: str, new: str) -> None:
    """Rename a folder below the root."""
    (root / new).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(root / old, root / new)
