"""`adaptkit doctor`: what it finds, and what it calls a problem."""

from __future__ import annotations

import json
import os
from importlib import metadata

import adaptkit


def test_facts_name_this_machine(call, tmp_path):
    facts = json.loads(call("doctor", "--json").stdout)
    assert facts["adaptkit"] == adaptkit.__version__
    assert facts["packages"]["numpy"] == metadata.version("numpy")
    assert str(tmp_path / "cache") in facts["cache"]
    assert facts["data root"].startswith("not set")
    assert "Everything needed is there" in call("doctor").output


def test_a_missing_package_and_a_locked_cache_are_problems(call, monkeypatch):
    known = metadata.version

    def version(name: str) -> str:
        if name == "scikit-learn":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    outcome = call("doctor", "--json")
    assert outcome.exit_code == 1
    problems = json.loads(outcome.stdout)["problems"]
    assert len(problems) == 2
    assert "pip install scikit-learn" in problems[0]
    assert "ADAPTKIT_CACHE" in problems[1]
