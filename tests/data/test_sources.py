"""Datasets from names and paths: what is read, in which order, and what is refused with which sentence."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adaptkit.data.catalogue import CATALOGUE
from adaptkit.data.checks import check_dataset
from adaptkit.data.few_shot import sample_few_shot
from adaptkit.data.sources import (
    from_torch_dataset,
    known_names,
    load_dataset,
    split_sizes,
)
from adaptkit.data.splits import TestSplit, TrainSplit, ValSplit
from adaptkit.data.synthetic import EMBEDDED
from adaptkit.errors import ConfigError, DataError, MissingPathError, StorageError, UnknownNameError
from tests.data.pictures import save_classes, save_picture


@pytest.fixture(autouse=True)
def no_data_root(monkeypatch):
    monkeypatch.delenv("ADAPTKIT_DATA_ROOT", raising=False)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# --- names ---------------------------------------------------------------------------------------------------------


def test_embedded_names_load():
    loaded = [load_dataset(name) for name in EMBEDDED]
    assert len(loaded) == 8
    for name, dataset in zip(EMBEDDED, loaded, strict=True):
        assert dataset.name == name
        assert list(dataset.splits) == ["train", "val", "test"]
        assert dataset.train.image(0).size == (32, 32)
        assert all(count > 0 for split in dataset.splits.values() for count in split.counts())
        assert "embedded" in dataset.notes[0]


def test_seed_changes_drawn_pictures_and_not_digits():
    assert load_dataset("shapes", seed=1).digest != load_dataset("shapes").digest
    assert load_dataset("digits", seed=1).digest == load_dataset("digits").digest


def test_descriptions_follow_display_names():
    dataset = load_dataset("species", display_names={"vorlim": "red_vorlim"})
    assert dataset.class_names[0] == "red vorlim"
    assert dataset.stored_names[0] == "vorlim"
    assert set(dataset.descriptions) == set(dataset.class_names)
    assert dataset.descriptions["red vorlim"][0] == "red vorlim, which has a round body."


def test_known_names():
    names = known_names()
    assert list(names) == sorted(names)
    assert set(names) == set(EMBEDDED) | set(CATALOGUE)
    assert len(CATALOGUE) == 29


@pytest.mark.parametrize(("name", "part"), [("shaps", "'shapes'"), ("eurosta", "'eurosat'"), ("imagnet", "'imagenet'")])
def test_unknown_names(name, part):
    with pytest.raises(UnknownNameError, match=f"Unknown dataset '{name}'") as caught:
        load_dataset(name)
    assert part in str(caught.value)
    assert "CSV" in str(caught.value)


@pytest.mark.parametrize("name", ["./nothing", "nothing.csv", "nothing/split.json"])
def test_missing_paths(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingPathError, match="There is no dataset at"):
        load_dataset(name)


def test_empty_name():
    with pytest.raises(UnknownNameError):
        load_dataset("")


def test_another_kind_of_file(tmp_path):
    with pytest.raises(DataError, match=r"neither a folder, nor a \.csv, nor a \.json"):
        load_dataset(save_picture(tmp_path / "one.png"))


def test_importing_loads_no_torch():
    code = "import sys, adaptkit.data.sources; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- templates and display names -----------------------------------------------------------------------------------


def test_templates_given_first(tmp_path):
    assert load_dataset("digits").templates == ("a photo of the digit {}.",)
    assert load_dataset("digits", templates="{}!").templates == ("{}!",)
    folder = save_classes(tmp_path / "own", {"a": 4, "b": 4})
    assert load_dataset(folder).templates == ("a photo of a {}.",)
    assert load_dataset(folder, templates=["{}.", "one {}."]).templates == ("{}.", "one {}.")
    with pytest.raises(ConfigError):
        load_dataset(folder, templates="no place")


def test_display_names(tmp_path):
    folder = save_classes(tmp_path / "own", {"n01_cat": 4, "n02": 4})
    assert load_dataset(folder).class_names == ("n01 cat", "n02")
    dataset = load_dataset(folder, display_names={"n02": "dog"})
    assert dataset.class_names == ("n01 cat", "dog")
    assert dataset.train.class_names == dataset.test.class_names == dataset.class_names
    assert dataset.stored_names == ("n01_cat", "n02")
    file = write(tmp_path / "names.json", json.dumps({"n01_cat": "house_cat"}))
    assert load_dataset(folder, display_names=file).class_names == ("house cat", "n02")
    assert load_dataset(folder, display_names=str(file)).class_names == ("house cat", "n02")


@pytest.mark.parametrize(
    ("names", "part"),
    [
        ({"n03": "x"}, "n03"),
        ({"b": "a"}, "twice"),
        ({"b": " "}, "empty"),
        ({"b": 3}, "both texts"),
        ([1], "both texts"),
    ],
)
def test_refused_display_names(names, part, tmp_path):
    folder = save_classes(tmp_path / "own", {"a": 4, "b": 4})
    with pytest.raises(DataError, match=part):
        load_dataset(folder, display_names=write(tmp_path / "names.json", json.dumps(names)))


def test_folders_that_read_alike(tmp_path):
    with pytest.raises(DataError, match="twice"):
        load_dataset(save_classes(tmp_path / "own", {"big_cat": 4, "big cat": 4}))


# --- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_folder_with_splits(val, tmp_path):
    save_classes(tmp_path / "train", {"b": 3, "a": 2, "C": 1})
    save_classes(tmp_path / val, {"a": 1, "b": 2})
    save_classes(tmp_path / "test", {"a": 2, "b": 1, "C": 3})
    dataset = load_dataset(tmp_path)
    assert dataset.name == tmp_path.name
    assert dataset.class_names == ("C", "a", "b")
    assert (type(dataset.train), type(dataset.val), type(dataset.test)) == (TrainSplit, ValSplit, TestSplit)
    b = [f"train/b/{index:03d}.png" for index in range(3)]
    assert dataset.train.ids == ("train/C/000.png", "train/a/000.png", "train/a/001.png", *b)
    assert dataset.train.labels.tolist() == [0, 1, 1, 2, 2, 2]
    assert dataset.val.counts() == [0, 1, 2]
    assert dataset.val.ids[0] == f"{val}/a/000.png"
    assert dataset.test.counts() == [3, 2, 1]
    assert dataset.notes == ()
    assert dataset.test.path(0) == tmp_path / "test/C/000.png"
    wanted = np.asarray(Image.open(tmp_path / "test/b/000.png"))
    assert np.array_equal(np.asarray(dataset.test.image(5)), wanted)


def test_folder_without_val(tmp_path):
    save_classes(tmp_path / "train", {"a": 2, "b": 2})
    save_classes(tmp_path / "test", {"a": 1})
    dataset = load_dataset(str(tmp_path))
    assert dataset.val is None
    assert list(dataset.splits) == ["train", "test"]
    assert dataset.notes == ("1 of 2 classes without test images",)


def test_folder_without_test(tmp_path):
    save_classes(tmp_path / "train", {"a": 2, "b": 2})
    save_classes(tmp_path / "val", {"a": 1, "b": 1})
    dataset = load_dataset(tmp_path)
    assert list(dataset.splits) == ["train", "val"]
    assert len(dataset.test) == 0
    assert dataset.notes == ("there are no test images",)


def test_train_can_be_a_class(tmp_path):
    dataset = load_dataset(save_classes(tmp_path / "vehicles", {"bus": 10, "car": 10, "train": 10}))
    assert dataset.class_names == ("bus", "car", "train")


def test_hidden_and_other_files_are_left_out(tmp_path):
    folder = save_classes(tmp_path / "own", {"a": 10, "b": 10})
    save_picture(folder / "a" / ".hidden.png")
    save_classes(folder, {".thumbnails": 1, "__MACOSX": 1})
    write(folder / "a" / "notes.txt", "no image")
    write(folder / "README.md", "no image")
    shutil.move(folder / "b" / "000.png", folder / "b" / "000.PNG")
    save_picture(folder / "b" / "more" / "x.png")
    dataset = load_dataset(folder)
    assert dataset.class_names == ("a", "b")
    assert sum(map(len, dataset.splits.values())) == 20
    assert any("1 file without the suffix" in note for note in dataset.notes)
    assert any("sub-folders inside 1 class" in note for note in dataset.notes)


def test_own_split_of_a_folder(tmp_path):
    folder = save_classes(tmp_path / "own", {"b": 10, "a": 25})
    dataset = load_dataset(folder)
    assert [split.counts() for split in dataset.splits.values()] == [[12, 5], [5, 2], [8, 3]]
    assert "own split, not comparable with published ones" in dataset.notes[0]
    assert dataset.source["split_seed"] == 0
    everything = [name for split in dataset.splits.values() for name in split.ids]
    assert len(set(everything)) == len(everything) == 35
    order = list(range(10))
    random.Random("0/b").shuffle(order)
    assert dataset.train.ids[12:] == tuple(f"b/{position:03d}.png" for position in sorted(order[:5]))
    assert dataset.val.ids[5:] == tuple(f"b/{position:03d}.png" for position in sorted(order[5:7]))
    assert load_dataset(folder).digest == dataset.digest
    assert load_dataset(folder, seed=1).digest != dataset.digest


def test_a_class_keeps_its_split(tmp_path):
    folder = save_classes(tmp_path / "own", {"b": 10, "c": 10})
    before = {name for name in load_dataset(folder).train.ids if name.startswith("c/")}
    save_classes(folder, {"a": 7})
    assert {name for name in load_dataset(folder).train.ids if name.startswith("c/")} == before


def test_split_sizes_by_hand():
    wanted = {
        1: (1, 0, 0), 2: (1, 0, 1), 3: (2, 0, 1), 4: (2, 1, 1), 5: (2, 1, 2), 6: (3, 1, 2), 7: (4, 1, 2), 9: (4, 2, 3),
        10: (5, 2, 3), 15: (8, 3, 4), 25: (12, 5, 8), 100: (50, 20, 30),
    }  # fmt: skip
    assert {count: split_sizes(count) for count in wanted} == wanted


def test_split_sizes_hold_for_every_count():
    checked = 0
    for count in range(1, 120):
        for shots in (None, 1, 2, 4, 8, 16):
            train, val, test = split_sizes(count, shots)
            assert train + val + test == count
            assert train >= 1
            assert min(val, test) >= 0
            assert count == 1 or test >= 1
            assert shots is None or count <= shots or train >= shots
            assert shots is None or count > shots or split_sizes(count) == (train, val, test)
            checked += 1
    assert checked == 714
    assert split_sizes(6, 4) == (4, 0, 2)
    assert split_sizes(5, 4) == (4, 0, 1)
    assert split_sizes(30, 16) == (16, 5, 9)


def test_few_images_and_shots(tmp_path):
    folder = save_classes(tmp_path / "own", {"a": 6, "b": 7, "c": 40})
    with pytest.raises(DataError, match="fewer training images"):
        sample_few_shot(load_dataset(folder).train, None, 4, 1)
    dataset = load_dataset(folder, shots=4)
    assert dataset.train.counts() == [4, 4, 20]
    assert all(count >= 2 for count in dataset.test.counts())
    assert "1 class too small for 4 shots" in dataset.notes[1]
    few = sample_few_shot(dataset.train, dataset.val, 4, 1)
    assert len(few.train_indices) == 12
    assert len(load_dataset(folder, shots=2).notes) == 1


def test_four_images_per_class(tmp_path):
    folder = save_classes(tmp_path / "own", {"a": 4, "b": 4})
    dataset = load_dataset(folder)
    assert [split.counts() for split in dataset.splits.values()] == [[2, 2], [1, 1], [1, 1]]
    assert load_dataset(folder, shots=4).digest == dataset.digest  # nothing would be left to test on


def test_refused_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no class folders \(it is empty\)"):
        load_dataset(tmp_path / "empty")
    save_picture(tmp_path / "flat" / "a.png")
    with pytest.raises(DataError, match="it holds 1 image in none"):
        load_dataset(tmp_path / "flat")
    (save_classes(tmp_path / "gap", {"a": 2}) / "b").mkdir()
    with pytest.raises(DataError, match=r"class folder .*b has no images"):
        load_dataset(tmp_path / "gap")
    save_classes(tmp_path / "one" / "train", {"a": 2})
    with pytest.raises(DataError, match="splits are called train, val and test"):
        load_dataset(tmp_path / "one")


def test_refused_folders_with_splits(tmp_path):
    save_classes(tmp_path / "new" / "train", {"a": 2})
    save_classes(tmp_path / "new" / "test", {"a": 2, "z": 2})
    with pytest.raises(DataError, match=r"1 class that train/ hasn't \(z\)"):
        load_dataset(tmp_path / "new")
    save_classes(tmp_path / "two" / "train", {"a": 2})
    save_classes(tmp_path / "two" / "val", {"a": 2})
    save_classes(tmp_path / "two" / "valid", {"a": 2})
    with pytest.raises(DataError, match="two folders of val images, val/ and valid/"):
        load_dataset(tmp_path / "two")
    save_classes(tmp_path / "bare" / "train", {"a": 2})
    (tmp_path / "bare" / "test").mkdir()
    with pytest.raises(DataError, match="has no class folders"):
        load_dataset(tmp_path / "bare")


def test_a_folder_that_holds_a_split_file(tmp_path):
    save_classes(tmp_path / "eurosat" / "2750", {"River": 2})
    write(tmp_path / "eurosat" / "split_zhou_EuroSAT.json", "{}")
    with pytest.raises(DataError, match=r"give that file as the dataset"):
        load_dataset(tmp_path / "eurosat")


def test_own_links_in_a_folder_are_followed(tmp_path):
    elsewhere = save_classes(tmp_path / "elsewhere", {"a": 4})
    folder = save_classes(tmp_path / "own", {"b": 4})
    (folder / "a").symlink_to(elsewhere / "a")
    dataset = load_dataset(folder)
    assert dataset.class_names == ("a", "b")
    assert dataset.train.image(0).size == (8, 6)


# --- CSV -----------------------------------------------------------------------------------------------------------


def test_csv_with_splits(tmp_path):
    save_classes(tmp_path / "images", {"x": 6})
    rows = ["train,cat", "Train,dog", "validation,cat", "test,dog", "test,cat", "train,cat"]
    lines = [f"images/x/{index:03d}.png,{row.split(',')[1]},{row.split(',')[0]}" for index, row in enumerate(rows)]
    file = write(tmp_path / "pets.csv", "\n".join(["path,class_name,split", *lines, "", ""]))
    dataset = load_dataset(file)
    assert dataset.name == "pets"
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train.ids == ("images/x/000.png", "images/x/001.png", "images/x/005.png")
    assert dataset.train.labels.tolist() == [0, 1, 0]
    assert dataset.val.labels.tolist() == [0]
    assert dataset.test.labels.tolist() == [1, 0]
    assert dataset.notes == ()
    assert check_dataset(dataset).problems == []


def test_csv_without_splits_and_with_an_image_root(tmp_path):
    save_classes(tmp_path / "images", {"x": 20})
    lines = [f"x/{index:03d}.png,{'dog' if index % 2 else 'cat'}" for index in range(20)]
    file = write(tmp_path / "lists" / "pets.csv", "\n".join(["path,label", *lines]))
    dataset = load_dataset(file, image_root=tmp_path / "images")
    assert dataset.class_names == ("cat", "dog")
    assert [split.counts() for split in dataset.splits.values()] == [[5, 5], [2, 2], [3, 3]]
    assert "own split" in dataset.notes[0]
    assert check_dataset(dataset).problems == []
    assert load_dataset(file, image_root=tmp_path / "images", shots=8).train.counts() == [8, 8]
    random.Random(0).shuffle(lines)
    write(file, "\n".join(["path,label", *lines]))
    assert load_dataset(file, image_root=tmp_path / "images").digest == dataset.digest
    with pytest.raises(MissingPathError, match="no image folder"):
        load_dataset(file, image_root=tmp_path / "other")


def test_csv_dialects(tmp_path):
    body = 'a.png;"cat; grey"\nb.png;dog\nc.png;"cat; grey"\nd.png;dog\n'
    file = tmp_path / "excel.csv"
    file.write_bytes(b"\xef\xbb\xbf" + ("Path; Label\n" + body).replace("\n", "\r\n").encode())
    dataset = load_dataset(file)
    assert dataset.class_names == ("cat; grey", "dog")
    assert len(dataset.train) == 2
    tabs = write(tmp_path / "tabs.tsv", "path\tlabel\na, b.png\tcat\nc.png\tdog\n")
    assert load_dataset(tabs).train.ids == ("a, b.png", "c.png")


def test_csv_with_numbers(tmp_path):
    lines = [f"{label}-{index}.png,{label}" for label in (10, 9, 1) for index in range(2)]
    dataset = load_dataset(write(tmp_path / "n.csv", "\n".join(["path,label", *lines])))
    assert dataset.class_names == ("1", "9", "10")
    assert any("give display names" in note for note in dataset.notes)
    lines = [f"{label}-{index}.png,{label},{name}" for label, name in ((1, "ant"), (0, "wasp")) for index in range(2)]
    dataset = load_dataset(write(tmp_path / "m.csv", "\n".join(["path,label,class_name", *lines])))
    assert dataset.class_names == ("wasp", "ant")
    assert dataset.train.ids[0].startswith("0-")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "header nothing"),
        ("a.png,cat\nb.png,dog\n", "is needed"),
        ("path,kind\na.png,cat\n", "is needed"),
        ("path,label,label\na.png,cat,dog\n", "is needed"),
        ("path,label\n", "no rows"),
        ("path,label\na.png\n", "line 2 has 1 cells"),
        ("path,label\n/etc/passwd,cat\n", "is absolute"),
        ("path,label\n../up.png,cat\n", r"line 2 isn't accepted .*\.\."),
        ("path,label\na.png,\n", "line 2 has no class"),
        ("path,label,split\na.png,cat,training\n", "'training'; train, val and test"),
        ("path,label,split\na.png,cat,test\n", "train has no images"),
        ("path,label,split\na.png,cat,train\nb.png,dog,test\n", r"no images of 1 class \(dog\)"),
        ("path,label\na.png,cat\na.png,dog\n", "second label"),
        ("path,label,class_name\na.png,0,cat\nb.png,0,dog\n", "calls label 0 'dog'"),
        ("path,label,class_name\na.png,0,cat\nb.png,2,dog\n", "without 1"),
        ("path,label,class_name\na.png,x,cat\n", "not a whole number"),
        ('path,label\n"a.png,cat\n', "isn't a readable CSV"),
    ],
)
def test_refused_csv(text, part, tmp_path):
    with pytest.raises(DataError, match=part):
        load_dataset(write(tmp_path / "list.csv", text))


def test_csv_that_is_not_utf8(tmp_path):
    (tmp_path / "list.csv").write_bytes("path,label\na.png,Häher\n".encode("latin-1"))
    with pytest.raises(DataError, match="isn't UTF-8"):
        load_dataset(tmp_path / "list.csv")


# --- split_zhou JSON -----------------------------------------------------------------------------------------------

GOOD = {
    "train": [["b/2.png", 1, "big_dog"], ["a/1.png", 0, "cat"], ["b/1.png", 1, "big_dog"]],
    "val": [],
    "test": [["a/3.png", 0, "cat"], ["b/3.png", 1, "big_dog"]],
}


def test_json_keeps_its_order(tmp_path):
    dataset = load_dataset(write(tmp_path / "own.json", json.dumps(GOOD)))
    assert dataset.name == "own"
    assert dataset.class_names == ("cat", "big dog")
    assert dataset.stored_names == ("cat", "big_dog")
    assert dataset.val is None
    assert dataset.train.ids == ("b/2.png", "a/1.png", "b/1.png")
    assert dataset.train.labels.tolist() == [1, 0, 1]
    assert dataset.train.path(1) == tmp_path / "a/1.png"
    same = write(tmp_path / "pretty.json", json.dumps(GOOD, indent=4))
    assert load_dataset(same).digest == dataset.digest


def change(split, index, entry):
    content = json.loads(json.dumps(GOOD))
    content[split][index] = entry
    return content


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([], "holds list"),
        ({}, "holds nothing"),
        ({"train": []}, "exactly 'train', 'val' and 'test'"),
        ({**GOOD, "extra": []}, "exactly"),
        ({**GOOD, "val": {}}, "val is a dict"),
        ({**GOOD, "train": []}, "train has no images"),
        (change("train", 1, ["a/1.png", 0]), r"train\[1\] isn't \[path, label, class name\]"),
        (change("train", 1, "a/1.png"), r"train\[1\] isn't"),
        (change("train", 1, [3, 0, "cat"]), "the path 3"),
        (change("train", 1, ["/a/1.png", 0, "cat"]), "is absolute"),
        (change("train", 1, ["a/../../1.png", 0, "cat"]), "leaves its folder"),
        (change("train", 1, ["a\\1.png", 0, "cat"]), "backslash"),
        (change("train", 1, ["a/1.png", "0", "cat"]), "label '0'"),
        (change("train", 1, ["a/1.png", True, "cat"]), "label True"),
        (change("train", 1, ["a/1.png", -1, "cat"]), "label -1"),
        (change("train", 1, ["a/1.png", 0.0, "cat"]), "label 0.0"),
        (change("train", 1, ["a/1.png", 0, ""]), "class name ''"),
        (change("train", 1, ["a/1.png", 0, None]), "class name None"),
        (change("train", 1, ["a/1.png", 0, "dog"]), r"test\[0\] calls label 0 'cat', and an earlier one 'dog'"),
        (change("train", 1, ["a/1.png", 3, "cow"]), "without 2"),
        (change("train", 1, ["b/9.png", 1, "big_dog"]), r"no images of 1 class \(cat\)"),
        (change("test", 0, ["b/1.png", 0, "cat"]), "second label"),
        (change("test", 0, ["a/3.png", 0, "big_dog"]), "1 problem: "),
    ],
)
def test_refused_json(content, part, tmp_path):
    with pytest.raises(DataError, match=part):
        load_dataset(write(tmp_path / "own.json", json.dumps(content)))


def test_two_labels_with_one_name(tmp_path):
    with pytest.raises(DataError, match="twice"):
        load_dataset(
            write(
                tmp_path / "own.json",
                json.dumps(change("train", 1, ["a/1.png", 0, "big dog"])).replace("cat", "big dog"),
            )
        )


def test_json_that_is_not_json(tmp_path):
    with pytest.raises(StorageError, match="isn't valid JSON"):
        load_dataset(write(tmp_path / "own.json", "{"))


def test_images_in_two_splits_are_noted_and_reported(tmp_path):
    content = {**GOOD, "test": [*GOOD["test"], ["a/1.png", 0, "cat"]]}
    dataset = load_dataset(write(tmp_path / "own.json", json.dumps(content)))
    assert "more than one split" in dataset.notes[0]
    report = check_dataset(dataset, images=False)
    assert report.duplicates == [("a/1.png", ("train", "test"))]
    assert any("1 image in more than one split" in problem for problem in report.problems)


def test_a_link_out_of_the_image_folder_is_refused(tmp_path):
    save_picture(tmp_path / "secret" / "1.png")
    write(tmp_path / "data" / "own.json", json.dumps(GOOD))
    (tmp_path / "data" / "a").symlink_to(tmp_path / "secret")
    dataset = load_dataset(tmp_path / "data" / "own.json")
    with pytest.raises(StorageError, match="through a link"):
        dataset.train.image(1)
    report = check_dataset(dataset)
    assert [name for name, _ in report.corrupt] == ["a/1.png", "a/3.png"]


# --- CoOp's layout -------------------------------------------------------------------------------------------------


def coop_tree(root: Path, name: str = "eurosat") -> Path:
    """A tiny data root in CoOp's layout."""
    known = CATALOGUE[name]
    for split in GOOD:
        for path, _, _ in GOOD[split]:
            save_picture(root / known.layouts[0].image_path / path)
    write(root / known.layouts[0].folder / known.json, json.dumps(GOOD))
    return root


