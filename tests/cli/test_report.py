from __future__ import annotations

import csv
import json
import shutil

import pytest

from adaptkit.storage import read_json, write_json


@pytest.fixture
def compared(call, photos, tmp_path):
    """Two methods on the small photos, compared."""
    words = ("--methods", "zero-shot,linear-probe", "--shots", 2)
    outcome = call("compare", photos, *words, "--out", tmp_path / "runs", "--html", tmp_path / "compare.html", "--json")
    assert outcome.exit_code == 0, outcome.output
    return tmp_path / "runs"


def test_compare_writes_its_page_and_report_every_format(call, compared, tmp_path):
    assert "few-shot · mini" in (tmp_path / "compare.html").read_text()
    files = {name: tmp_path / f"out.{name}" for name in ("html", "markdown", "latex", "csv")}
    words = [word for name, path in files.items() for word in (f"--{name}", path)]
    outcome = call("report", compared, *words)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout == ""
    assert f"Written to {files['html']}" in outcome.stderr
    assert files["html"].read_text() == (tmp_path / "compare.html").read_text()
    assert "| linear-probe |" in files["markdown"].read_text()
    assert r"\toprule" in files["latex"].read_text()
    assert len(list(csv.DictReader(files["csv"].open()))) == 2


def test_wrong_answers_are_shown_as_pictures_or_as_names(call, photos, tmp_path):
    run, page = tmp_path / "run", tmp_path / "page.html"
    assert call("run", photos, "--method", "zero-shot", "--shots", 2, "--out", run).exit_code == 0
    assert call("report", run, "--html", page).exit_code == 0
    assert "data:image/png" in page.read_text()
    assert "taken for <b>" in page.read_text()
    outcome = call("report", run, "--html", page, "--no-pictures", "--json")
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout)["written"] == {"html": str(page)}
    assert "data:image/" not in page.read_text()
    assert "Names only: pictures weren&#39;t asked for" in page.read_text()
    shutil.rmtree(photos)
    assert call("report", run, "--html", page).exit_code == 0
    assert "Names only: the dataset can&#39;t be loaded here" in page.read_text()


def test_without_options_the_tables_are_printed(call, compared):
    outcome = call("report", compared / "zero-shot", compared)
    assert outcome.exit_code == 0, outcome.output
    assert "Results on photos, 2 shots" in " ".join(outcome.stdout.split())
    assert "linear-probe" in outcome.stdout
    assert "own split" not in outcome.stdout
    assert "no published figures are at hand" in outcome.stderr
    data = json.loads(call("report", compared, "--json").stdout)
    assert data["runs"] == 2


def test_a_damaged_run_is_listed_and_the_others_reported(call, compared, tmp_path, refused):
    shutil.copytree(compared / "zero-shot", compared / "torn")
    (compared / "torn/result.json").write_text("{")
    outcome = call("report", compared, "--json", "--html", tmp_path / "out.html")
    assert outcome.exit_code == 0, outcome.output
    assert len(json.loads(outcome.stdout)["damaged"]) == 1
    assert "left out: " in outcome.stderr
    assert str(compared / "torn") in outcome.stderr
    assert "1 damaged run was left out" in (tmp_path / "out.html").read_text()
    assert "all 1 runs found are damaged" in refused("report", compared / "torn")


def test_nothing_to_report_and_places_that_cant_be_written_are_refused(refused, call, compared, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no finished run" in refused("report", tmp_path / "empty")
    message = refused("report", tmp_path / "nowhere", tmp_path / "empty", tmp_path / "neither")
    assert "nowhere" in message
    assert "neither" in message
    assert "Missing argument" in refused("report")
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused("report", compared, "--html", tmp_path / "file/out.html").replace("\n", " ")
    assert "is a directory" in refused("report", compared, "--csv", tmp_path)


def test_mixed_versions_are_refused_before_anything_is_written(refused, compared, tmp_path):
    path = compared / "zero-shot/result.json"
    write_json(path, read_json(path) | {"schema_version": 99})
    message = refused("report", compared, "--html", tmp_path / "out.html")
    assert "version" in message
    assert not (tmp_path / "out.html").exists()
