"""Every known dataset on a tiny tree: each layout, own splits, what is missing and how it is said."""

from __future__ import annotations

import json
import shutil
import sys
import types

import numpy as np
import pytest

from adaptkit.data.catalogue import BY_FILE, CATALOGUE, File, HubFile, TorchFiles
from adaptkit.data.catalogue_names import COUNTRIES, GTSRB_NAMES
from adaptkit.data.checks import check_dataset, differences_from_table
from adaptkit.data.few_shot import sample_few_shot
from adaptkit.data.prepare import write_own_split
from adaptkit.data.sources import load_dataset
from adaptkit.errors import ConfigError, DataError, MissingPathError, StorageError
from tests.data.trees import BIRDS, DOGS, SPECIES, WNIDS, grow, no_checksums, write

LAYOUTS = [(name, number) for name, known in CATALOGUE.items() for number in range(len(known.layouts))]
WITH_JSON = sorted(name for name, known in CATALOGUE.items() if known.json)
TEST_ONLY = ("imagenet_a", "imagenet_r", "imagenet_sketch", "imagenetv2")
OFFICIAL_VAL = ("country211", "fgvc_aircraft", "pcam", "resisc45")
# stored and shown names of the tiny trees of datasets without a split file
NAMES = {
    **dict.fromkeys(("imagenet", *TEST_ONLY), (tuple(WNIDS), ("tench", "missile", "missile "))),
    "fgvc_aircraft": (("707-320", "Cessna 525"),) * 2,
    "cub200": (BIRDS, ("Black footed Albatross", "Laysan Albatross")),
    "nabirds": (("Common Eider (Adult male)", "Oak Titmouse"),) * 2,
    "stanford_dogs": (DOGS, ("Chihuahua", "Japanese spaniel")),
    "country211": (("AD", "XK"), ("Andorra", "Kosovo")),
    "gtsrb": (("00000", "00001"), ("speed limit 20 km/h", "speed limit 30 km/h")),
    "resisc45": (("airplane", "sea_ice"), ("airplane", "sea ice")),
    "fer2013": (("angry", "happy"),) * 2,
    "inaturalist_mini": (SPECIES, ("Lumbricus terrestris", "Parus major")),
    "cifar10": (("airplane", "automobile"),) * 2,
    "cifar100": (("apple", "aquarium_fish"), ("apple", "aquarium fish")),
    "stl10": (("airplane", "bird"),) * 2,
    "svhn": (tuple("0123456789"),) * 2,
    "mnist": (tuple("0123456789"),) * 2,
    "pcam": (("0", "1"), ("lymph node", "lymph node containing metastatic tumor tissue")),
}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.delenv("ADAPTKIT_DATA_ROOT", raising=False)
    no_checksums(monkeypatch)


def needs_h5py(name):
    if name == "pcam":
        pytest.importorskip("h5py")


# --- the table -----------------------------------------------------------------------------------------------------


def test_the_table_is_whole():
    groups = [known.group for known in CATALOGUE.values()]
    assert (groups.count("CoOp suite"), groups.count("ImageNet variant"), groups.count("other")) == (11, 4, 14)
    for known in CATALOGUE.values():
        assert known.classes > 1
        assert len(known.sizes) == 3
        assert known.sizes[2] > 0
        assert all((known.licence, known.citation, known.rule, known.layouts))
        assert known.origins or known.steps
        assert not known.json or known.json != known.own_json
    assert len(BY_FILE) == 9 + 29 - 6
    assert sum(len(known.layouts) for known in CATALOGUE.values()) == len(LAYOUTS) > 60


def test_sources_name_real_places():
    fetched = 0
    for known in CATALOGUE.values():
        for origin in known.origins:
            for item in origin.items:
                fetched += 1
                if isinstance(item, File):
                    assert item.url.startswith(("https://", "http://"))
                    assert len(item.md5) in (0, 32)
                    assert len(item.sha256) in (0, 64)
                    assert ".." not in item.to
                elif isinstance(item, HubFile):
                    assert item.repo.count("/") == 1
                else:
                    assert isinstance(item, TorchFiles)
                    assert known.torch is not None
    assert fetched > 40


