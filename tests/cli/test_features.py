"""`adaptkit features export` and `show`, and runs on the files they are about."""

from __future__ import annotations

import json

import pytest

from adaptkit.storage import read_safetensors, read_safetensors_header
from tests.data.feature_file import small_tensors, write_small


@pytest.fixture
def file(tmp_path):
    return write_small(tmp_path / "birds.safetensors")


def test_export_show_and_run(call, photos, tmp_path):
    out = tmp_path / "photos.safetensors"
    outcome = call("features", "export", photos, "--out", out, "--views", 2, "--json")
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout)["images"] == {"train": 16, "val": 8, "test": 8}
    tensors = read_safetensors(out)
    assert tensors["train_views"].shape == (2, 16, 128)
    assert tensors["text_features"].shape == (4, 1, 128)
    shown = call("features", "show", out, "--json")
    assert shown.exit_code == 0, shown.output
    facts = json.loads(shown.stdout)
    assert (facts["backbone"], facts["classes"], facts["views"]) == ("mini", 4, 2)
    run = call("run", f"features:{out}", "--method", "tip-adapter", "--shots", 2, "--out", tmp_path / "run")
    assert run.exit_code == 0, run.output
    assert "no image was read" in run.output
    assert "predict with: adaptkit predict" in run.output
    image = next((photos / "oak").iterdir())
    predicted = call("predict", tmp_path / "run", image, "--json")  # the file names mini by its digest
    assert predicted.exit_code == 0, predicted.output
    assert json.loads(predicted.stdout)["predictions"][0]["classes"]


def test_ready_draws_are_exported(call, photos, tmp_path):
    out = tmp_path / "photos.safetensors"
    outcome = call("features", "export", photos, "--out", out, "--shots", "1,2", "--template", "a {}.", "--seed", 3)
    assert outcome.exit_code == 0, outcome.output
    places, metadata = read_safetensors_header(out)
    assert places["train1_features"].shape == (4, 128)
    assert places["train2_features"].shape == (8, 128)
    assert "train_features" not in places
    assert json.loads(metadata["templates"]) == ["a {}."]
    assert json.loads(metadata["class_names"]) == ["beech", "oak", "pine", "yew"]


def test_export_refuses_before_work(refused, photos, tmp_path, file):
    assert "is already there" in refused("features", "export", photos, "--out", file)
    assert "no number of shots" in refused("features", "export", photos, "--out", tmp_path / "a", "--shots", "1,x")
    assert "features already" in refused("features", "export", f"features:{file}", "--out", tmp_path / "a")
    assert "fewer training images than 99" in refused(
        "features", "export", "digits", "--out", tmp_path / "a", "--shots", "99999"
    ).replace("99999", "99")
    assert not (tmp_path / "a").exists()


def test_show_names_what_is_wrong(refused, tmp_path):
    tensors = small_tensors()
    tensors.pop("val_labels")
    path = write_small(tmp_path / "bad.safetensors", tensors, backbone=None)
    assert "val_labels [48] is missing" in refused("features", "show", path)
    assert "no file of features" in refused("features", "show", tmp_path / "none.safetensors")


def test_compare_ranks_on_a_file(call, file, tmp_path):
    outcome = call(
        "compare", f"features:{file}", "--methods", "zero-shot,tip-adapter", "--shots", 2, "--out", tmp_path / "c"
    )
    assert outcome.exit_code == 0, outcome.output
    assert "backbone some" in " ".join(outcome.output.split())
    assert "can't answer images" in " ".join(outcome.output.split())


def test_methods_that_need_images_are_refused(refused, file, tmp_path):
    said = refused("run", f"features:{file}", "--method", "maple", "--shots", 2, "--out", tmp_path / "r")
    assert "maple trains on images" in said
    assert not (tmp_path / "r").exists()
    words = ("run", f"features:{file}", "--method", "zero-shot", "--shots", 2, "--out", tmp_path / "r")
    said = refused(*words, "--backbone", "mini")
    assert "holds features of 'some CLIP', and 'mini' is another model" in " ".join(said.split())


def test_data_check_counts_a_file(call, file):
    outcome = call("data", "check", f"features:{file}", "--json")
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout)["counts"]["train"]["oak"] == 8
