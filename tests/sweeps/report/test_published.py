from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from adaptkit.data.sources import known_names
from adaptkit.methods import methods
from adaptkit.sweeps.report.aggregate import H, gather
from adaptkit.sweeps.report.published import (
    BACKBONES,
    DATASETS,
    ELEVEN,
    FOUR_TARGETS,
    METHODS,
    OTHER_DATASETS,
    OTHER_METHODS,
    OTHER_PROTOCOLS,
    PROTOCOLS,
    TEN_TARGETS,
    compare_section,
    load_published,
    unmapped,
)
from tests.sweeps.report.build import EMBEDDED, JSON, record, seeds

PAPER = {"dataset": "eurosat", "source": JSON, "backbone": "ViT-B-16/openai", "shots": 16, "predictions": False}
B2N = {**PAPER, "protocol": "base-to-novel"}
BOTH = {"base": 0.9, "novel": 0.7}


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_row_is_translated_or_listed_as_anothers():
    figures = load_published()
    assert len(figures) == 1370
    assert unmapped(figures) == []
    usable = [figure for figure in figures if figure.usable]
    assert len(usable) > 850
    assert all(0 < figure.accuracy < 100 and figure.source for figure in figures)
    assert unmapped([replace(figures[0], method="NewNet")]) != []
    assert unmapped([replace(figures[0], dataset="NewSet")]) != []


def test_no_name_of_the_translations_is_idle_or_unknown_here():
    figures = load_published()
    seen = {name: Counter(getattr(figure, name) for figure in figures) for name in ("method", "dataset", "protocol")}
    assert set(METHODS) | OTHER_METHODS == set(seen["method"])
    assert not set(METHODS) & OTHER_METHODS
    assert set(PROTOCOLS) | OTHER_PROTOCOLS == set(seen["protocol"])
    assert set(DATASETS) | OTHER_DATASETS <= set(seen["dataset"])
    assert {figure.backbone for figure in figures} == set(BACKBONES)
    assert all(name in methods for name in METHODS.values())
    to_come = {"fgvc_aircraft", "imagenet"} | FOUR_TARGETS
    assert set(DATASETS.values()) - set(known_names()) <= to_come
    assert (len(ELEVEN), len(TEN_TARGETS), len(FOUR_TARGETS)) == (11, 10, 4)


def test_no_place_has_two_figures_of_one_source():
    places = Counter(
        (figure.method, figure.backbone, figure.place, figure.shots, figure.source)
        for figure in load_published()
        if figure.usable and figure.protocol != "zero-shot"
    )
    assert [place for place, count in places.items() if count > 1] == []
    assert len(places) > 800


# --- beside ours ------------------------------------------------------------------------------------------------------


def beside(runs):
    found, refused = [], []
    for section in gather(runs).sections:
        more, no = compare_section(section)
        found += more
        refused += no
    return found, refused


def test_a_figure_stands_beside_ours_with_its_source(tmp_path):
    found, refused = beside(seeds(tmp_path, "coop", [BOTH] * 3, **B2N))
    assert [(item.measure, item.figure.accuracy) for item in found] == [("base", 92.19), ("novel", 54.74), (H, 68.69)]
    assert all("2307.06948" in item.figure.shown_source and item.cautions == () for item in found)
    assert found[0].ours == pytest.approx(0.9)
    assert found[0].half_width == pytest.approx(0)
    assert found[0].seeds == 3
    assert refused == []


