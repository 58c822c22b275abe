"""`adaptkit run`: every method, what it writes, and what it refuses before any work is done."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
from PIL import Image

from adaptkit import storage
from adaptkit.evaluation.results import read_run
from adaptkit.methods import methods
from tests.cli.conftest import CLASSES
from tests.quick import backbone_words, description_words, quick_overrides


@pytest.mark.parametrize("protocol", ["few-shot", "base-to-novel"])
@pytest.mark.parametrize("method", sorted(methods))
def test_every_method_runs(call, photos, tmp_path, method, protocol):
    out = tmp_path / "out"
    words = ["run", photos, "--method", method, "--shots", 4, "--protocol", protocol, "--out", out, "--json"]
    words += [*description_words(method, CLASSES, tmp_path), *backbone_words(method)]
    outcome = call(*words, *(word for setting in quick_overrides(method) for word in ("--set", setting)))
    assert outcome.exit_code == 0, outcome.output
    printed, result = json.loads(outcome.stdout), read_run(out)
    assert printed["key_digest"] == result.key_digest
    assert [part.name for part in result.parts] == (["all"] if protocol == "few-shot" else ["base", "novel"])
    assert all(sum(total for _, total in part.per_class) == part.total > 0 for part in result.parts)
    assert (result.harmonic_mean is None) == (protocol == "few-shot")
    assert {path.name for path in out.iterdir()} == {"adapter", "predictions.safetensors", "result.json"}


def test_a_table_for_people(call, photos, tmp_path):
    outcome = call("run", photos, "--method", "zero-shot", "--shots", 2, "--out", tmp_path / "out")
    assert outcome.exit_code == 0
    assert "zero-shot" in outcome.output
    assert "accuracy" in outcome.output
    assert f"predict {tmp_path / 'out'}" in outcome.output.replace("\n", "")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "mapel"], "Did you mean 'maple'"),
        (["--method", "coop", "--backbone", "mini2"], "mini"),
        (["--method", "coop", "--recipe", "coop/few-shoot"], "Did you mean"),
        (["--method", "coop", "--set", "num_contxt=4"], "num_context"),
        (["--method", "coop", "--set", "training.epochs=many"], "epochs"),
        (["--method", "coop", "--shots", "7"], "fewer training images than 7 shots"),
        (["--method", "coop", "--template", "a photo"], "{}"),
        (["--method", "coop", "--sampler", "coup"], "Did you mean 'coop'"),
        (["--method", "coop", "--device", "abacus"], "abacus"),
        (["--method", "coop", "--shots", "0"], "0"),
    ],
)
def test_wrong_words_are_refused(refused, photos, tmp_path, words, says):
    (photos / "oak").rename(photos / "ash")
    for index in (5, 6, 7):
        (photos / "ash" / f"{index}.png").unlink()
    message = refused("run", photos, "--out", tmp_path / "out", "--shots", 2, *words)
    assert says in message.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_bad_folders_are_refused(refused, photos, tmp_path):
    out = tmp_path / "out"
    assert "digtis" in refused("run", "digtis", "--method", "zero-shot", "--out", out)
    assert "nowhere" in refused("run", tmp_path / "nowhere", "--method", "zero-shot", "--out", out)
    (photos / "empty").mkdir()
    assert "empty" in refused("run", photos, "--method", "zero-shot", "--shots", 2, "--out", out)
    (photos / "empty").rmdir()
    (photos / "oak" / "3.png").write_text("no picture")
    assert "3.png" in refused("run", photos, "--method", "linear-probe", "--shots", 4, "--out", out).replace("\n", "")
    assert not out.exists()
    assert "one dataset" in refused("run", "--method", "zero-shot")
    assert "one dataset" in refused("run", "digits", "--dataset", "shapes", "--method", "zero-shot")


def test_unreadable_training_images_are_left_out_on_request_and_counted(call, refused, photos, tmp_path):
    for kind in ("train", "test"):
        for label in ("oak", "yew"):
            (photos / kind / label).mkdir(parents=True, exist_ok=True)
            for index, path in enumerate(sorted((photos / label).glob("*.png"))):
                if (index % 2 == 0) == (kind == "train"):
                    path.rename(photos / kind / label / path.name)
    for label in ("beech", "oak", "pine", "yew"):
        shutil.rmtree(photos / label)
    (photos / "train" / "oak" / "2.png").write_text("no picture")
    words = ["run", photos, "--method", "linear-probe", "--shots", 3, "--out", tmp_path / "out", "--skip-unreadable"]
    outcome = call(*words, "--json")
    assert outcome.exit_code == 0, outcome.output
    assert any("1 unreadable" in warning and "2.png" in warning for warning in json.loads(outcome.stdout)["warnings"])
    (photos / "test" / "oak" / "3.png").write_text("no picture")
    assert "3.png" in refused(*words, "--overwrite").replace("\n", "")


def test_display_names_reach_the_text_tower(call, refused, photos, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps({"oak": "red circle"}))
    words = ["run", photos, "--method", "zero-shot", "--shots", 2, "--out", tmp_path / "out", "--display-names"]
    outcome = call(*words, tmp_path / "names.json", "--json")
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout)["class_names"] == ["beech", "red circle", "pine", "yew"]
    assert "absent.json" in refused(*words, tmp_path / "absent.json", "--overwrite").replace("\n", "")


def test_output_folders_are_looked_at_first(refused, photos, tmp_path, monkeypatch):
    words = ["run", photos, "--method", "zero-shot", "--shots", 2, "--out"]
    (tmp_path / "file").write_text("x")
    assert "not empty" in refused(*words, tmp_path / "file")
    assert "is a file" in refused(*words, tmp_path / "file" / "below")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    assert "--overwrite" in refused(*words, tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "x"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "permission is denied" in refused(*words, tmp_path / "locked")


def test_a_full_disk_leaves_nothing_half_written(refused, photos, tmp_path, monkeypatch):
    def full(*_given: object, **_also: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "_sync", full)
    message = refused("run", photos, "--method", "zero-shot", "--shots", 2, "--out", tmp_path / "out")
    assert "disk is full" in message
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_ends_with_one(refused, photos, tmp_path):
    words = ["run", photos, "--method", "coop", "--shots", 2, "--out", tmp_path / "out", "--set", "training.lr=1e30"]
    message = refused(*words, "--set", "training.epochs=6", "--set", "training.warmup_epochs=0", code=1)
    assert "loss became" in message
    assert not (tmp_path / "out").exists()


def test_overwrite_replaces(call, photos, tmp_path):
    words = ["run", photos, "--method", "zero-shot", "--shots", 2, "--out", tmp_path / "out"]
    assert call(*words).exit_code == 0
    assert call(*words, "--seed", 2).exit_code == 2
    assert call(*words, "--seed", 2, "--overwrite").exit_code == 0
    assert read_run(tmp_path / "out").key.seed == 2


def test_a_csv_and_a_json_are_datasets(call, photos, tmp_path):
    files = sorted(photos.rglob("*.png"))
    rows = [(path.relative_to(photos).as_posix(), path.parent.name, index) for index, path in enumerate(files)]
    kind = lambda index: ("train", "train", "val", "test")[index % 4]  # noqa: E731
    (photos / "list.csv").write_text("path,label,split\n" + "".join(f"{p},{c},{kind(i)}\n" for p, c, i in rows))
    classes = sorted({c for _, c, _ in rows})
    lists = {k: [[p, classes.index(c), c] for p, c, i in rows if kind(i) == k] for k in ("train", "val", "test")}
    (photos / "split.json").write_text(json.dumps(lists))
    found = []
    for name in ("list.csv", "split.json"):
        words = ["run", photos / name, "--method", "linear-probe", "--shots", 2, "--json", "--out", tmp_path / name]
        outcome = call(*words)
        assert outcome.exit_code == 0, outcome.output
        found.append(json.loads(outcome.stdout)["parts"])
    assert found[0] == found[1]


def test_images_are_no_larger_than_allowed(refused, photos, tmp_path):
    Image.new("L", (20_000, 20_000)).save(photos / "oak" / "3.png")
    assert "too large" in refused("run", photos, "--method", "linear-probe", "--shots", 4, "--out", tmp_path / "out")
