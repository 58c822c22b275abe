"""`adaptkit data`: what a check finds, and the stored features by backbone."""

from __future__ import annotations

import json

import pytest


def test_a_check_names_the_splits_and_the_fewest(call, photos):
    (photos / "oak/0.png").unlink()
    report = json.loads(call("data", "check", photos, "--json").stdout)
    assert report["fewest"][0][0] in ("beech", "oak", "pine", "yew")
    assert set(report["counts"]) == {"train", "val", "test"}
    assert sum(counts["oak"] for counts in report["counts"].values()) == 7
    assert report["problems"] == []
    assert report["images_opened"] is True
    assert len(report["split_digest"]) == 64
    shown = call("data", "check", photos).output
    for word in ("train", "val", "test", "oak", "own split"):
        assert word in shown


def test_quick_looks_without_opening(call, refused, photos):
    (photos / "oak/0.png").write_text("no picture")
    (photos / "oak/1.png").write_bytes((photos / "oak/1.png").read_bytes()[:50])
    assert call("data", "check", photos, "--quick").exit_code == 0
    message = refused("data", "check", photos)
    assert "2 images can't be read" in message.replace("\n", " ")
    outcome = call("data", "check", photos, "--json")  # the report is printed all the same
    assert outcome.exit_code == 2
    assert sorted(path.rsplit("/", 1)[-1] for path, _ in json.loads(outcome.stdout)["corrupt"]) == ["0.png", "1.png"]


def test_an_image_in_two_splits_is_a_problem(refused, photos, tmp_path):
    rows = [f"{label}/{i}.png,{label},{split}" for label in ("oak", "yew") for i, split in ((0, "train"), (1, "test"))]
    (photos / "list.csv").write_text("\n".join(["path,label,split", *rows, "oak/0.png,oak,test"]) + "\n")
    message = refused("data", "check", photos / "list.csv").replace("\n", " ")
    assert "list has 1 problem: 1 image in more than one split" in message


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("nowhere.csv", "There is no dataset"),
        ("notes.txt", "neither a folder, nor a .csv"),
        ("bare", "no class folders"),
    ],
)
def test_what_is_no_dataset(refused, tmp_path, path, says):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "bare").mkdir()
    assert says in refused("data", "check", tmp_path / path).replace("\n", " ")


def test_features_of_another_backbone_stay(call, photos, tmp_path):
    outcome = call("run", photos, "--method", "zero-shot", "--shots", 2, "--out", tmp_path / "out")
    assert outcome.exit_code == 0, outcome.output
    stored = json.loads(call("data", "features", "--json").stdout)
    assert stored
    assert json.loads(call("data", "features", "--backbone", "other", "--json").stdout) == []
    assert json.loads(call("data", "features", "--clear", "--backbone", "other", "--json").stdout)["freed_bytes"] == 0
    assert json.loads(call("data", "features", "--json").stdout) == stored
    assert "mini" in call("data", "features").output
    assert "Freed" in call("data", "features", "--clear", "--backbone", "mini").output
    assert list((tmp_path / "cache" / "features").iterdir()) == []
