"""Reading many runs: all of them, once each, and the damaged ones named."""

from __future__ import annotations

import json
import time

import pytest

from adaptkit.errors import MissingPathError
from adaptkit.sweeps.results import read_runs, run_folders
from tests.sweeps.made import made_result, write_result


def test_all_runs_are_found_once_and_damaged_ones_are_named(tmp_path):
    folders = [write_result(tmp_path, made_result(seed=seed)) for seed in range(5)]
    (folders[0] / "result.json").write_text("{ cut off")
    changed = json.loads((folders[1] / "result.json").read_text())
    changed["key"]["seed"] = 77
    (folders[1] / "result.json").write_text(json.dumps(changed))
    (tmp_path / "best").symlink_to(folders[2], target_is_directory=True)
    being_written = tmp_path / "runs" / ".x.1234.abcd.tmp"
    being_written.mkdir()
    (being_written / "result.json").write_text((folders[2] / "result.json").read_text())
    records, damaged = read_runs([tmp_path, tmp_path / "runs", folders[3]])
    assert sorted(record.folder for record in records) == sorted(folders[2:])
    assert {record.result.key.seed for record in records} == {2, 3, 4}
    reasons = {bad.folder: bad.reason for bad in damaged}
    assert set(reasons) == set(folders[:2])
    assert "damaged" in reasons[folders[0]]
    assert "doesn't match its own key" in reasons[folders[1]]


def test_a_run_is_found_by_its_own_folder_and_nothing_in_an_empty_one(tmp_path):
    folder = write_result(tmp_path, made_result())
    assert list(run_folders(folder)) == [folder]
    (tmp_path / "empty").mkdir()
    assert read_runs([tmp_path / "empty"]) == ([], [])


def test_folders_that_are_not_there_are_all_named(tmp_path):
    with pytest.raises(MissingPathError, match=r"one, .*two"):
        read_runs([tmp_path / "one", tmp_path, tmp_path / "two"])


def test_reading_is_fast_enough_for_ten_thousand_in_ten_seconds(tmp_path):
    count = 300
    for seed in range(count):
        write_result(tmp_path, made_result(classes=100, seed=seed))
    began = time.process_time()  # other processes of the machine don't count
    records, damaged = read_runs([tmp_path])
    seconds = time.process_time() - began
    assert (len(records), len(damaged)) == (count, 0)
    assert seconds / count < 1.5e-3  # measured: 0.5 ms; the goal is 1 ms on a machine that does nothing else