WITH_SPLIT_FILE = sorted(name for name, known in CATALOGUE.items() if known.json)


def test_nine_have_a_split_file():
    assert len(WITH_SPLIT_FILE) == 9


@pytest.mark.parametrize("name", WITH_SPLIT_FILE)
def test_registry_names(name, tmp_path, monkeypatch):
    dataset = load_dataset(name, data_root=coop_tree(tmp_path, name))
    assert dataset.name == name
    assert check_dataset(dataset).problems == []
    monkeypatch.setenv("ADAPTKIT_DATA_ROOT", str(tmp_path))
    assert load_dataset(name).digest == dataset.digest
    file = tmp_path / CATALOGUE[name].layouts[0].folder / CATALOGUE[name].json
    assert load_dataset(file).templates == dataset.templates


def test_a_changed_split_file_is_noted(tmp_path):
    assert "isn't the published file" in load_dataset("eurosat", data_root=coop_tree(tmp_path)).notes[0]


def test_registry_templates(tmp_path):
    root = coop_tree(tmp_path)
    assert load_dataset("eurosat", data_root=root).templates == ("a centered satellite photo of {}.",)
    assert load_dataset("eurosat", data_root=root, templates="{}.").templates == ("{}.",)


def test_registry_names_without_data(tmp_path):
    with pytest.raises(MissingPathError, match=r"ADAPTKIT_DATA_ROOT.*eurosat/split_zhou_EuroSAT\.json.*eurosat/2750/"):
        load_dataset("eurosat")
    with pytest.raises(MissingPathError, match=r"There is no .*split_zhou_EuroSAT\.json: .*eurosat/2750/"):
        load_dataset("eurosat", data_root=tmp_path)
    shutil.rmtree(coop_tree(tmp_path) / "eurosat" / "2750")
    with pytest.raises(MissingPathError, match=r"There is no .*2750"):
        load_dataset("eurosat", data_root=tmp_path)