def test_names_that_we_hold():
    assert len(COUNTRIES) == len(set(COUNTRIES.values())) == 250
    assert (COUNTRIES["AD"], COUNTRIES["US"], COUNTRIES["ZW"]) == ("Andorra", "United States", "Zimbabwe")
    assert len(GTSRB_NAMES) == len(set(GTSRB_NAMES.values())) == 43
    assert (GTSRB_NAMES["00014"], GTSRB_NAMES["00040"]) == ("stop", "roundabout")


# --- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "number"), LAYOUTS)
def test_every_layout_is_read(name, number, tmp_path):
    needs_h5py(name)
    known = CATALOGUE[name]
    grow(tmp_path, known, known.layouts[number])
    dataset = load_dataset(name, data_root=tmp_path)
    assert dataset.name == name
    assert dataset.templates == known.templates
    assert check_dataset(dataset).problems == [] or name in ("svhn", "mnist")  # two of ten digits
    assert all(image.size > (1, 1) for split in dataset.splits.values() for image in split.images(range(len(split))))
    if known.json:
        assert {split: len(images) for split, images in dataset.splits.items()} == {"train": 2, "val": 2, "test": 2}
        assert dataset.class_names == ("zebra crossing", "ant")
        return
    classes = 3 if known.reader == "imagenet" else 2
    stored, shown = NAMES[name]
    assert (dataset.stored_names, dataset.class_names) == (stored, shown)
    assert len(dataset.train) == (0 if name in TEST_ONLY else 5 * classes)
    assert len(dataset.val or ()) == (2 * classes if name in OFFICIAL_VAL else 0)
    assert len(dataset.test) == (5 if name in TEST_ONLY else 2) * classes
    assert dataset.source["split"] == "official"
    assert set(known.caveats) <= set(dataset.notes)


def test_layouts_give_the_same_images(tmp_path):
    """Ids are relative to the image folder, so one split digest holds in every layout."""
    compared = 0
    for name in ("imagenet", "cub200", "dtd", "fgvc_aircraft"):
        digests = set()
        for number, layout in enumerate(CATALOGUE[name].layouts):
            root = grow(tmp_path / f"{name}{number}", CATALOGUE[name], layout)
            digests.add(load_dataset(name, data_root=root).digest)
            compared += 1
        assert len(digests) == 1, name
    assert compared >= 12


def test_split_files_kept_elsewhere(tmp_path):
    """The TPT line keeps split files in its code tree: the data root or its folder `splits` hold them here."""
    known = CATALOGUE["dtd"]
    grow(tmp_path, known, known.layouts[1])
    before = load_dataset("dtd", data_root=tmp_path).digest
    for place in ("", "splits"):
        (tmp_path / place).mkdir(exist_ok=True)
        held = next(tmp_path.rglob(known.json))
        shutil.move(held, tmp_path / place / known.json)
        assert load_dataset("dtd", data_root=tmp_path).digest == before


def test_the_image_folder_with_the_first_image_wins(tmp_path):
    """An empty folder of CoOp's name beside the images in torchvision's place isn't taken."""
    known = CATALOGUE["dtd"]
    grow(tmp_path, known, known.layouts[2])
    (tmp_path / "dtd" / "images").mkdir()
    assert check_dataset(load_dataset("dtd", data_root=tmp_path)).problems == []


# --- ImageNet ------------------------------------------------------------------------------------------------------


def test_imagenets_two_missiles_differ_in_name_and_not_in_prompt(tmp_path):
    from adaptkit.backbones.load import load_backbone
    from adaptkit.methods.base import render_prompts

    dataset = load_dataset("imagenet", data_root=grow(tmp_path, CATALOGUE["imagenet"]))
    assert len(set(dataset.class_names)) == 3
    tokens = load_backbone("mini").tokenize(render_prompts(dataset.class_names, dataset.templates[0])).ids.tolist()
    assert tokens[1] == tokens[2] != tokens[0]


def test_variants_name_their_classes_as_imagenet_does(tmp_path):
    grow(tmp_path, CATALOGUE["imagenet"])
    grow(tmp_path, CATALOGUE["imagenet_r"])
    shutil.rmtree(tmp_path / "imagenet-rendition/imagenet-r/n03773504")
    source, target = (load_dataset(name, data_root=tmp_path) for name in ("imagenet", "imagenet_r"))
    assert target.stored_names == ("n01440764", "n04008634")
    by_wnid = dict(zip(source.stored_names, source.class_names, strict=True))
    assert target.class_names == tuple(by_wnid[wnid] for wnid in target.stored_names) == ("tench", "missile ")


