"""One step in a process of its own: `python -m benchmarks.speed.memory ORDER` prints its peak memory as JSON."""

from __future__ import annotations

import json
import sys

from adaptkit.backbones import load_backbone
from benchmarks.speed.measure import peak_above
from benchmarks.speed.training import CASES, Case, Step


def one_step(case: Case, side: str) -> Step:
    """A step on a side, "ours" or "plain"."""
    return {"ours": case.our_step, "plain": case.plain_step}[side]()


def measure(name: str, backbone: str, side: str, classes: int, batch: int) -> int:
    """Peak bytes of one step above what is held before it.

    Args:
        name: "coop" or "maple".
        backbone: Its name.
        side: "ours" or "plain".
        classes: How many.
        batch: Images.
    """
    loaded = load_backbone(backbone)
    case = CASES[name](loaded, classes, batch)
    one_step(CASES[name](loaded, 2, 1), side)  # kernels set themselves up on first use
    return peak_above(lambda: one_step(case, side))


if __name__ == "__main__":
    print(json.dumps({"bytes": measure(**json.loads(sys.argv[1]))}))
