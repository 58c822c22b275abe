from __future__ import annotations

import base64
import hashlib
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adaptkit.sweeps.report import plots
from adaptkit.sweeps.report.aggregate import gather
from adaptkit.sweeps.report.pictures import Images, confusions, data_address
from adaptkit.sweeps.report.predictions import PredictionReader
from adaptkit.sweeps.report.writing import write_report
from adaptkit.sweeps.results import BadRun
from tests.sweeps.report.build import record, seeds

SCRIPT = "<script>alert(1)</script>"
B2N = {"protocol": "base-to-novel", "shots": 16}
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """A page's elements; complains where they aren't well nested."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.ids += [given["id"]] if given.get("id") else []
        if tag == "a":
            self.links.append(given["href"])
        if tag in ("img", "link", "script", "iframe", "object", "image"):
            self.sources += [value for name, value in attrs if name in ("src", "href")]
        assert not [name for name in given if name.startswith("on")], given
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(tmp_path: Path, runs, damaged=(), **how) -> tuple[str, Page]:
    path = tmp_path / "page.html"
    write_report(gather(runs, damaged), {"html": path}, **how)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("runs")
    found = []
    for shots in (1, 16):
        for dataset in ("digits", "shapes"):
            found += seeds(tmp_path, "zero-shot", [0.4] * 2, dataset=dataset, shots=shots)
            found += seeds(tmp_path, "coop", [0.8, 0.85], dataset=dataset, shots=shots)
    found += seeds(tmp_path, "zero-shot", [{"base": 0.5, "novel": 0.6}] * 2, **B2N)
    found += seeds(tmp_path, "coop", [{"base": 0.9, "novel": 0.5}] * 2, **B2N)
    cross = {"protocol": "cross-dataset", "settings": {"targets": {"a": "1", "b": "2"}}}
    found += seeds(tmp_path, "zero-shot", [{"source": 0.5, "a": 0.6, "b": 0.7}] * 2, **cross)
    found += seeds(tmp_path, "coop", [{"source": 0.9, "a": 0.5, "b": 0.6}] * 2, **cross)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory, runs):
    """The page of `runs`, its text and its elements."""
    return page_of(tmp_path_factory.mktemp("page"), runs, [BadRun("some/folder", "it is torn.")])


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_holds_everything_and_loads_nothing(made):
    text, page = made
    for part in (
        "base-to-novel · mini",
        "few-shot · mini",
        "cross-dataset · mini",
        "Average over datasets",
        "H of means",
    ):
        assert part in page.text, part
    assert "target average" in page.text
    assert "not comparable: embedded data" in page.text
    assert "1 damaged run was left out" in page.text
    assert "some/folder" in page.text
    assert "adaptkit run --method coop --dataset digits" in page.text
    assert all(source.startswith("data:") for source in page.sources)
    assert set(re.findall(r"url\((.{4})", text)) == {"#svg"}  # clip paths
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    assert "default-src 'none'" in text
    assert page.tags.count("script") == 1
    assert len(text) < 1_000_000


def test_every_number_links_to_its_runs_and_no_id_is_there_twice(made):
    _, page = made
    assert len(page.ids) == len(set(page.ids))
    inside = [link for link in page.links if link.startswith("#")]
    assert len(inside) == len(page.links) > 40
    assert {link[1:] for link in inside} <= set(page.ids)
    assert sum(link.startswith("#runs-") for link in inside) > 30


def test_the_same_runs_give_the_same_page(tmp_path, runs, made):
    assert page_of(tmp_path, list(reversed(runs)), [BadRun("some/folder", "it is torn.")])[0] == made[0]


def test_the_policy_allows_the_pages_own_script_alone(made):
    text, _ = made
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_hostile_names_stay_text(tmp_path):
    name = f"{SCRIPT}\"' onload=x $\\frac$ {{{{7*7}}}} \u202e"
    facts = {
        "dataset": name,
        "names": [name, "_hidden\x00\n", "b&b\ud800", "ä—漢" * 500],
        "notes": [f"note {SCRIPT}"],
        "changes": {"warnings": (f"warning {SCRIPT}",), "templates": (f"{SCRIPT} {{}}",), "recipe": SCRIPT},
    }
    made = [record(tmp_path, "zero-shot", 0.3, **facts), record(tmp_path, "coop", 0.7, **facts)]
    made += [
        record(tmp_path, "coop", 0.7, **{**facts, "shots": 16}),
        record(tmp_path, "zero-shot", 0.3, **{**facts, "shots": 16}),
    ]
    halves = {"protocol": "base-to-novel", "dataset": f"{name}\ud800\x00\n"}
    made += [record(tmp_path, method, {"base": 0.5, "novel": 0.4}, **halves) for method in ("coop", "zero-shot")]
    text, page = page_of(tmp_path, made, [BadRun(SCRIPT, SCRIPT)])
    assert page.tags.count("script") == 1
    assert text.count("<script>") == 1
    assert page.text.count(SCRIPT) > 10
    assert "{{7*7}}" in page.text


def test_facts_of_wrong_types_break_nothing(tmp_path):
    odd = {
        "dataset": {"source": "x", "notes": 3, "asked": []},
        "environment": {"versions": 1},
        "origins": {"method.a": 7},
    }
    runs = [record(tmp_path, "coop", settings={"method": [], "training": None, "precision": 3}, changes=odd)]
    text, page = page_of(tmp_path, runs)
    assert "no published figures are at hand" in page.text
    assert "no command" in page.text
    assert "<script>" in text
    table = {"zero": 0, "weird": [1]}
    runs = [record(tmp_path, "coop", changes={"dataset": table, "fit": table, "recipe": ""}, dataset="")]
    assert "recipe none" in page_of(tmp_path, runs)[1].text


def test_without_predictions_the_page_still_has_its_tables(tmp_path):
    made = [record(tmp_path, "coop", 0.7, predictions=False), record(tmp_path, "zero-shot", 0.3, predictions=False)]
    _, page = page_of(tmp_path, made)
    assert "No predictions are stored" in page.text
    assert "70.0" in page.text


# --- single images ----------------------------------------------------------------------------------------------------


def test_confused_pairs_are_counted_over_seeds(tmp_path):
    made = seeds(tmp_path, "coop", [0.5, 0.5], classes=2, images=40, names=["cat", "dog"])
    cell = gather(made).cells[0]
    found = confusions(cell, PredictionReader(), Images(made[0], wanted=False))
    assert {(pair.true, pair.answered) for pair in found} == {("cat", "dog"), ("dog", "cat")}
    assert sum(pair.count for pair in found) == 40
    assert found[0].count >= found[1].count
    assert found[0].share == pytest.approx(found[0].count / 40)


def test_pictures_come_from_the_dataset_where_it_is_the_same(tmp_path):
    from adaptkit.data.sources import load_dataset

    digits = load_dataset("digits")
    changed = Images(record(tmp_path, "coop"))
    assert "other images now" in changed.problem
    run = record(tmp_path, "coop", split_digest=digits.digest, names=digits.class_names, classes=10)
    images = Images(run)
    assert images.problem == ""
    assert images.names("all", 10) == list(digits.class_names)
    assert images.names("all", 7) == [f"all class {number}" for number in range(7)]
    predictions = PredictionReader().read(run)["all"]
    assert images.pictures(predictions, [0]) == []  # other labels than the dataset's
    from dataclasses import replace

    right = replace(predictions, labels=digits.test.labels)
    found = images.pictures(right, [0, 1])
    assert len(found) == 2
    assert found[0].startswith("data:image/png;base64,")
    assert Images(run, wanted=False).pictures(right, [0]) == []


def test_missing_data_leaves_names(tmp_path):
    asked = {"name": "gone", "source": {"kind": "folder"}, "asked": {"dataset": str(tmp_path / "gone"), "shots": 4}}
    run = record(tmp_path, "coop", changes={"dataset": asked})
    assert "can't be loaded here" in Images(run).problem
    _, page = page_of(tmp_path, [run])
    assert "Names only: the dataset can't be loaded here" in page.text


def test_small_copies_are_small():
    large = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 800, 3)).astype(np.uint8))
    assert len(data_address(large)) < 8000
    assert data_address(large).startswith("data:image/jpeg")


# --- plots ------------------------------------------------------------------------------------------------------------


def test_plots_are_whole_svg_with_text_as_text(tmp_path, runs):
    drawn = []
    for section in gather(runs).sections:
        style = plots.looks(section.labels)
        drawn += [
            *plots.curves(section, style),
            *plots.base_against_novel(section, style),
            *plots.costs(section, style),
        ]
    assert len(drawn) == 2 + 1 + 6
    for plot in drawn:
        root = ET.fromstring(plot.svg.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))
        texts = ["".join(node.itertext()) for node in root.iter() if node.tag.endswith("text")]
        assert any("(%)" in text for text in texts)
        assert "currentColor" in plot.svg
        assert "var(--grid)" in plot.svg
        assert "#010203" not in plot.svg
        assert "coop" in plot.text


def test_many_methods_look_different():
    looks = plots.looks([f"m{number}" for number in range(77)])
    assert len(set(looks.values())) == 77
