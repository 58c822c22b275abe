"""`adaptkit data prepare / check / shots / convert` and `adaptkit list datasets` on known datasets."""

from __future__ import annotations

import json

import pytest

from adaptkit.data.catalogue import CATALOGUE
from adaptkit.data.sources import load_dataset
from tests.data.test_legacy import cache, datum, save  # noqa: F401  # a fixture among them
from tests.data.trees import grow


@pytest.fixture
def root(tmp_path):
    """A data root with a tiny EuroSAT."""
    return grow(tmp_path / "data", CATALOGUE["eurosat"], per_class=20)


@pytest.fixture
def own_only(root):
    """The same without the published split file."""
    (root / "eurosat/split_zhou_EuroSAT.json").unlink()
    return root


def flat(text: str) -> str:
    return " ".join(text.split())


# --- list ----------------------------------------------------------------------------------------------------------


def test_the_table_is_listed(call):
    rows = {row["name"]: row for row in json.loads(call("list", "datasets", "--json").stdout)}
    assert len(rows) == 8 + 29
    assert rows["eurosat"] == {
        "name": "eurosat", "group": "CoOp suite", "classes": 10, "train": 13500, "val": 5400, "test": 8100,
    }  # fmt: skip
    shown = call("list", "datasets").output
    assert "1,281,167" in shown
    assert "inaturalist_mini" in shown  # unbroken at 80 columns


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_everything_about_one(call, name):
    facts = json.loads(call("list", "datasets", name, "--json").stdout)
    assert facts["classes"] == CATALOGUE[name].classes
    assert facts["tree"].startswith("DATA_ROOT/")
    assert facts["in $ADAPTKIT_DATA_ROOT"].startswith("no: ")
    shown = call("list", "datasets", name).output
    assert CATALOGUE[name].citation.split(",")[0] in shown
    assert "licence" in shown


def test_where_one_lies(call, root, monkeypatch):
    monkeypatch.setenv("ADAPTKIT_DATA_ROOT", str(root))
    facts = json.loads(call("list", "datasets", "eurosat", "--json").stdout)
    assert facts["in $ADAPTKIT_DATA_ROOT"].endswith("split_zhou_EuroSAT.json (6 images listed)")


# --- prepare -------------------------------------------------------------------------------------------------------


def test_what_is_ready(call, root):
    outcome = call("data", "prepare", "eurosat", "--data-root", root)
    assert outcome.exit_code == 0, outcome.output
    assert f"eurosat is ready in {root}." in outcome.output
    assert "Licence of the images: MIT" in outcome.output
    assert json.loads(call("data", "prepare", "eurosat", "--data-root", root, "--json").stdout)["ready"] is True


