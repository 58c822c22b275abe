"""Several processes that do one run together: each trains and tests on its share of every batch and every test split.

`torchrun` or `accelerate launch` starts them, accelerate connects them. What is trained is small and whole in every
process; its gradients are summed once per step, in one message, weighted by what each share counts. The frozen decoder
layers of a model that one device can't hold are spread over the devices on request (`GradientMethod.spread`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.errors import TrainingError, UnsupportedError


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Args:
        rank: This one's number; 0 writes and prints.
        count: How many there are.
        device: This one's device.
        sharded: Whether frozen decoder layers are spread over the processes.
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"
    sharded: bool = False

    @property
    def main(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def share(self, indices: Tensor) -> Tensor:
        """This process's share of a batch, in order; the shares differ by one at most."""
        return torch.tensor_split(indices, self.count)[self.rank]

    def padded_share(self, indices: Tensor) -> Tensor:
        """The same, but as long as the longest share, by repeating its last index (or the first of all)."""
        share, longest = self.share(indices), -(-len(indices) // self.count)
        filler = share[-1:] if len(share) else indices[:1]
        return torch.cat([share, filler.expand(longest - len(share))])

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        summed: Tensor = import_module("accelerate.utils").reduce(values, reduction="sum")
        return summed

    def joined(self, rows: Tensor, count: int) -> Tensor:
        """The rows of all processes' `padded_share` of `count` items, in the order of the items.

        Raises:
            TrainingError: They aren't as many as there are items.
        """
        parts = self.rows_of_all(rows).split(len(rows))
        lengths = [len(part) for part in torch.tensor_split(torch.arange(count), self.count)]
        whole = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
        if len(whole) != count:
            raise TrainingError(f"{count} images were to be answered by {self.count} processes, and {len(whole)} were.")
        return whole

    def rows_of_all(self, rows: Tensor) -> Tensor:
        """The rows of all processes, as many of each, in the order of the ranks."""
        found: Tensor = import_module("accelerate.utils").gather(rows.contiguous())
        return found

    def gathered(self, value: Any) -> list[Any]:
        """A value of every process, by rank."""
        found: list[Any] = import_module("accelerate.utils").gather_object([value])
        return found


ALONE = Processes()
_current = ALONE


def current() -> Processes:
    """The processes of the run under way; one, unless `together` found more."""
    return _current


def launched() -> int:
    """How many processes a launcher started for one run."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() else 1


@contextmanager
def together(device: str) -> Iterator[Processes]:
    """Connect the processes that a launcher started; without one there is nothing to connect.

    Args:
        device: "cpu", or "cuda" for one GPU each.

    Raises:
        UnsupportedError: accelerate is missing, or all were sent to the same GPU.
    """
    global _current
    if launched() == 1:
        yield ALONE
        return
    if ":" in device:
        raise UnsupportedError(
            f"{launched()} processes were started and all were sent to {device}: say --device cuda, and each gets its"
            " own."
        )
    try:
        state = import_module("accelerate").PartialState(cpu=device == "cpu")
    except ImportError as error:
        raise UnsupportedError(
            f"Several processes are connected by accelerate, which can't be imported ({error}): pip install"
            " 'adaptkit[scale]', or start without torchrun."
        ) from error
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    _current = Processes(state.process_index, state.num_processes, str(state.device), sharded)
    try:
        yield _current
        state.wait_for_everyone()
    finally:
        _current = ALONE
        state.destroy_process_group()


# --- gradients --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTotals:
    """What a step came to over all processes.

    Args:
        terms: Loss terms of the whole batch.
        correct: Right answers among the batch's; None where the loss shows no logits.
        due: Whether a checkpoint is due, which process 0 says.
    """

    terms: dict[str, Tensor]
    correct: Tensor | None
    due: bool


def sum_step(
    processes: Processes,
    parameters: Sequence[nn.Parameter],
    terms: Mapping[str, Tensor],
    correct: Tensor | None,
    weight: float,
    due: bool,
) -> StepTotals:
    """Make gradients and loss terms those of the whole batch, in one message.

    Each share's loss is a mean over what it supervises (images, or tokens of answers); the whole batch's is the mean of
    these, weighted by how much each share supervises.

    Args:
        processes: All of them call this.
        parameters: With the gradients of this process's share, which are replaced.
        terms: Of this share.
        correct: Right answers in this share.
        weight: What this share counts; 0 for one that only filled up.
        due: Whether this process finds that a checkpoint is due.
    """
    device = parameters[0].device
    own = [p.grad for p in parameters]
    gradients = [torch.zeros_like(p).float() if g is None else g.float() for p, g in zip(parameters, own, strict=True)]
    facts = [
        weight,
        0.0 if correct is None else float(correct) * (weight > 0),
        float(due and processes.main),
        *(float(g is not None) for g in own),
    ]
    losses = torch.stack([term.detach().float() for term in terms.values()])
    parts = [torch.tensor(facts, device=device), weight * losses, *(weight * g.flatten() for g in gradients)]
    flat = processes.total(torch.cat(parts))
    facts_of_all, losses, rest = flat.split([len(facts), len(losses), len(flat) - len(facts) - len(losses)])
    whole = facts_of_all[0]
    sizes = [p.numel() for p in parameters]
    for p, total, there in zip(parameters, rest.split(sizes), facts_of_all[3:].tolist(), strict=True):
        p.grad = (total / whole).view_as(p).to(p.dtype) if there else None
    shared = dict(zip(terms, losses / whole, strict=True))
    return StepTotals(shared, None if correct is None else facts_of_all[1], bool(facts_of_all[2] > 0))
