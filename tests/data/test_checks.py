"""What `check_dataset` reports, and which images are left out on request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptkit.data.checks import check_dataset, drop_unreadable
from adaptkit.data.sources import load_dataset
from adaptkit.data.splits import TrainSplit
from adaptkit.errors import DataError
from tests.data.pictures import save_classes


def damaged(tmp_path: Path) -> Path:
    """Splits with a truncated training image, a validation image that is none, and a class without test images."""
    save_classes(tmp_path / "train", {"a": 3, "b": 1})
    save_classes(tmp_path / "val", {"a": 2})
    save_classes(tmp_path / "test", {"a": 2})
    cut = tmp_path / "train" / "a" / "001.png"
    cut.write_bytes(cut.read_bytes()[:60])
    (tmp_path / "val" / "a" / "000.png").write_text("no image", encoding="utf-8")
    return tmp_path


def test_report(tmp_path):
    dataset = load_dataset(damaged(tmp_path))
    (tmp_path / "test" / "a" / "001.png").unlink()
    seen = []
    report = check_dataset(dataset, progress=lambda *state: seen.append(state))
    assert report.counts == {"train": {"a": 3, "b": 1}, "val": {"a": 2, "b": 0}, "test": {"a": 2, "b": 0}}
    assert report.missing == [str(tmp_path / "test/a/001.png")]
    assert [Path(path).parent.parent.name for path, _ in report.corrupt] == ["train", "val"]
    assert all(path in sentence for path, sentence in report.corrupt)
    assert report.fewest == [("b", 1), ("a", 3)]
    assert len(report.problems) == 3
    assert "1 class without test images: b" in report.problems[-1]
    assert [done for _, done, _ in seen] == list(range(1, 9))
    assert {total for _, _, total in seen} == {8}
    assert json.loads(json.dumps(report.to_dict()))["counts"]["train"] == {"a": 3, "b": 1}


def test_report_without_opening(tmp_path):
    dataset = load_dataset(damaged(tmp_path))
    report = check_dataset(dataset, images=False)
    assert (report.missing, report.corrupt, report.images_opened) == ([], [], False)


def test_report_on_embedded():
    report = check_dataset(load_dataset("digits"))
    assert report.problems == []
    assert sum(report.counts["train"].values()) == 898
    assert len(report.fewest) == 5


def test_fewest_lists_the_smallest_first(tmp_path):
    counts = {"a": 5, "b": 1, "c": 4, "d": 2, "e": 3, "f": 6}
    save_classes(tmp_path / "train", counts)
    save_classes(tmp_path / "test", dict.fromkeys(counts, 1))
    assert check_dataset(load_dataset(tmp_path)).fewest == [("b", 1), ("d", 2), ("e", 3), ("c", 4), ("a", 5)]


def test_unreadable_images_are_dropped_on_request(tmp_path):
    dataset = load_dataset(damaged(tmp_path))
    train, dropped = drop_unreadable(dataset.train)
    assert isinstance(train, TrainSplit)
    assert train.ids == ("train/a/000.png", "train/a/002.png", "train/b/000.png")
    assert train.labels.tolist() == [0, 0, 1]
    assert [path for path, _ in dropped] == [str(tmp_path / "train/a/001.png")]
    assert "damaged or cut off" in dropped[0][1]
    val, dropped = drop_unreadable(dataset.val)
    assert val.ids == ("val/a/001.png",)
    assert "isn't an image" in dropped[0][1]
    with pytest.raises(DataError, match="would change the score"):
        drop_unreadable(dataset.test)
