from __future__ import annotations

import csv
import io
import json
import re

import pytest

from adaptkit.sweeps.report.aggregate import gather
from adaptkit.sweeps.report.exporters import all_tables, latex_text, to_csv, to_data, to_latex, to_markdown
from adaptkit.sweeps.report.predictions import PredictionReader
from adaptkit.sweeps.report.significance import compare_report
from adaptkit.sweeps.report.tables import averages_table, results_table
from adaptkit.sweeps.results import BadRun
from tests.sweeps.report.build import JSON, record, seeds

B2N = {"protocol": "base-to-novel", "shots": 16, "images": 200}


def reported(runs, damaged=()):
    report = gather(runs, damaged)
    return report, compare_report(report, PredictionReader())


@pytest.fixture
def runs(tmp_path):
    found = []
    for dataset in ("digits", "shapes"):
        found += seeds(tmp_path, "zero-shot", [{"base": 0.5, "novel": 0.6}] * 3, dataset=dataset, **B2N)
        found += seeds(tmp_path, "coop", [{"base": b, "novel": 0.61} for b in (0.8, 0.9, 1)], dataset=dataset, **B2N)
        found += seeds(tmp_path, "maple", [{"base": 0.9, "novel": 0.6}] * 3, dataset=dataset, **B2N)
    return found


def cells(table, row):
    return {column.title: value for column, value in zip(table.columns, table.rows[row], strict=True)}


# --- tables -----------------------------------------------------------------------------------------------------------


def test_results_show_mean_interval_n_gain_and_ties(runs):
    report, compared = reported(runs)
    section = report.sections[0]
    table = results_table(section, compared[section.anchor])
    assert [column.title for column in table.columns] == [
        "method", "dataset", "base", "novel", "H of means", "mean of H", "n", "gain", "p", "ECE", "trained", "seconds",
    ]  # fmt: skip
    assert len(table.rows) == 6
    assert table.breaks == {0, 3}
    best = cells(table, 0)
    assert best["method"].text == "coop"
    assert best["base"].text == "90.0 ± 24.8"
    assert best["n"].text == "3"
    assert best["gain"].text == "+18.2"
    assert best["H of means"].mark == "best"
    assert best["p"].text == ""
    second, last = cells(table, 1), cells(table, 2)
    assert second["H of means"].mark == "tie"
    assert last["method"].text == "zero-shot"
    assert last["base"].mark == ""
    assert last["p"].text == "<0.001"
    assert last["gain"].text == ""
    assert best["base"].link == section.groups[0].cells[0].anchor


def test_averages_show_every_dataset_and_no_mean_where_one_is_missing(runs):
    report, _ = reported(
        [run for run in runs if (run.result.key.method, run.result.key.dataset) != ("maple", "shapes")]
    )
    table = averages_table(report.sections[0])
    assert table is not None
    assert [column.title for column in table.columns] == [
        "method", "mean base", "mean novel", "H of means", "mean of H", "digits", "shapes",
    ]  # fmt: skip
    assert cells(table, 0)["mean base"].text.startswith("90.0 ± ")
    missing = cells(table, 2)
    assert missing["method"].text == "maple"
    assert (missing["H of means"].text, missing["H of means"].note) == ("–", "1 of 2")
    assert missing["shapes"].text == "–"
    assert "fewer than 6 datasets" in table.caption
    assert averages_table(reported([run for run in runs if run.result.key.dataset == "digits"])[0].sections[0]) is None


def test_a_fallback_is_starred(tmp_path):
    from dataclasses import replace

    run = record(tmp_path, "tip-adapter", {"base": 0.5, "novel": 0.5}, **B2N)
    parts = (run.result.parts[0], replace(run.result.parts[1], fallback=True))
    report, compared = reported([replace(run, result=replace(run.result, parts=parts))])
    section = report.sections[0]
    row = cells(results_table(section, compared[section.anchor]), 0)
    assert row["novel"].text == "50.0*"
    assert row["base"].text == "50.0"


# --- formats ----------------------------------------------------------------------------------------------------------


def test_csv_has_every_number_in_full_precision(runs):
    report, compared = reported(runs)
    rows = list(csv.DictReader(io.StringIO(to_csv(report, compared))))
    assert len(rows) == 6 * 4
    row = next(r for r in rows if r["method"] == "coop" and r["measure"] == "base" and r["dataset"] == "digits")
    assert float(row["mean"]) == report.cells[0].value("base")
    assert row["seeds"] == "1 2 3"
    assert [float(value) for value in row["values"].split()] == [0.8, 0.9, 1.0]
    other = next(r for r in rows if r["method"] == "zero-shot" and r["measure"] == "H of means")
    assert other["tie"] == "False"
    assert float(other["p"]) < 0.001


def test_json_is_plain_and_has_the_commands(runs):
    report, compared = reported(runs, [BadRun("x", "torn")])
    data = json.loads(json.dumps(to_data(report, compared), allow_nan=False))
    assert data["runs"] == 18
    assert data["damaged"] == [{"folder": "x", "reason": "torn"}]
    method = data["sections"][0]["groups"][0]["methods"][0]
    assert method["method"] == "coop"
    assert method["measures"]["base"]["mean"] == pytest.approx(0.9)
    assert method["runs"][0]["command"].startswith("adaptkit run --method coop")
    assert data["sections"][0]["averages"][0]["of"] == 2


def test_published_figures_are_in_every_format(tmp_path):
    run = record(
        tmp_path, "coop", {"base": 0.9, "novel": 0.7}, dataset="eurosat", source=JSON, backbone="ViT-B-16/openai", **B2N
    )
    report, compared = reported([run])
    assert [title for title, _ in all_tables(report, compared)][-1] == "Published figures"
    assert "92.19" in to_markdown(report, compared)
    assert "92.19" in to_latex(report, compared)
    assert to_data(report, compared)["sections"][0]["published"][0]["published"]["accuracy"] == 92.19


HOSTILE = "<script>alert(1)</script>|`x`*[a](http://b)_%$&#{}\\~^\n=cmd()"


def test_hostile_names_break_no_format(tmp_path):
    report, compared = reported([record(tmp_path, "coop", dataset=HOSTILE), record(tmp_path, "coop", dataset="=1+1")])
    markdown = to_markdown(report, compared)
    assert "\\<script\\>alert(1)\\</script\\>\\|\\`x\\`\\*\\[a\\](http://b)" in markdown
    results = markdown.split("### Results")[1].split("\n\n")[1].splitlines()
    assert len(results) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in results} == {10}
    latex = to_latex(report, compared)
    assert "\\textless{}script\\textgreater{}" in latex
    assert r"\_\%\$\&\#\{\}\textbackslash{}\textasciitilde{}\textasciicircum{}" in latex
    rows = list(csv.DictReader(io.StringIO(to_csv(report, compared))))
    assert {row["dataset"] for row in rows} == {HOSTILE, "'=1+1"}


def test_latex_is_whole(runs):
    report, compared = reported(runs)
    text = to_latex(report, compared)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    body = text.split(r"\midrule")[2].split(r"\bottomrule")[0]
    assert {line.count(" & ") for line in body.splitlines() if line.endswith(r"\\")} == {7}
    assert r"\textbf{90.0 $\pm$ 24.8}" in text
    assert r"\underline{" in text
    assert latex_text("±−≈●–") == r"$\pm$$-$$\approx$$\bullet$--"
