"""The memory of quantised towers, as `python -m benchmarks.quantised` measures it."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from benchmarks.quantised.__main__ import main


def test_blocks_shrink_and_features_stay_close():
    pytest.importorskip("bitsandbytes")
    outcome = CliRunner().invoke(main, ["mini"])
    assert outcome.exit_code == 0, outcome.output
    rows = re.findall(r"(fp32|int8|nf4)\D+([\d.]+)\D+([\d.]+)\D+([\d.]+)\D+([\d.]+)", outcome.output)
    assert [row[0] for row in rows] == ["fp32", "int8", "nf4"]
    blocks, cosines = [float(row[3]) for row in rows], [float(row[4]) for row in rows]
    assert blocks[0] > 3.5 * blocks[1] > 3.5 * blocks[2]
    assert cosines[0] == 1.0
    assert min(cosines) > 0.98
