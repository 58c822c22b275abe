"""EuroSAT and Caltech101 on their real images, through the commands: check, few-shot, base-to-novel."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

ROOT = os.environ.get("ADAPTKIT_DATA_ROOT", "")
FOLDERS = {"eurosat": "eurosat", "caltech101": "caltech-101"}
SIZES = {"eurosat": (13500, 5400, 8100), "caltech101": (4128, 1649, 2465)}
HALVES = {"eurosat": (4200, 3900), "caltech101": (1549, 916)}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ROOT, reason="ADAPTKIT_DATA_ROOT isn't set: no real images"),
]


@pytest.fixture(params=sorted(FOLDERS))
def name(request, monkeypatch):
    if not (Path(ROOT) / FOLDERS[request.param]).is_dir():
        pytest.skip(f"{request.param} isn't under {ROOT}")
    monkeypatch.setenv("ADAPTKIT_DATA_ROOT", ROOT)  # the folder's fixture took it away
    return request.param


def test_check(call, name):
    outcome = call("data", "check", name, "--json")
    assert outcome.exit_code == 0, outcome.output
    facts = json.loads(outcome.stdout)
    assert tuple(sum(facts["counts"][split].values()) for split in ("train", "val", "test")) == SIZES[name]
    assert facts["problems"] == facts["differences"] == facts["corrupt"] == facts["missing"] == []


def test_few_shot(call, name, tmp_path):
    outcome = call("run", name, "--method", "tip-adapter", "--shots", 4, "--out", tmp_path / "run", "--json")
    assert outcome.exit_code == 0, outcome.output
    (part,) = json.loads(outcome.stdout)["parts"]
    assert part["total"] == SIZES[name][2]
    assert part["correct"] / part["total"] > 2 / {"eurosat": 10, "caltech101": 100}[name]


def test_base_to_novel(call, name, tmp_path):
    words = ("run", name, "--method", "coop", "--shots", 2, "--protocol", "base-to-novel")
    outcome = call(*words, "--set", "training.epochs=5", "--out", tmp_path / "run", "--json")
    assert outcome.exit_code == 0, outcome.output
    parts = json.loads(outcome.stdout)["parts"]
    assert tuple(part["total"] for part in parts) == HALVES[name]
    assert [part["name"] for part in parts] == ["base", "novel"]
