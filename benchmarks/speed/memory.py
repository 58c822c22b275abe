"""One step in a process of its own: `python -m benchmarks.speed.memory ORDER` prints its peak memory as JSON."""

from __future__ import annotations

import json
import sys

import torch

from adaptkit.backbones import load_backbone
from benchmarks.speed.measure import peak_above
from benchmarks.speed.training import Case


def one_step(case: Case, side: str) -> object:
    """A step on a side, "ours" or "plain"."""
    return case.our_step() if side == "ours" else case.plain.step()


def measure(name: str, backbone: str, device: str, side: str, classes: int, batch: int) -> int | None:
    """Peak bytes of one step above what is held before it; None where a GPU doesn't hold it.

    Args:
        name: The method's.
        backbone: Its name.
        device: "cpu" or "cuda".
        side: "ours" or "plain".
        classes: How many.
        batch: Images.
    """
    loaded = load_backbone(backbone, device=device)
    case = Case(name, loaded, classes, batch)
    one_step(Case(name, loaded, 2, 1), side)  # kernels set themselves up on first use
    try:
        return peak_above(lambda: one_step(case, side), loaded.device)
    except torch.OutOfMemoryError:
        return None


if __name__ == "__main__":
    print(json.dumps({"bytes": measure(**json.loads(sys.argv[1]))}))
