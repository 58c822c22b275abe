"""`adaptkit compare`: settings for several methods, what is encoded, what is repeated, and what is never deleted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.commands import _console
from adaptkit.commands.compare import DESCRIBED_METHODS, FAST_METHODS
from adaptkit.evaluation.results import read_run
from adaptkit.methods import methods
from tests.cli.conftest import CLASSES
from tests.quick import sentences

QUICK = ("--shots", 4, "--set", "training.epochs=1", "--set", "beta_steps=3", "--set", "alpha_steps=3")


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many images each call of an image tower was given, from now on."""
    counts: list[int] = []
    plain = DualEncoder.encode_image

    def counting(self, pixels):
        counts.append(len(pixels))
        return plain(self, pixels)

    monkeypatch.setattr(DualEncoder, "encode_image", counting)
    return counts


@pytest.fixture
def compare(call, photos, tmp_path):
    """Run a comparison into `out`; returns what --json printed."""

    def run(*words: object, out: str = "out") -> dict:
        outcome = call("compare", photos, "--out", tmp_path / out, "--json", *words)
        assert outcome.exit_code == 0, outcome.output
        return json.loads(outcome.stdout)

    return run


def by_method(printed: dict, key: str) -> dict:
    return {run["key"]["method"]: run[key] for run in printed["runs"]}


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- one pass over the images -----------------------------------------------------------------------------------------


def test_the_default_methods_share_one_pass_and_a_second_time_nothing_is_encoded(compare, encoded, tmp_path):
    printed = compare(*QUICK)
    counted = by_method(printed, "images_encoded")
    assert sorted(counted) == sorted(FAST_METHODS)
    assert sum(encoded) == sum(counted.values())  # no image went through the tower beside the store
    # by the order of the methods: all plain views once, then tip-adapter's augmented ones, which the others share
    plain = read_run(tmp_path / "out/zero-shot").images_encoded
    assert plain == 4 * (4 + 2 + 2)
    views = counted["tip-adapter"] // 16
    assert views >= 1
    assert counted == {**dict.fromkeys(FAST_METHODS, 0), "zero-shot": plain, "tip-adapter": 16 * views}
    encoded.clear()
    assert compare(*QUICK) == printed
    assert encoded == []
    other = compare(*QUICK, out="elsewhere")  # new runs, old features
    assert encoded == []
    assert set(by_method(other, "images_encoded").values()) == {0}
    assert by_method(other, "parts") == by_method(printed, "parts")


def test_the_default_methods_are_fast_and_answer_image_by_image():
    kinds = [methods.get(name) for name in (*FAST_METHODS, *DESCRIBED_METHODS)]
    assert len(kinds) == len(set(kinds)) == 15
    assert {kind.reads for kind in kinds} == {"image_features"}
    assert not any(kind.transductive for kind in kinds)
    assert [kind.name for kind in kinds if kind.reads_descriptions == "needed"] == list(DESCRIBED_METHODS)


def test_described_classes_add_the_methods_that_read_sentences(compare, tmp_path):
    (tmp_path / "some.json").write_text(json.dumps(sentences(list(CLASSES)[1:])), encoding="utf-8")
    (tmp_path / "all.json").write_text(json.dumps(sentences(CLASSES)), encoding="utf-8")
    some = compare(*QUICK, "--descriptions", tmp_path / "some.json", "--allow-undescribed")
    assert sorted(by_method(some, "parts")) == sorted(FAST_METHODS)
    every = compare(*QUICK, "--descriptions", tmp_path / "all.json", out="described")
    assert sorted(by_method(every, "parts")) == sorted((*FAST_METHODS, *DESCRIBED_METHODS))


def test_transductive_methods_are_marked_and_not_chosen_before_others(compare, call, photos, tmp_path):
    printed = compare("--shots", 4, "--methods", "zero-shot,transclip,em-dirichlet,waffleclip")
    assert sorted(printed["transductive"]) == ["em-dirichlet", "transclip"]
    assert printed["best"] == "waffleclip"
    words = ("--shots", 4, "--methods", "zero-shot,transclip,waffleclip")
    table = call("compare", photos, "--out", tmp_path / "out", *words).output.replace("\n", " ")
    assert "transclip†" in table
    assert "† answers all test images together" in table
    assert compare("--shots", 4, "--methods", "zero-shot,transclip")["best"] == "transclip"  # nothing else is there