def test_imagenet_v2_folders_are_numbers(tmp_path):
    wnids = [f"n{10000000 + number}" for number in range(12)]
    write(tmp_path / "classnames.txt", "".join(f"{wnid} class of {wnid}\n" for wnid in wnids))
    from tests.data.pictures import save_picture

    images = tmp_path / CATALOGUE["imagenetv2"].layouts[0].image_path
    for number in range(12):
        save_picture(images / str(number) / "x.jpeg", seed=number)
    dataset = load_dataset("imagenetv2", data_root=tmp_path)
    assert dataset.stored_names == tuple(wnids)
    assert [path.split("/")[0] for path in dataset.test.ids] == [str(number) for number in range(12)]
    assert dataset.test.labels.tolist() == list(range(12))
    (images / "12").mkdir()
    with pytest.raises(DataError, match="folders 12; ImageNet-V2's are numbered 0 to 11"):
        load_dataset("imagenetv2", data_root=tmp_path)


def test_names_from_open_clip_where_there_is_no_list(tmp_path):
    wnids = [f"n{10000000 + number}" for number in range(1000)]
    for wnid in wnids:
        (tmp_path / "imagenet-sketch/images" / wnid).mkdir(parents=True)
    for wnid in (wnids[657], wnids[744]):
        write(tmp_path / "imagenet-adversarial/imagenet-a" / wnid / "1.jpg", "picture")
    dataset = load_dataset("imagenet_a", data_root=tmp_path)
    assert dataset.stored_names == (wnids[657], wnids[744])
    assert dataset.class_names == ("missile", "missile ")


def test_no_names_at_all(tmp_path):
    grow(tmp_path, CATALOGUE["imagenet_a"])
    (tmp_path / "imagenet/classnames.txt").unlink()
    with pytest.raises(MissingPathError, match=r"put CoOp's classnames\.txt"):
        load_dataset("imagenet_a", data_root=tmp_path)


def test_folders_that_are_no_wnids(tmp_path):
    grow(tmp_path, CATALOGUE["imagenet_a"])
    write(tmp_path / "imagenet-adversarial/imagenet-a/goldfish/1.jpg", "picture")
    with pytest.raises(DataError, match=r"1 class folder that .* don't cover \(goldfish\)"):
        load_dataset("imagenet_a", data_root=tmp_path)


def test_no_shots_from_a_test_set(tmp_path):
    dataset = load_dataset("imagenet_a", data_root=grow(tmp_path, CATALOGUE["imagenet_a"]))
    with pytest.raises(DataError, match="test images alone"):
        sample_few_shot(dataset.train, dataset.val, 1, 1)


# --- own splits ----------------------------------------------------------------------------------------------------

OWN = sorted(set(CATALOGUE) - set(TEST_ONLY) - set(OFFICIAL_VAL))
UNSPLIT = ("caltech101", "dtd", "eurosat", "food101", "oxford_flowers")
OWN_NAMES = {
    "caltech101": ("face", "leopard", "accordion"),
    "eurosat": ("Annual Crop Land", "Forest"),
    "oxford_pets": ("abyssinian", "american_bulldog"),
    "stanford_cars": ("2008 Acura TL", "2012 Ram C/V Van"),
    "oxford_flowers": ("pink primrose", "colt's foot"),
    "sun397": ("abbey", "indoor ice_skating_rink"),
    "ucf101": ("Handstand_Pushups", "Yo_Yo"),
    "food101": ("apple_pie", "waffles"),
    "dtd": ("banded", "dotted"),
}


