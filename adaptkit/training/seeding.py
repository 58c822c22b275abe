"""Random numbers from one seed: an independent generator for every purpose, and a seeded stretch of torch's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(seed: int, *names: str) -> int:
    """A seed in [0, 2⁶³) for one purpose, the same on every machine and in every process.

    Args:
        seed: The run's seed; any integer, 0 included.
        names: What the numbers are for ("batches"). Other names give an unrelated stream.

    Example:
        >>> derived_seed(0, "batches") == derived_seed(0, "views")
        False
    """
    text = "\x1f".join((str(int(seed)), *names))  # a separator no name holds, so that ("ab", "c") isn't ("a", "bc")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str) -> torch.Generator:
    """A CPU generator for one purpose; numbers drawn from it don't depend on the device that is trained on."""
    return torch.Generator().manual_seed(derived_seed(seed, *names))


@contextmanager
def seeded(seed: int, *names: str, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generators for what can't be handed one (dropout), and put them back afterwards."""
    devices = [device] if device is not None and device.type == "cuda" else []
    number = derived_seed(seed, *names)
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(number)  # torch.manual_seed would touch every device, restored or not
        for used in devices:
            with torch.cuda.device(used):
                torch.cuda.manual_seed(number)
        yield
