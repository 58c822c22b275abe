"""Few-shot lists: the same images again, and refusal where the data is another."""

from __future__ import annotations

import json
import shutil

import pytest

from adaptkit.data.catalogue import CATALOGUE
from adaptkit.data.few_shot import SAMPLER_VERSION, sample_few_shot
from adaptkit.data.shot_lists import is_shot_list, lists_digest, read_shot_list, shot_list, write_shot_list
from adaptkit.data.sources import load_dataset
from adaptkit.errors import DataError, MissingPathError
from tests.data.pictures import save_picture
from tests.data.trees import grow


@pytest.fixture
def root(tmp_path):
    return grow(tmp_path / "data", CATALOGUE["imagenet"], per_class=8)


@pytest.fixture
def made(root, tmp_path):
    """ImageNet's tiny tree, a draw, and its list in a file."""
    dataset = load_dataset("imagenet", data_root=root)
    few = sample_few_shot(dataset.train, dataset.val, 4, 1)
    write_shot_list(tmp_path / "list.json", shot_list(dataset, "imagenet", few))
    return dataset, few, tmp_path / "list.json"


def test_a_list_gives_the_draw_again(made, root):
    dataset, few, path = made
    again = load_dataset(path, data_root=root)
    assert again.name == "imagenet"
    assert again.train.paths_digest == few.train_digest
    assert again.train.counts() == [4, 4, 4]
    assert again.val is None
    assert again.test.digest == dataset.test.digest
    assert again.stored_names == dataset.stored_names
    assert again.notes[-1] == "few-shot list list.json: drawn by coop, 4 shots, seed 1"
    drawn = sample_few_shot(again.train, again.val, 4, 3)
    assert sorted(again.train.ids) == sorted(again.train.subset(drawn.train_indices).ids)


def test_a_list_is_portable_and_says_how_it_was_made(made, root, tmp_path):
    _, few, path = made
    content = json.loads(path.read_text())
    facts = {
        key: content[key] for key in ("format", "version", "dataset", "sampler", "sampler_version", "shots", "seed")
    }
    assert facts == {
        "format": "adaptkit few-shot list", "version": 1, "dataset": "imagenet", "sampler": "coop",
        "sampler_version": SAMPLER_VERSION, "shots": 4, "seed": 1,
    }  # fmt: skip
    assert content["train"][0] == ["train/" + few_path(content), 0]
    assert str(root) not in path.read_text()
    moved = tmp_path / "elsewhere"
    layout = CATALOGUE["imagenet"].layouts[3]
    shutil.copytree(root / "imagenet/images", moved / layout.folder)
    shutil.copy(root / "imagenet/classnames.txt", moved)
    assert load_dataset(path, data_root=moved).train.paths_digest == few.train_digest


def few_path(content):
    return content["train"][0][0].removeprefix("train/")


def test_file_names_are_drawn_sorted(made, root):
    dataset, _, _ = made
    by_class = [path.split("/")[1:] for path in dataset.train.ids]
    assert by_class == sorted(by_class)


def test_with_validation_images_and_an_own_split(tmp_path):
    root = grow(tmp_path / "data", CATALOGUE["dtd"], per_class=20)
    dataset = load_dataset("dtd", data_root=root, own_split=True)
    few = sample_few_shot(dataset.train, dataset.val, 3, 2)
    write_shot_list(tmp_path / "list.json", shot_list(dataset, "dtd", few))
    again = load_dataset(tmp_path / "list.json", data_root=root)
    assert (again.train.paths_digest, again.val.paths_digest) == (few.train_digest, few.val_digest)
    assert again.source["split"] == "own"
    assert "own split" in again.notes[0]
    shown = load_dataset(tmp_path / "list.json", data_root=root, display_names={"banded": "stripes"}, templates="{}.")
    assert shown.class_names[0] == "stripes"
    assert shown.templates == ("{}.",)


def test_another_split_is_refused(made, root):
    _, _, path = made
    save_picture(root / "imagenet/images/train/n01440764/added.JPEG")
    with pytest.raises(DataError, match="made for another split of imagenet"):
        load_dataset(path, data_root=root)


def test_other_classes_are_refused(made, root):
    _, _, path = made
    save_picture(root / "imagenet/images/train/n01440765/added.JPEG")
    (root / "imagenet/classnames.txt").write_text("n01440764 a\nn01440765 b\nn03773504 c\nn04008634 d\n")
    with pytest.raises(DataError, match="made for other classes"):
        load_dataset(path, data_root=root)


def test_no_data(made):
    with pytest.raises(MissingPathError, match="imagenet needs a data root"):
        load_dataset(made[2])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2; 1 is accepted"),
        ({"shots": "4", "seed": True}, "2 problems: shots is missing or isn't a int; seed is missing"),
        ({"train": []}, "train has no images"),
        ({"train": [["a"], ["b", "c"], 3]}, r"3 problems: train\[0\] isn't \[path, label\]"),
        ({"train": [["train/n01440764/no.JPEG", 0]]}, "lists 1 image not among the train images"),
        ({"train": [["../../etc/passwd", 0]]}, "not among the train images"),
        ({"val": [["train/n01440764/no.JPEG", 0]]}, "not among the val images"),
        ({"split_digest": "0"}, "another split"),
        ({"dataset": "imagnet"}, "Unknown dataset"),
    ],
)
def test_damaged_lists(made, root, change, said):
    path = made[2]
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((DataError, LookupError), match=said):
        load_dataset(path, data_root=root)


def test_a_wrong_label(made, root):
    path = made[2]
    content = json.loads(path.read_text())
    content["train"][0][1] = 2
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="gives 1 image another class than imagenet does"):
        load_dataset(path, data_root=root)


def test_a_list_of_a_list_is_refused(made, root):
    path = made[2]
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"dataset": str(path)}))
    with pytest.raises(DataError, match="names another few-shot list"):
        load_dataset(path, data_root=root)


def test_what_is_no_list(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    assert not is_shot_list(tmp_path / "x.json")
    assert not is_shot_list(tmp_path / "none.json")
    with pytest.raises(DataError, match="isn't a few-shot list"):
        read_shot_list(tmp_path / "x.json")


def test_display_names_do_not_change_the_digest(tmp_path):
    root = grow(tmp_path, CATALOGUE["dtd"])
    plain = load_dataset("dtd", data_root=root)
    named = load_dataset("dtd", data_root=root, display_names={"ant": "bee"})
    assert lists_digest(plain) == lists_digest(named)
    assert plain.digest != named.digest