def test_base_to_novel_is_ranked_by_h(compare, call, photos, tmp_path):
    names = ("--methods", "clip-adapter,linear-probe,zero-shot", "--protocol", "base-to-novel", "--set", "epochs=1")
    printed = compare("--shots", 4, *names)
    h = [run["harmonic_mean"] for run in printed["runs"]]
    assert printed["runs"][0]["key"]["method"] == "zero-shot"
    assert h[1] >= h[2]
    for run in printed["runs"]:
        base, novel = (part["correct"] / part["total"] for part in run["parts"])
        assert run["harmonic_mean"] == pytest.approx(2 * base * novel / (base + novel) if base + novel else 0)
    table = call("compare", photos, "--out", tmp_path / "out", "--shots", 4, *names)
    assert table.exit_code == 0, table.output
    for title in ("base", "novel", "H", "gain", "trained", "seconds"):
        assert title in table.output
    said = " ".join(table.output.split())
    assert "* zero-shot: the method has no answer of its own for classes it never saw" in said


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_go_to_the_methods_that_read_them(compare):
    printed = compare(*QUICK, "--methods", "zero-shot,tip-adapter,clip-adapter")
    origins = by_method(printed, "origins")
    assert origins["clip-adapter"]["training.epochs"] == "--set"
    assert origins["tip-adapter"]["method.beta_steps"] == "--set"
    assert "--set" not in origins["zero-shot"].values()
    assert by_method(printed, "fit")["clip-adapter"]["epochs"] == 1


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("training.epoch=1", "Did you mean 'training.epochs'"),
        ("num_context=4", "none of zero-shot, clip-adapter reads 'num_context'"),
        ("epochs", "NAME=VALUE"),
        ("training.epochs=soon", "epochs"),
    ],
)
def test_settings_that_no_method_reads_are_refused(refused, photos, tmp_path, setting, says):
    words = ("compare", photos, "--methods", "zero-shot,clip-adapter", "--shots", 2, "--out", tmp_path / "out")
    assert says in refused(*words, "--set", setting).replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_method_named_twice_runs_once(compare):
    assert len(compare("--shots", 2, "--methods", "zero-shot,zero-shot")["runs"]) == 1


# --- what is in the folder already ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["best", "zero-shot"])
def test_what_is_no_run_is_never_deleted(refused, photos, tmp_path, place):
    for name in (f"folder/{place}/mine.txt", f"file/{place}"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        words = ["compare", photos, "--methods", "zero-shot", "--shots", 2, "--out", tmp_path / name.split("/")[0]]
        for more in ([], ["--overwrite"]):
            assert "which would be lost" in refused(*words, *more).replace("\n", " ")
        assert path.read_text() == "mine"
        assert len(files(tmp_path / name.split("/")[0])) == 1


def test_runs_with_other_settings_stay_until_asked(compare, refused, photos, tmp_path):
    names = ("--methods", "zero-shot,linear-probe", "--shots", 2)
    compare(*names)
    before = files(tmp_path / "out")
    words = ("compare", photos, "--out", tmp_path / "out", *names, "--seed", 2)
    assert "--overwrite" in refused(*words)
    assert files(tmp_path / "out") == before
    compare(*names, "--seed", 2, "--overwrite")
    assert read_run(tmp_path / "out/linear-probe").key.seed == 2


def test_a_damaged_run_is_repeated_and_only_that(compare, tmp_path):
    names = ("--methods", "zero-shot,linear-probe", "--shots", 2)
    first = compare(*names)
    path, other = (tmp_path / "out" / name / "result.json" for name in ("linear-probe", "zero-shot"))
    path.write_text(path.read_text()[:100])
    kept = other.read_bytes()
    again = compare(*names)
    assert by_method(again, "parts") == by_method(first, "parts")
    assert other.read_bytes() == kept
    assert read_run(path.parent).key.method == "linear-probe"


def test_ctrl_c_stops_the_comparison_and_the_interrupted_run_is_repeated(compare, monkeypatch, tmp_path):
    @contextmanager
    def impatient(_shown: bool) -> Iterator:
        def stop(what: str, done: int, total: int) -> None:
            if what.startswith("clip-adapter epoch 2"):
                raise KeyboardInterrupt

        yield stop

    words = ("--methods", "zero-shot,clip-adapter,linear-probe", "--shots", 2, "--set", "training.epochs=3")
    with monkeypatch.context() as patched:
        patched.setattr(_console, "progress_bars", impatient)
        printed = compare(*words)
    assert [run["key"]["method"] for run in printed["runs"]] == ["zero-shot", "clip-adapter"]
    assert any("interrupted" in warning for warning in printed["runs"][1]["warnings"])
    again = compare(*words)
    assert len(again["runs"]) == 3
    assert by_method(again, "fit")["clip-adapter"]["epochs"] == 3


# --- the best adapter -------------------------------------------------------------------------------------------------


def test_the_best_link_predicts_also_after_the_folder_was_moved(compare, call, photos, tmp_path):
    compare("--methods", "zero-shot,linear-probe", "--shots", 4)
    assert (tmp_path / "out/best").is_symlink()
    shutil.move(tmp_path / "out", tmp_path / "moved")
    outcome = call("predict", tmp_path / "moved/best", photos / "oak/0.png", "--json")
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout)["predictions"][0]["classes"][0][0] == "oak"


def test_where_links_cant_be_made_the_best_run_is_copied(compare, call, photos, tmp_path, monkeypatch):
    def refuse(*_given: object, **_also: object) -> None:
        raise OSError("no links on this file system")

    words = ("--methods", "zero-shot,linear-probe", "--shots", 4)
    compare(*words)
    monkeypatch.setattr(Path, "symlink_to", refuse)
    for _ in range(2):  # over a link, then over a copy
        compare(*words)
        best = tmp_path / "out/best"
        assert best.is_dir()
        assert not best.is_symlink()
        assert read_run(best) == read_run(tmp_path / "out/linear-probe")
        assert call("predict", best, photos / "oak/0.png").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["best", "linear-probe", "zero-shot"]


def test_the_output_folder_is_looked_at_first(refused, photos, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "is a file" in refused("compare", photos, "--shots", 2, "--out", out).replace("\n", " ")
    assert "one dataset" in refused("compare")
    assert "Did you mean 'maple'" in refused("compare", photos, "--methods", "coop,mapel")