def test_steps_by_hand(call, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTKIT_DATA_ROOT", str(tmp_path))
    outcome = call("data", "prepare", "nabirds")
    assert outcome.exit_code == 1
    for part in ("nabirds isn't ready: There is no", "request form", "DATA_ROOT/nabirds/", "    train_test_split.txt"):
        assert part in outcome.output
    machine = call("data", "prepare", "nabirds", "--json")
    assert machine.exit_code == 1
    facts = json.loads(machine.stdout)
    assert (facts["ready"], facts["licence"]) == (False, "non-commercial, no redistribution")
    assert "images/0817/" in facts["tree"]


def test_no_data_root_and_unknown_names(refused, tmp_path):
    assert "--data-root" in refused("data", "prepare", "eurosat")
    assert "'eurosat'" in refused("data", "prepare", "eurosta", "--data-root", tmp_path)
    assert "need no preparation" in flat(refused("data", "prepare", "digits", "--data-root", tmp_path))


def test_an_own_split_is_written_on_request(call, own_only):
    outcome = call("data", "prepare", "eurosat", "--data-root", own_only, "--own-split")
    assert outcome.exit_code == 0, outcome.output
    assert "Own split, not comparable" in outcome.output
    file = own_only / "eurosat/split_adaptkit_eurosat.json"
    assert set(json.loads(file.read_text())) == {"train", "val", "test"}
    facts = json.loads(call("data", "prepare", "eurosat", "--data-root", own_only, "--own-split", "--json").stdout)
    assert facts["own_split"] == str(file)


# --- check ---------------------------------------------------------------------------------------------------------


def test_a_known_dataset_is_compared_with_the_table(call, root):
    outcome = call("data", "check", "eurosat", "--data-root", root, "--json")
    assert outcome.exit_code == 2
    facts = json.loads(outcome.stdout)
    assert facts["problems"] == []
    assert facts["differences"][:2] == [
        "eurosat has 10 classes, and 2 are here",
        "eurosat has 13,500 train images, and 2 are here",
    ]
    shown = flat(call("data", "check", "eurosat", "--data-root", root).output)
    assert "eurosat has 4 problems: eurosat has 10 classes, and 2 are here." in shown
    assert "isn't the published file" in shown


def test_missing_damaged_and_equal_images(call, root, own_only):
    images = root / "eurosat/2750"
    (images / "Forest/Forest_1.jpg").write_bytes((images / "Forest/Forest_0.jpg").read_bytes()[:60])
    for number in range(2, 20):  # one picture in every file
        (images / f"Forest/Forest_{number}.jpg").write_bytes((images / "Forest/Forest_0.jpg").read_bytes())
    facts = json.loads(call("data", "check", "eurosat", "--data-root", root, "--own-split", "--json").stdout)
    assert [path for path, _ in facts["corrupt"]] == [str(images / "Forest/Forest_1.jpg")]
    assert [len(names) for names in facts["identical"]] == [3]
    shown = flat(call("data", "check", "eurosat", "--data-root", root, "--own-split").output)
    assert "1 picture is in several splits, byte for byte, such as " in shown
    assert ".." not in shown.rpartition("Forest_1.jpg")[2]
    assert "own split, not comparable" in shown


# --- shots and convert ---------------------------------------------------------------------------------------------


def test_shots_run_again_from_their_file(call, own_only, tmp_path):
    out = tmp_path / "shots.json"
    outcome = call(
        "data", "shots", "eurosat", "--data-root", own_only, "--own-split", "--shots", 2, "--out", out, "--json"
    )
    assert outcome.exit_code == 0, outcome.output
    facts = json.loads(outcome.stdout)
    assert (facts["train"], facts["val"]) == (4, 4)
    words = ("--method", "zero-shot", "--shots", 2, "--data-root", own_only)
    ran = call("run", out, *words, "--out", tmp_path / "run")
    assert ran.exit_code == 0, ran.output
    notes = json.loads((tmp_path / "run/result.json").read_text())
    assert "few-shot list shots.json: drawn by coop, 2 shots, seed 1" in json.dumps(notes)


def test_own_split_of_a_run_is_said_in_its_result(call, refused, own_only, tmp_path):
    words = (
        "run",
        "eurosat",
        "--method",
        "zero-shot",
        "--shots",
        2,
        "--data-root",
        own_only,
        "--out",
        tmp_path / "run",
    )
    assert "--own-split" in flat(refused(*words))
    ran = call(*words, "--own-split")
    assert ran.exit_code == 0, ran.output
    assert "own split, not comparable" in flat(ran.output)
    assert "own split, not comparable" in (tmp_path / "run/result.json").read_text()


def test_a_legacy_cache_is_converted(call, refused, datum, own_only, tmp_path):  # noqa: F811
    from adaptkit.data.few_shot import sample_few_shot

    dataset = load_dataset("eurosat", data_root=own_only, own_split=True)
    few = sample_few_shot(dataset.train, dataset.val, 2, 1)
    path = save(tmp_path / "split_fewshot/shot_2-seed_1.pkl", cache(datum, dataset, few))
    words = ("data", "convert", path, "--dataset", own_only / "eurosat/split_adaptkit_eurosat.json")
    assert "There is no dataset" in flat(refused(*words))
    call("data", "prepare", "eurosat", "--data-root", own_only, "--own-split")
    outcome = call(*words)
    assert outcome.exit_code == 0, outcome.output
    assert "4 training and 4 validation images of eurosat" in outcome.output
    assert "Drawing 2 shots with seed 1 again gives the same images." in outcome.output
    facts = json.loads(call(*words, "--seed", 3, "--out", tmp_path / "other.json", "--json").stdout)
    assert facts["same_as_drawn"] is False
    assert path.with_suffix(".json").is_file()


def test_a_hostile_pickle(refused, own_only, tmp_path):
    (tmp_path / "shot_1-seed_1.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    words = ("data", "convert", tmp_path / "shot_1-seed_1.pkl", "--dataset", "digits")
    assert "refused" in refused(*words)


def test_no_shots_of_a_test_set(refused, tmp_path):
    grow(tmp_path, CATALOGUE["imagenet_a"])
    message = refused("data", "shots", "imagenet_a", "--data-root", tmp_path, "--out", tmp_path / "x.json")
    assert "test images alone" in flat(message)
