from __future__ import annotations

from dataclasses import replace

import pytest

from adaptkit.errors import DataError
from adaptkit.evaluation.metrics import average_base_to_novel, harmonic_mean
from adaptkit.evaluation.statistics import summarise
from adaptkit.sweeps.report.aggregate import (
    ACCURACY,
    MEAN_OF_H,
    TARGET_AVERAGE,
    H,
    averages_of,
    gather,
    measures,
)
from adaptkit.sweeps.results import BadRun, RunRecord, read_runs
from tests.sweeps.made import made_result
from tests.sweeps.report.build import record, seeds, write

B2N = {"protocol": "base-to-novel", "shots": 16}


# --- cells, groups, sections ------------------------------------------------------------------------------------------


def test_seeds_make_a_cell_with_mean_interval_and_n(tmp_path):
    runs = seeds(tmp_path, "coop", [0.5, 0.6, 0.7])
    (section,) = gather(runs).sections
    (group,) = section.groups
    (cell,) = group.cells
    assert cell.label == "coop"
    assert cell.seeds == (1, 2, 3)
    assert cell.summaries[ACCURACY] == summarise([0.5, 0.6, 0.7])
    assert cell.value(ACCURACY) == pytest.approx(0.6)
    assert group.ranked_by == ACCURACY


def test_cells_are_ranked_and_grouped_by_dataset_and_shots(tmp_path):
    runs = [
        *seeds(tmp_path, "coop", [0.5, 0.6]),
        *seeds(tmp_path, "zero-shot", [0.4, 0.4]),
        *seeds(tmp_path, "coop", [0.8], shots=16),
        *seeds(tmp_path, "coop", [0.7], dataset="shapes"),
    ]
    (section,) = gather(runs).sections
    assert [(group.dataset, group.shots) for group in section.groups] == [("digits", 4), ("digits", 16), ("shapes", 4)]
    first = section.groups[0]
    assert [cell.label for cell in first.cells] == ["coop", "zero-shot"]
    assert first.best.label == "coop"
    assert first.zero_shot is not None
    assert section.labels == ("zero-shot", "coop")
    assert section.shot_counts == (4, 16)


def test_protocols_backbones_and_their_variants_are_apart(tmp_path):
    both = {"base": 0.5, "novel": 0.6}
    runs = [
        record(tmp_path),
        record(tmp_path, backbone="ViT-B-16/openai", backbone_digest="e" * 64),
        record(tmp_path, accuracy=both, **B2N),
        record(tmp_path, accuracy={**both, "all": 0.4}, settings={"joint": True}, **B2N),
        record(tmp_path, accuracy=both, settings={"class_split": 3}, **B2N),
    ]
    titles = [section.title for section in gather(runs).sections]
    assert sorted(titles) == [
        "base-to-novel · mini",
        "base-to-novel, joint: all classes are candidates for every image · mini",
        "base-to-novel, random class split (seed 3) · mini",
        "few-shot · ViT-B-16/openai",
        "few-shot · mini",
    ]
    assert len({section.anchor for section in gather(runs).sections}) == 5


def test_variants_of_a_method_are_told_apart_by_what_differs(tmp_path):
    def own(epochs: int) -> dict:
        return {
            "settings": {"training": {"epochs": epochs, "lr": 0.1}},
            "changes": {"origins": {"training.epochs": "--set", "training.lr": "default"}},
        }

    plain = {
        "settings": {"training": {"epochs": 50, "lr": 0.1}},
        "changes": {"origins": {"training.epochs": "default"}},
    }
    runs = [
        record(tmp_path, **plain),
        record(tmp_path, **own(5)),
        record(tmp_path, "maple", **own(7)),
        record(tmp_path, "kgcoop"),
        record(tmp_path, "kgcoop", sampler="tip"),
        record(tmp_path, "vpt", settings={"method": {"a": 1}}),
        record(tmp_path, "vpt", settings={"method": {"a": 2}}),
    ]
    labels = sorted(gather(runs).sections[0].labels)
    assert labels[:5] == ["coop", "coop (epochs=5)", "kgcoop", "kgcoop (sampler tip)", "maple"]
    assert [label[:5] for label in labels[5:]] == ["vpt #", "vpt #"]
    assert len(set(labels)) == 7


def test_one_dataset_name_with_two_splits_is_two_groups(tmp_path):
    runs = [record(tmp_path), record(tmp_path, split_digest="abc123" * 10), record(tmp_path, shots=8, split_digest="e")]
    names = [group.dataset for group in gather(runs).sections[0].groups]
    assert sorted(names) == ["digits", "digits (split abc123)", "digits (split dddddd)"]


# --- measures ---------------------------------------------------------------------------------------------------------


def test_both_averages_of_h_are_given(tmp_path):
    pairs = [(0.8, 0.6), (0.6, 0.8)]
    runs = seeds(tmp_path, "coop", [{"base": base, "novel": novel} for base, novel in pairs], **B2N)
    cell = gather(runs).cells[0]
    expected = average_base_to_novel(pairs)
    assert cell.value(H) == pytest.approx(expected.h_of_means) == pytest.approx(0.7)
    assert cell.value(MEAN_OF_H) == pytest.approx(expected.mean_of_h)
    assert cell.value(H) > cell.value(MEAN_OF_H)
    assert gather(runs).sections[0].measures == ("base", "novel", H, MEAN_OF_H)