@pytest.mark.parametrize("name", OWN)
def test_own_splits(name, tmp_path):
    known = CATALOGUE[name]
    grow(tmp_path, known, per_class=10)
    if known.json:
        next(tmp_path.rglob(known.json)).unlink()
        with pytest.raises(MissingPathError, match=f"data prepare {name}.*--own-split"):
            load_dataset(name, data_root=tmp_path)
    dataset = load_dataset(name, data_root=tmp_path, own_split=True)
    counts = [split.counts()[:2] for split in dataset.splits.values()]
    assert counts == [[5, 5], [2, 2], [3, 3]] if name in UNSPLIT else [[8, 8], [2, 2], [2, 2]]
    assert dataset.source["split"] == "own"
    assert "own split, not comparable" in dataset.notes[0]
    assert len(OWN) == 21
    if name in OWN_NAMES:
        assert dataset.stored_names == OWN_NAMES[name]
    assert load_dataset(name, data_root=tmp_path, own_split=True).digest == dataset.digest
    assert all(
        path.is_file() for split in dataset.splits.values() for i in range(len(split)) if (path := split.path(i))
    )
    if known.torch is not None:
        with pytest.raises(ConfigError, match="aren't files"):
            write_own_split(name, tmp_path)
        return
    path, written = write_own_split(name, tmp_path)
    assert path.name == f"split_adaptkit_{name}.json"
    assert written.digest == load_dataset(path, data_root=tmp_path).digest == dataset.digest
    assert load_dataset(path).class_names == dataset.class_names
    assert written.notes[0] == f"own split ({path.name}), not comparable with published figures"
    assert write_own_split(name, tmp_path)[0] == path


@pytest.mark.parametrize("name", [*TEST_ONLY, *OFFICIAL_VAL])
def test_no_own_split_where_all_is_official(name, tmp_path):
    needs_h5py(name)
    grow(tmp_path, CATALOGUE[name])
    with pytest.raises(DataError, match="official splits throughout"):
        load_dataset(name, data_root=tmp_path, own_split=True)


def test_an_own_split_never_takes_the_published_name(tmp_path):
    grow(tmp_path, CATALOGUE["eurosat"])
    published = tmp_path / "eurosat/split_zhou_EuroSAT.json"
    before = published.read_bytes()
    write_own_split("eurosat", tmp_path)
    assert published.read_bytes() == before
    assert load_dataset("eurosat", data_root=tmp_path).source["split"] == "other"  # tiny, so not the published file
    assert load_dataset("eurosat", data_root=tmp_path, own_split=True).source["split"] == "own"


def test_own_split_is_the_same_wherever_files_are_listed_in_another_order(tmp_path):
    first = grow(tmp_path / "one", CATALOGUE["eurosat"])
    for label in ("Forest", "AnnualCrop"):  # written in another order
        for path in sorted((first / "eurosat/2750" / label).iterdir(), reverse=True):
            target = tmp_path / "two/eurosat/2750" / label / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    one, two = (load_dataset("eurosat", data_root=tmp_path / root, own_split=True) for root in ("one", "two"))
    assert one.digest == two.digest
    assert one.train.ids == two.train.ids


def test_own_split_leaves_other_datasets_alone(tmp_path):
    assert load_dataset("digits", own_split=True).digest == load_dataset("digits").digest


# --- what is missing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_a_missing_data_root(name, tmp_path):
    folder = CATALOGUE[name].layouts[0].folder or "pcam"
    with pytest.raises(MissingPathError, match=rf"--data-root.*ADAPTKIT_DATA_ROOT.*{folder}/"):
        load_dataset(name)
    with pytest.raises(MissingPathError, match=rf"There is no data root .*none|There is no .*{folder}"):
        load_dataset(name, data_root=tmp_path / "none")
    with pytest.raises(MissingPathError, match=rf"There is no .*{folder}.*data prepare {name}"):
        load_dataset(name, data_root=tmp_path)


