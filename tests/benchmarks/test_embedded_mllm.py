"""The table of the language model's methods: its rows are real, and its page says what the runs hold."""

from __future__ import annotations

import click
import pytest

from adaptkit.methods import methods
from benchmarks.embedded.mllm import ENTRIES, chosen
from benchmarks.embedded.table import mllm_page


def test_rows_are_registered_methods_with_settings_of_theirs():
    for entry in ENTRIES:
        config = methods.get(entry.method).config_class
        assert set(entry.overrides) <= set(config.__dataclass_fields__), entry
    assert len(ENTRIES) == len({entry.name for entry in ENTRIES}) >= 18
    assert [entry.backbone for entry in ENTRIES[:2]] == ["mini", "mini"]  # CLIP's rows are always there


def test_rows_are_chosen_by_method_or_name():
    assert [e.name for e in chosen(["mllm-lora, letters"])] == ["mllm-lora, letters"]
    assert len(chosen(["mllm-lora"])) == 3
    with pytest.raises(click.UsageError, match="No row is called 'loar'"):
        chosen(["loar"])


def run(method, seed, base, novel):
    return {"dataset": "toy", "method": method, "seed": seed, "base": base, "novel": novel, "trained": 5, "seconds": 1}


def test_the_page_has_means_and_gains():
    rows = [run("mllm-zero-shot", s, 0.5, 0.5) for s in (1, 2)]
    rows += [run("dive-k", 1, 0.6, 0.4), run("dive-k", 2, 0.8, 0.4)]
    page = mllm_page(rows, 16)
    assert "| mllm-zero-shot | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 | 5 | 1.0 |" in page
    assert "| dive-k | 70.0 ± 14.1 | 40.0 ± 0.0 | 50.9 |" in page
    assert "+20.0, -10.0" in page
    assert "not run" in page