def test_a_target_average_leaves_the_source_out(tmp_path):
    run = record(
        tmp_path,
        accuracy={"source": 0.9, "textures": 0.5, "species": 0.2},
        protocol="cross-dataset",
        dataset="shapes",
        settings={"targets": {"textures": "t", "species": "s"}},
    )
    assert measures(run.result)[TARGET_AVERAGE] == pytest.approx(0.35)
    section = gather([run]).sections[0]
    assert section.measures == ("source", "textures", "species", TARGET_AVERAGE)
    assert section.ranked_by == TARGET_AVERAGE


def test_joint_base_to_novel_shows_all_classes_too(tmp_path):
    run = record(tmp_path, accuracy={"base": 0.5, "novel": 0.4, "all": 0.45}, settings={"joint": True}, **B2N)
    assert gather([run]).sections[0].measures == ("base", "novel", H, MEAN_OF_H, "all")


def test_averages_over_datasets_use_seed_means_and_no_incomplete_rows(tmp_path):
    runs = []
    for dataset, (base, novel) in {"a": (0.8, 0.6), "b": (0.6, 0.9), "c": (0.5, 0.5)}.items():
        runs += seeds(tmp_path, "coop", [{"base": base, "novel": novel}] * 2, dataset=dataset, **B2N)
    runs += seeds(tmp_path, "maple", [{"base": 0.99, "novel": 0.99}], dataset="a", **B2N)
    rows = averages_of(gather(runs).sections[0], 16)
    assert [row.label for row in rows] == ["coop", "maple"]
    base, novel = (0.8 + 0.6 + 0.5) / 3, (0.6 + 0.9 + 0.5) / 3
    assert rows[0].value("base") == pytest.approx(base, abs=0.01)
    assert rows[0].value(H) == pytest.approx(harmonic_mean(rows[0].value("base"), rows[0].value("novel")))
    assert rows[0].value(MEAN_OF_H) < rows[0].value(H)
    assert rows[0].half_width("base") == pytest.approx(0)
    assert rows[0].half_width(H) is None
    assert not rows[1].complete
    assert rows[1].value(H) is None
    assert abs(novel - rows[0].value("novel")) < 0.01


# --- what is left out -------------------------------------------------------------------------------------------------


def test_the_same_run_counts_once_and_differing_copies_are_said(tmp_path):
    first = record(tmp_path / "a", accuracy=0.5)
    same = record(tmp_path / "b", accuracy=0.5)
    other = record(tmp_path / "c", accuracy=0.7)
    report = gather([first, same])
    assert report.runs == 1
    assert "second time" in report.notes[0]
    assert "same numbers" in report.notes[0]
    assert "1 of them gave other numbers" in gather([first, same, other]).notes[0]


def test_interrupted_runs_dont_count(tmp_path):
    whole = record(tmp_path)
    cut = record(tmp_path, seed=2, changes={"fit": {"interrupted": True}})
    report = gather([whole, cut])
    assert report.runs == 1
    assert "interrupted" in report.notes[0]
    with pytest.raises(DataError, match="nothing to report: 1 interrupted"):
        gather([cut])


def test_mixed_and_unknown_versions_are_refused(tmp_path):
    one = record(tmp_path)
    other = record(tmp_path, seed=2, changes={"schema_version": 2})
    with pytest.raises(DataError, match="1 of version 1, 1 of version 2"):
        gather([one, other])
    with pytest.raises(DataError, match=r"version 1\): 1 of version 2, such as "):
        gather([other])


def test_nothing_is_refused_with_what_to_give():
    with pytest.raises(DataError, match="no finished run"):
        gather([])
    with pytest.raises(DataError, match="all 1 runs found are damaged, the first because it is torn"):
        gather([], [BadRun("x", "it is torn")])


def test_damaged_runs_are_kept_for_the_reader(tmp_path):
    record(tmp_path)
    (record(tmp_path, seed=2).folder / "result.json").write_text("{")
    records, damaged = read_runs([tmp_path])
    report = gather(records, damaged)
    assert report.runs == 1
    assert len(report.damaged) == 1


def test_runs_of_one_key_with_other_parts_dont_break_the_cell(tmp_path):
    one = record(tmp_path, accuracy={"base": 0.5, "novel": 0.5}, **B2N)
    other = record(tmp_path, accuracy={"base": 0.5, "novel": 0.5}, seed=2, **B2N)
    odd = RunRecord(other.folder, replace(other.result, parts=other.result.parts[:1]))
    cell = gather([one, odd]).cells[0]
    assert set(cell.summaries) == {"base"}
    assert write(tmp_path / "again", one.result, {}).result == one.result


def test_language_models_without_a_clip_beside_them_are_said(tmp_path):
    def run(method, backbone="mini", **key):
        return RunRecord(tmp_path, made_result(method=method, backbone=backbone, **key))

    def said(*runs):
        return [note for note in gather(runs).notes if "No CLIP stands beside" in note]

    asked = [run("mllm-lora", "some-mllm"), run("zero-shot", "some-mllm"), run("gda", "some-mllm", shots=8)]
    clip, adapter = run("zero-shot"), run("clip-adapter")
    assert said(clip, adapter) == []
    [note] = said(*asked, clip)  # one of the two isn't enough
    assert "on digits, few-shot, 4 shots; digits, few-shot, 8 shots:" in note
    [note] = said(*asked, clip, adapter)
    assert "on digits, few-shot, 8 shots:" in note
    assert said(*asked[:2], clip, adapter) == []
    elsewhere = [run("zero-shot", split_digest="e" * 64), run("clip-adapter", split_digest="e" * 64)]
    assert len(said(*asked[:1], *elsewhere)) == 1
    assert said(run("a-method-of-a-plugin", "x")) == []