@pytest.mark.parametrize(
    ("name", "gone", "said"),
    [
        ("eurosat", "eurosat/2750", r"no .*eurosat/2750: .*eurosat/split_zhou_EuroSAT\.json and the images in"),
        ("fgvc_aircraft", "fgvc_aircraft/variants.txt", r"no .*fgvc_aircraft/variants\.txt: "),
        ("imagenet", "imagenet/images/val", r"no .*imagenet/images/val: .*images/train/ and imagenet/images/val/"),
        ("gtsrb", "gtsrb/GT-final_test.csv", r"no .*GT-final_test\.csv"),
        ("cub200", "CUB_200_2011/images", r"no .*CUB_200_2011/images: "),
        ("inaturalist_mini", "inaturalist_mini/2021_valid", r"no .*inaturalist_mini/2021_valid: "),
        ("cifar10", "cifar10/cifar-10-batches-py", r"no .*cifar-10-batches-py: "),
        ("stanford_dogs", "stanford_dogs/test_list.mat", r"no .*test_list\.mat: "),
    ],
)
def test_a_half_data_root(name, gone, said, tmp_path):
    grow(tmp_path, CATALOGUE[name])
    path = tmp_path / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(MissingPathError, match=said):
        load_dataset(name, data_root=tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "text", "said"),
    [
        ("fgvc_aircraft", "images_variant_val.txt", "0000001 Concorde\n", "names the class 'Concorde'"),
        ("fgvc_aircraft", "images_variant_val.txt", "0000001\n", "line 1 is '0000001'; two words"),
        ("fgvc_aircraft", "images_variant_val.txt", "../../etc/passwd 707-320\n", r"leaves its folder through '\.\.'"),
        ("cub200", "images.txt", "1 /etc/passwd.jpg\n", "don't name the same images"),
        ("cub200", "classes.txt", "1 001.Some\n", "no name for the classes 2"),
        ("gtsrb", "GT-final_test.csv", "a,b\n1,2\n", "columns Filename and ClassId"),
        ("gtsrb", "GT-final_test.csv", "Filename;ClassId\n0.ppm;many\n", "'many' where a whole number"),
        ("gtsrb", "GT-final_test.csv", "Filename;ClassId\n0.ppm;77\n", "names the class '00077'"),
        ("resisc45", "resisc45-val.txt", "../x/y_1.jpg\n", "leaves its folder"),
        ("stanford_dogs", "test_list.mat", "no matrix", "isn't a readable .mat file"),
    ],
)
def test_damaged_index_files(name, file, text, said, tmp_path):
    grow(tmp_path, CATALOGUE[name])
    write(next(tmp_path.rglob(file)), text)
    with pytest.raises((DataError, StorageError), match=said):
        load_dataset(name, data_root=tmp_path)


def test_files_that_torchvision_refuses(tmp_path, monkeypatch):
    grow(tmp_path, CATALOGUE["cifar10"])
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"torchvision can't read cifar10 in .*corrupted.*data prepare cifar10"):
        load_dataset("cifar10", data_root=tmp_path)


def test_a_package_that_is_missing(tmp_path, monkeypatch):
    needs_h5py("pcam")
    grow(tmp_path, CATALOGUE["pcam"])
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r"torchvision can't read pcam in .*install h5py"):
        load_dataset("pcam", data_root=tmp_path)


def test_split_digests_of_torchvision_datasets_read_no_pixels(tmp_path):
    dataset = load_dataset("mnist", data_root=grow(tmp_path, CATALOGUE["mnist"]))
    dataset.train.source.dataset = types.SimpleNamespace()  # nothing to read from
    assert len(dataset.digest) == 64
    assert len(set(dataset.train.content_keys())) == len(dataset.train)
    assert dataset.train.ids[:2] == ("train/000000", "train/000001")
    again = load_dataset("mnist", data_root=tmp_path)
    assert again.train.content_keys() == dataset.train.content_keys()
    file = tmp_path / "mnist/MNIST/raw/train-labels-idx1-ubyte"
    file.write_bytes(file.read_bytes()[:-1] + b"\x05")
    assert np.any(load_dataset("mnist", data_root=tmp_path).train.labels != dataset.train.labels)


# --- against the table ---------------------------------------------------------------------------------------------


def test_differences_from_the_table(tmp_path):
    said = differences_from_table(load_dataset("cub200", data_root=grow(tmp_path, CATALOGUE["cub200"])))
    assert said == [
        "cub200 has 200 classes, and 2 are here",
        "cub200 has 5,994 train images, and 10 are here",
        "cub200 has 5,794 test images, and 4 are here",
    ]
    own = differences_from_table(load_dataset("cub200", data_root=tmp_path, own_split=True))
    assert own[1:] == ["cub200 has 11,788 image images, and 14 are here"]
    assert differences_from_table(load_dataset("digits")) == []