def test_where_the_images_of_a_json_are_looked_for(tmp_path):
    root = coop_tree(tmp_path / "root")
    file = root / "eurosat" / "split_zhou_EuroSAT.json"
    inside = load_dataset(file)
    assert inside.name == "eurosat"
    assert inside.train.path(0) == root / "eurosat/2750/b/2.png"
    alone = Path(shutil.copy(file, tmp_path))
    assert load_dataset(alone).train.path(0) == tmp_path / "b/2.png"
    assert check_dataset(load_dataset(alone, data_root=root)).problems == []
    assert check_dataset(load_dataset(alone, image_root=root / "eurosat/2750")).problems == []
    assert len(check_dataset(load_dataset(alone)).missing) == 5


# --- torch datasets ------------------------------------------------------------------------------------------------


class Memory:
    """A torch-style dataset."""

    classes = ("ant", "bee_fly")

    def __init__(self, labels, targets=True):
        self.labels = labels
        if targets:
            self.targets = labels
        self.read = 0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.read += 1
        return Image.new("L", (4, 4), 10 * index), self.labels[index]


def test_torch_dataset():
    train = Memory([0, 1, 0])
    dataset = from_torch_dataset(train, test=Memory([1, 0]), name="insects")
    assert dataset.name == "insects"
    assert dataset.class_names == ("ant", "bee fly")
    assert dataset.train.labels.tolist() == [0, 1, 0]
    assert train.read == 0
    assert dataset.val is None
    assert dataset.test.image(1).getpixel((0, 0)) == (10, 10, 10)
    assert len(dataset.digest) == 64
    assert check_dataset(dataset).problems == []


