"""`compare`, `predict`, `list`, `data`, `doctor` and the group itself."""

from __future__ import annotations

import json

import pytest

from adaptkit.commands.main import _VERBS
from adaptkit.methods import methods


@pytest.fixture
def compared(call, photos, tmp_path):
    """The folder of a comparison, and what --json printed."""
    names = "linear-probe,zero-shot,clip-adapter"
    words = ["compare", photos, "--methods", names, "--shots", 4, "--out", tmp_path / "out"]
    outcome = call(*words, "--json")
    assert outcome.exit_code == 0, outcome.output
    return tmp_path / "out", json.loads(outcome.stdout), words


# --- compare ----------------------------------------------------------------------------------------------------------


def test_zero_shot_comes_first_and_the_others_are_ranked(compared):
    folder, printed, _ = compared
    names = [run["key"]["method"] for run in printed["runs"]]
    assert names[0] == "zero-shot"
    accuracies = [run["parts"][0]["metrics"]["accuracy"] for run in printed["runs"]]
    assert accuracies[1] >= accuracies[2]
    assert (folder / "best").resolve().name == printed["best"] == names[1]


def test_every_image_view_is_encoded_once(compared):
    _, printed, _ = compared
    by_method = {run["key"]["method"]: run["images_encoded"] for run in printed["runs"]}
    # four classes with 8 images: 4 train, 2 val, 2 test (or as the split says); the first method encodes the plain ones
    assert by_method["linear-probe"] > 0
    assert by_method["zero-shot"] == 0
    assert by_method["clip-adapter"] == 4 * 16  # only its own augmented views: 4 of each of 16 shots


def test_a_second_comparison_repeats_nothing(call, compared, monkeypatch):
    folder, printed, words = compared
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    assert len(before) >= 3
    outcome = call(*words, "--json")
    assert outcome.exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")} == before
    assert json.loads(outcome.stdout)["runs"] == printed["runs"]


def test_a_table_says_what_won(call, photos, tmp_path):
    outcome = call("compare", photos, "--methods", "zero-shot,linear-probe", "--shots", 2, "--out", tmp_path / "out")
    assert outcome.exit_code == 0
    assert outcome.output.index("zero-shot") < outcome.output.index("linear-probe")
    assert "Best adapter (linear-probe)" in outcome.output.replace("\n", " ")


# --- predict ----------------------------------------------------------------------------------------------------------


def test_predictions_of_files_and_folders(call, compared, photos):
    folder, _, _ = compared
    outcome = call("predict", folder / "best", photos / "oak" / "0.png", photos / "yew", "--top", 2, "--json")
    assert outcome.exit_code == 0, outcome.output
    answers = json.loads(outcome.stdout)["predictions"]
    assert len(answers) == 9
    assert answers[0]["classes"][0][0] == "oak"
    for answer in answers:
        (_, first), (_, second) = answer["classes"]
        assert 1 >= first >= second >= 0
    assert "oak" in call("predict", folder / "best", photos / "oak" / "0.png").output


def test_unreadable_images_stop_or_are_counted(call, refused, compared, photos):
    folder, _, _ = compared
    (photos / "bad.png").write_text("no picture")
    assert "bad.png" in refused("predict", folder / "best", photos / "bad.png").replace("\n", "")
    outcome = call("predict", folder / "best", photos / "bad.png", photos / "oak/1.png", "--skip-unreadable", "--json")
    assert [len(json.loads(outcome.stdout)[key]) for key in ("predictions", "skipped")] == [1, 1]
    assert "None of the 1 images" in refused("predict", folder / "best", photos / "bad.png", "--skip-unreadable")
    assert "absent.png" in refused("predict", folder / "best", photos / "absent.png").replace("\n", "")


def test_damaged_and_foreign_adapters_are_refused(refused, compared, photos):
    folder, _, _ = compared
    image = photos / "oak" / "0.png"
    assert "not an adapter folder" in refused("predict", photos, image).replace("\n", " ")
    adapter = folder / "linear-probe" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["backbone"]["digest"] = "0" * 64
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "was trained on" in refused("predict", adapter, image).replace("\n", " ")
    weights = folder / "clip-adapter" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "save the adapter again" in refused("predict", folder / "clip-adapter", image).replace("\n", " ")


# --- list, data, doctor, the group ------------------------------------------------------------------------------------


def test_lists(call):
    found = json.loads(call("list", "methods", "--json").stdout)
    assert sorted(item["name"] for item in found) == sorted(methods)
    for kind, name, says in (
        ("methods", "coop", "num_context"),
        ("datasets", "species", "vorlim"),
        ("backbones", "mini", "digest"),
        ("recipes", "coop/few-shot", "2109.01134"),
    ):
        outcome = call("list", kind, name)
        assert outcome.exit_code == 0, outcome.output
        assert says in outcome.output
    assert "mini" in call("list", "backbones").output
    assert "shapes-sketch" in call("list", "datasets").output


def test_near_matches(refused):
    assert "Did you mean 'maple'" in refused("list", "methods", "mapel")
    assert "Did you mean 'predict'" in refused("predcit")


def test_data_check(call, refused, photos):
    outcome = call("data", "check", photos, "--json")
    assert outcome.exit_code == 0, outcome.output
    assert sum(sum(counts.values()) for counts in json.loads(outcome.stdout)["counts"].values()) == 32
    assert "Everything can be used" in call("data", "check", photos).output
    (photos / "yew" / "0.png").write_bytes((photos / "yew" / "0.png").read_bytes()[:60])
    assert "0.png" in refused("data", "check", photos).replace("\n", "")


def test_stored_features_are_listed_and_cleared(call, compared):
    listed = json.loads(call("data", "features", "--json").stdout)
    assert {entry["backbone"] for entry in listed} == {"mini"}
    assert sum(entry["images"] for entry in listed) > 0
    assert json.loads(call("data", "features", "--clear", "--json").stdout)["freed_bytes"] > 0
    assert json.loads(call("data", "features", "--json").stdout) == []


def test_doctor(call, monkeypatch, tmp_path):
    facts = json.loads(call("doctor", "--json").stdout)
    assert facts["packages"]["torch"] != "not installed"
    assert facts["problems"] == []
    monkeypatch.setenv("ADAPTKIT_DATA_ROOT", str(tmp_path / "gone"))
    outcome = call("doctor")
    assert outcome.exit_code == 1
    assert "isn't a folder" in outcome.output.replace("\n", " ")


def test_every_verb_has_an_example(call):
    assert len(_VERBS) >= 10
    for verb in _VERBS:
        outcome = call(verb, "--help")
        assert outcome.exit_code == 0
        assert "Example" in outcome.output