def test_embedded_data_never_has_published_figures(tmp_path):
    run = record(tmp_path, "coop", BOTH, **{**B2N, "source": EMBEDDED})
    found, refused = beside([run])
    assert found == []
    assert "embedded data" in refused[0].reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"backbone": "mini"}, "other backbone: mini"),
        ({"backbone": "RN50/openai"}, "other backbone: published with ViT-B/16"),
        ({"source": {"kind": "folder", "path": "x"}}, "own split"),
        ({"notes": ["own split, not comparable with published ones: 50/20/30 per class, seed 0"]}, "own split"),
        ({"notes": ["split_zhou_EuroSAT.json isn't the published file: check"]}, "other split"),
        ({"dataset": "my_photos"}, "no published figures are at hand"),
        ({"settings": {"joint": True}}, "the protocol was varied: joint"),
        ({"settings": {"precision": "bf16"}}, "other precision: bf16"),
        ({"sampler": "tip"}, "other sampler: ours tip, published coop"),
        ({"shots": 4}, "other number of shots: published with 16"),
        ({"changes": {"tuned_on": "test", "parts": None}}, "chosen on test images"),
    ],
)
def test_what_differs_is_said_and_no_figure_shown(tmp_path, changes, reason):
    given = {**B2N, **changes}
    if "changes" in changes:
        given["changes"] = {"tuned_on": "test"}
    found, refused = beside([record(tmp_path, "coop", BOTH, **given)])
    assert found == []
    assert len(refused) == 1
    assert reason in refused[0].reason


def test_what_else_differs_is_a_caution(tmp_path):
    facts = {
        "recipe": "coop/base-to-novel-quick",
        "origins": {"training.epochs": "--set"},
        "tuned_on": "per-dataset-config",
    }
    run = record(tmp_path, "coop", BOTH, settings={"training": {"epochs": 5}}, changes=facts, seed=4, **B2N)
    found, _ = beside([run])
    said = "; ".join(found[0].cautions)
    for part in (
        "our settings: training.epochs=5",
        "our recipe: coop/base-to-novel-quick",
        "our seeds: 4",
        "per dataset",
    ):
        assert part in said


def test_the_tip_sampler_and_choice_on_test_images_are_known(tmp_path):
    facts = {**PAPER, "backbone": "RN50/openai"}
    found, _ = beside([record(tmp_path, "tip-adapter", 0.7, **facts)])
    assert found == []
    found, _ = beside([record(tmp_path, "tip-adapter", 0.7, sampler="tip", **facts)])
    assert len(found) == 1
    assert any("chosen on test" in caution for caution in found[0].cautions)


def test_zero_shot_compares_at_any_number_of_shots(tmp_path):
    found, _ = beside([record(tmp_path, "zero-shot", BOTH, **{**B2N, "shots": 4})])
    assert [item.figure.accuracy for item in found] == [56.48, 64.05, 60.03]


def test_the_average_of_the_eleven_wants_all_of_them(tmp_path):
    runs = [record(tmp_path, "coop", BOTH, seed=s, **{**B2N, "dataset": d}) for d in sorted(ELEVEN) for s in (1, 2, 3)]
    found, _ = beside(runs)
    averages = [item for item in found if item.dataset.startswith("average")]
    assert {item.measure for item in averages} == {"base", "novel", H}
    assert 82.69 in {item.figure.accuracy for item in averages}
    assert len({item.dataset for item in found}) == 12
    found, _ = beside(runs[3:])
    assert not [item for item in found if item.dataset.startswith("average")]


def test_targets_compare_one_by_one_and_their_average_when_complete(tmp_path):
    targets = sorted(TEN_TARGETS)
    facts = {**PAPER, "dataset": "imagenet", "protocol": "cross-dataset"}
    accuracy = {"source": 0.7, **dict.fromkeys(targets, 0.6)}
    found, _ = beside([record(tmp_path, "coop", accuracy, settings={"targets": dict.fromkeys(targets, "x")}, **facts)])
    assert len(found) == 12
    by_name = {item.dataset: item.figure.accuracy for item in found}
    assert by_name["imagenet"] == 71.51
    assert by_name["target average"] == 63.88
    del accuracy["ucf101"]
    found, _ = beside(
        [record(tmp_path, "coop", accuracy, settings={"targets": dict.fromkeys(targets[:-1], "x")}, **facts)]
    )
    assert "target average" not in {item.dataset for item in found}