def test_torch_dataset_without_targets_and_with_val():
    train = Memory([0, 1], targets=False)
    dataset = from_torch_dataset(train, val=Memory([1]), templates="{}.")
    assert train.read == 2
    assert dataset.train.labels.tolist() == [0, 1]
    assert dataset.val.labels.tolist() == [1]
    assert len(dataset.test) == 0
    assert dataset.notes == ("there are no test images",)


def test_real_torch_datasets(tmp_path):
    torch = pytest.importorskip("torch")
    datasets = pytest.importorskip("torchvision.datasets")
    folder = datasets.ImageFolder(str(save_classes(tmp_path, {"a": 3, "b": 2})))
    dataset = from_torch_dataset(folder, test=torch.utils.data.Subset(folder, [4, 0]))
    assert dataset.train.counts() == [3, 2]
    assert dataset.test.labels.tolist() == [1, 0]
    tensors = torch.utils.data.TensorDataset(torch.rand(3, 3, 5, 7), torch.tensor([0, 1, 1]))
    assert from_torch_dataset(tensors, classes=["x", "y"]).train.image(0).size == (7, 5)
    with pytest.raises(DataError, match=r"no class names in `\.classes`"):
        from_torch_dataset(tensors)


def test_refused_torch_datasets():
    other = Memory([0])
    other.classes = ("ant", "wasp")
    with pytest.raises(DataError, match="other classes"):
        from_torch_dataset(Memory([0, 1]), test=other)
    with pytest.raises(DataError, match="0 to 1 is accepted"):
        from_torch_dataset(Memory([1, 2]))
    with pytest.raises(DataError, match="aren't whole numbers"):
        from_torch_dataset(Memory(["ant", "bee"]))