def test_published_splits_have_the_tables_sizes():
    import os
    from pathlib import Path

    folder = os.environ.get("ADAPTKIT_SPLITS_DIR")
    if not folder:
        pytest.skip("ADAPTKIT_SPLITS_DIR isn't set: no published split files")
    checked = 0
    for name in WITH_JSON:
        file = Path(folder) / CATALOGUE[name].json
        if file.is_file():
            dataset = load_dataset(file)
            assert dataset.source["split"] == "published"
            assert differences_from_table(dataset) == []
            checked += 1
    assert checked == 7


def test_json_of_a_layout_names_paths_as_the_table_says():
    """The example path of the tree that is shown is shaped like those of the published file."""
    import os
    from pathlib import Path

    folder = os.environ.get("ADAPTKIT_SPLITS_DIR")
    if not folder:
        pytest.skip("ADAPTKIT_SPLITS_DIR isn't set: no published split files")
    compared = 0
    for name in WITH_JSON:
        file = Path(folder) / CATALOGUE[name].json
        if file.is_file():
            paths = [path for path, _, _ in json.loads(file.read_text())["train"]]
            assert {path.count("/") for path in paths} == {CATALOGUE[name].example.count("/")}
            compared += 1
    assert compared == 7


# --- readers against published split files -------------------------------------------------------------------------


def published(name):
    """Triples of a published split file by split."""
    import os
    from pathlib import Path

    folder = os.environ.get("ADAPTKIT_SPLITS_DIR")
    if not folder:
        pytest.skip("ADAPTKIT_SPLITS_DIR isn't set: no published split files")
    return json.loads((Path(folder) / CATALOGUE[name].json).read_text())


def official_files(name, root, content, monkeypatch):
    """The index files a published split was made of, rebuilt from it; class folders are listed, not made."""
    known = CATALOGUE[name]
    folder = root / known.layouts[0].folder
    (root / known.layouts[0].image_path).mkdir(parents=True)
    by_class = {}
    for path in sorted(path for triples in content.values() for path, _, _ in triples):
        by_class.setdefault(path.rpartition("/")[0], []).append(path.rpartition("/")[2])
    monkeypatch.setattr("adaptkit.data.readers.class_folders", lambda path, needs_images: (by_class, []))
    train, test = content["train"] + content["val"], content["test"]
    if name == "oxford_pets":
        for file, triples in (("trainval", train), ("test", test)):
            lines = [f"{path.removesuffix('.jpg')} {label + 1} 1 1" for path, label, _ in sorted(triples)]
            write(folder / "annotations" / f"{file}.txt", "\n".join(lines) + "\n")
    if name == "ucf101":
        actions = {label: stored.replace("_", "") for _, label, stored in train}
        lists = folder / "ucfTrainTestlist"
        write(lists / "classInd.txt", "".join(f"{n + 1} {actions[n]}\n" for n in sorted(actions)))
        for file, triples in (("trainlist01.txt", train), ("testlist01.txt", test)):
            videos = [(actions[label], path.partition("/")[2], label) for path, label, _ in triples]
            lines = [f"{action}/{frame.removesuffix('.jpg')}.avi {label + 1}" for action, frame, label in videos]
            write(lists / file, "\n".join(lines) + "\n")


@pytest.mark.parametrize("name", ["caltech101", "dtd", "eurosat", "oxford_pets", "ucf101"])
def test_own_splits_have_the_published_classes_and_sizes(name, tmp_path, monkeypatch):
    content = published(name)
    official_files(name, tmp_path, content, monkeypatch)
    own = load_dataset(name, data_root=tmp_path, own_split=True)
    wanted = {(path, label) for triples in content.values() for path, label, _ in triples}
    held = {pair for split in own.splits.values() for pair in zip(split.ids, split.labels.tolist(), strict=True)}
    assert held == wanted
    assert own.stored_names == tuple(dict(sorted((label, stored) for _, label, stored in content["test"])).values())
    assert tuple(map(len, own.splits.values())) == CATALOGUE[name].sizes
    tests = {path for path, _, _ in content["test"]}
    assert (set(own.test.ids) == tests) is (name in ("oxford_pets", "ucf101"))  # official there, drawn in the others
