"""Typed splits, image sources and digests."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest
from PIL import Image

from adaptkit.data.splits import (
    ArraySource,
    Dataset,
    FileSource,
    TestSplit,
    TorchSource,
    TrainSplit,
    ValSplit,
    check_class_names,
    require_split,
)
from adaptkit.errors import DataError, MissingPathError, StorageError
from tests.data.pictures import make_split, make_test, make_train, make_val, save_picture


def random_arrays(n=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 5, 6, 3), dtype=np.uint8)


def array_split(kind=TrainSplit, labels=(0, 1, 0, 1), seed=0):
    source = ArraySource(random_arrays(len(labels), seed))
    ids = tuple(f"{index}" for index in range(len(labels)))
    return kind(ids, np.array(labels), ("a", "b"), source, np.arange(len(labels)))


# --- splits --------------------------------------------------------------------------------------------------------


def test_subset_keeps_type_order_and_images():
    split = array_split(ValSplit)
    part = split.subset([3, 0])
    assert isinstance(part, ValSplit)
    assert part.ids == ("3", "0")
    assert part.labels.tolist() == [1, 0]
    assert part.labels.dtype == np.int64
    assert np.array_equal(np.asarray(part.image(0)), split.source.arrays[3])
    assert len(part.images([1, 0, 1])) == 3
    assert len(split.subset([])) == 0


def test_counts_include_empty_classes():
    assert make_train([0, 2, 2], 4).counts() == [1, 0, 2, 0]


@pytest.mark.parametrize(
    ("labels", "ids", "part"),
    [([0, 2], ("x", "y"), "0 to 1 is accepted"), ([-1, 0], ("x", "y"), "-1"), ([0], ("x", "y"), "2 names, 1 labels")],
)
def test_refused_splits(labels, ids, part):
    with pytest.raises(DataError, match=part):
        TrainSplit(ids, np.array(labels), ("a", "b"), ArraySource(random_arrays()), np.arange(2))


def test_require_split():
    val = make_val([0, 1])
    assert require_split(val, ValSplit, "Choosing settings") is val
    with pytest.raises(DataError, match="Choosing settings takes a val split, and was given the test split"):
        require_split(make_test([0, 1]), ValSplit, "Choosing settings")
    for kind in (TrainSplit, ValSplit, TestSplit):
        others = {TrainSplit, ValSplit, TestSplit} - {kind}
        assert len(others) == 2
        for other in others:
            with pytest.raises(DataError):
                require_split(make_split(kind, [0]), other, "This")


def test_paths_digest_is_of_newline_joined_ids():
    assert array_split().paths_digest == hashlib.sha256(b"0\n1\n2\n3").hexdigest()
    assert array_split().subset([1, 0]).paths_digest != array_split().subset([0, 1]).paths_digest


def test_digest_follows_labels_names_order_and_pixels():
    split = array_split()
    others = [
        array_split(labels=(0, 1, 1, 1)),
        array_split(seed=1),
        split.subset([1, 0, 2, 3]),
        split.subset([0, 1, 2]),
    ]
    digests = {split.digest, *(other.digest for other in others)}
    assert len(digests) == 5
    assert array_split().digest == split.digest
    assert array_split(ValSplit).digest == split.digest


def test_digest_of_files_does_not_depend_on_the_place(tmp_path):
    digests = set()
    for folder in ("one", "two"):
        save_picture(tmp_path / folder / "a.png")
        source = FileSource(tmp_path / folder, ["a.png"])
        digests.add(TrainSplit(("a.png",), np.array([0]), ("a",), source, np.array([0])).digest)
    assert len(digests) == 1


def test_names_that_are_not_utf8():
    split = TrainSplit(("\udce9.png",), np.array([0]), ("a",), ArraySource(random_arrays(1)), np.array([0]))
    assert len(split.digest) == len(split.paths_digest) == 64


# --- sources -------------------------------------------------------------------------------------------------------


def test_file_source(tmp_path):
    save_picture(tmp_path / "a" / "1.png", seed=1)
    source = FileSource(tmp_path, ["a/1.png", "a/2.png"])
    assert source.open(0).mode == "RGB"
    assert source.path(0) == tmp_path / "a" / "1.png"
    assert source.content_digest(0) is None
    before = source.content_key(0)
    assert source.content_key(0) == before
    os.utime(tmp_path / "a" / "1.png", ns=(1, 1))
    assert source.content_key(0) != before
    for use in (source.open, source.content_key):
        with pytest.raises(MissingPathError, match=r"2\.png"):
            use(1)


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.png", "a/../../b.png", "", "a\\b.png", "C:/a.png", "~/a.png"])
def test_file_source_refuses_other_places(name, tmp_path):
    with pytest.raises(StorageError):
        FileSource(tmp_path, [name])


def test_file_source_and_links(tmp_path):
    save_picture(tmp_path / "outside.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(StorageError, match="through a link"):
        FileSource(tmp_path / "data", ["a.png"]).open(0)
    assert FileSource(tmp_path / "data", ["a.png"], trusted=True).open(0).mode == "RGB"


def test_array_source():
    arrays = random_arrays()
    source = ArraySource(arrays)
    assert np.array_equal(np.asarray(source.open(2)), arrays[2])
    assert source.path(0) is None
    assert source.content_key(0) != source.content_key(1)
    assert source.pool == ArraySource(arrays.copy()).pool
    assert source.pool != ArraySource(random_arrays(seed=1)).pool


@pytest.mark.parametrize("arrays", [np.zeros((2, 3, 3), np.uint8), np.zeros((2, 3, 3, 3), np.float32)])
def test_refused_arrays(arrays):
    with pytest.raises(DataError, match="uint8"):
        ArraySource(arrays)


def test_torch_source():
    items = [
        (Image.new("RGBA", (3, 2), (255, 0, 0, 0)), 0),
        (np.full((3, 2, 5), 0.5), 1),
        (np.full((2, 5), 7, np.uint8), 1),
    ]
    source = TorchSource(items, "things")
    assert source.pool == "torch:things"
    assert np.asarray(source.open(1)).shape == (2, 5, 3)
    assert np.unique(np.asarray(source.open(1))).tolist() == [128]
    assert np.unique(np.asarray(source.open(2))).tolist() == [7]
    assert len({source.content_key(index) for index in range(3)}) == 3
    with pytest.raises(DataError, match="aren't normalised"):
        TorchSource([(np.full((3, 2, 2), -1.0), 0)], "normalised").open(0)


# --- datasets ------------------------------------------------------------------------------------------------------


def test_dataset_summary_and_digest():
    train, val, test = array_split(), array_split(ValSplit), array_split(TestSplit)
    dataset = Dataset("things", ("a", "b"), train, val, test, source={"kind": "memory"}, notes=("own",))
    assert list(dataset.splits) == ["train", "val", "test"]
    summary = dataset.summary()
    assert summary["images"] == {"train": 4, "val": 4, "test": 4}
    assert (summary["name"], summary["classes"], summary["notes"]) == ("things", 2, ["own"])
    assert summary["split_digest"] == dataset.digest
    assert Dataset("other name", ("a", "b"), train, val, test).digest == dataset.digest
    assert Dataset("things", ("a", "c"), train, val, test).digest != dataset.digest
    assert Dataset("things", ("a", "b"), train, None, test).digest != dataset.digest
    assert list(Dataset("things", ("a", "b"), train, None, test.subset([])).splits) == ["train"]


@pytest.mark.parametrize(
    ("names", "part"), [([], "no classes"), (["a", " "], "empty"), (["a", "b", "a"], r"twice \(a\)")]
)
def test_refused_class_names(names, part):
    with pytest.raises(DataError, match=part):
        check_class_names(names, "this")
    check_class_names(["a", "A"], "this")
