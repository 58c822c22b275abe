"""P-Former: a text-only teacher that says which prompt vectors would make a frozen language model say a sentence.

It is trained on captions alone, before any image is looked at, and then pulls what a bridge makes of an image towards
the prompt of the image's caption. At inference it is gone: it is never a part of a method's state.

Source: P-Former arXiv 2307.07063; mllm sheet `p-former.md` (three losses of stage 0, masking of 25 %, weights).
Differs from the paper: a small encoder of our own, from scratch on the language model's token embeddings, in the place
of BERT-base, so its rates are ten times the paper's (1e-3 to 1e-4), for steps of at most 32 sentences; prompts stand
where the model's chat template has an image; a cosine without warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.mllm.model import MLLM
from adaptkit.types import ProgressCallback

MASKED = 0.25
"""Share of a sentence's tokens that are hidden from the teacher in each step."""

WIDTH, LAYERS, CONTRAST = 128, 2, 256
BATCH, RATE, DECAY = 32, 1e-3, 0.05

_DISTANCES = 2**24
"""How many distances to vocabulary embeddings are computed together."""


class PromptTeacher(nn.Module):
    """From sentences to prompts of `tokens` vectors each.

    Args:
        mllm: Whose token embeddings are read and whose embedding space is written to.
        tokens: Vectors per sentence.
        longest: Most tokens of a sentence.
        seed: Draws all weights.
    """

    def __init__(self, mllm: MLLM, tokens: int, longest: int, seed: int) -> None:
        super().__init__()
        self._mllm = (mllm,)  # a tuple: it isn't a part of this
        width = int(mllm.model.get_input_embeddings().weight.shape[1])
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.embed = nn.Linear(width, WIDTH)
            self.start, self.mask = (nn.Parameter(0.02 * torch.randn(WIDTH)) for _ in range(2))
            self.positions = nn.Parameter(0.02 * torch.randn(1 + longest, WIDTH))
            layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
            self.spread = nn.Linear(WIDTH, tokens * WIDTH)
            self.shape = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, width))
            self.contrast = nn.Linear(WIDTH, CONTRAST)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))
        self.to(mllm.device)

    def forward(self, rows: Sequence[Sequence[int]], numbers: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Prompts [sentences, n, width], and first states [sentences, WIDTH], both fp32.

        Args:
            rows: Tokens of sentences.
            numbers: Where masks come from; None hides nothing.
        """
        mllm, length = self._mllm[0], max(map(len, rows))
        ids = torch.tensor([list(row) + [0] * (length - len(row)) for row in rows], device=mllm.device)
        there = torch.arange(length, device=ids.device) < torch.tensor([[len(row)] for row in rows], device=ids.device)
        states = self.embed(mllm.embed(ids).detach().float())
        if numbers is not None:
            hidden = torch.rand(ids.shape, generator=numbers).to(ids.device) < MASKED
            states = torch.where(hidden[..., None], self.mask, states)
        states = torch.cat([self.start.expand(len(ids), 1, -1), states], dim=1) + self.positions[: 1 + length]
        padding = torch.cat([there.new_zeros(len(ids), 1), ~there], dim=1)
        first = self.encoder(states, src_key_padding_mask=padding)[:, 0]
        return self.shape(self.spread(first).unflatten(1, (-1, WIDTH))), first

    def spreading(self, first: Tensor) -> Tensor:
        """Cross-entropy that tells each sentence from the batch's others, of first states [sentences, WIDTH]."""
        unit = F.normalize(self.contrast(first), dim=-1)
        similarity = unit @ unit.T / self.log_temperature.exp()
        return F.cross_entropy(similarity, torch.arange(len(unit), device=unit.device), label_smoothing=0.1)


def vocabulary_distance(prompts: Tensor, table: Tensor) -> Tensor:
    """Mean squared distance of vectors [..., width] to the nearest row of `table` [vocabulary, width] each.

    The nearest rows are constants; distances are computed in pieces of bounded size.
    """
    flat, table = prompts.reshape(-1, prompts.shape[-1]), table.detach().float()
    step = max(1, _DISTANCES // len(table))
    with torch.no_grad():
        nearest = torch.cat([torch.cdist(part, table).argmin(dim=1) for part in flat.split(step)])
    return F.mse_loss(flat, table[nearest])


def train_teacher(
    teacher: PromptTeacher,
    rows: Sequence[Sequence[int]],
    said: Callable[[Sequence[int], Tensor], Tensor],
    steps: int,
    numbers: torch.Generator,
    show: ProgressCallback,
) -> dict[str, Any]:
    """Stage 0: train on sentences until the model says each behind its prompt; returns facts.

    Args:
        teacher: Changed in place; frozen and in eval mode afterwards.
        rows: Tokens of each sentence.
        said: Minus the mean log-probability of sentences (by index) behind prompts [sentences, n, width].
        steps: How many steps, at least 1.
        numbers: Where batches and masks come from.
        show: Progress.
    """
    table = teacher._mllm[0].model.get_input_embeddings().weight
    parameters = list(teacher.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, RATE / 10)
    totals: list[float] = []
    with torch.enable_grad():
        for step in range(steps):
            picked = torch.randperm(len(rows), generator=numbers)[:BATCH].tolist()
            prompts, first = teacher([rows[i] for i in picked], numbers)
            loss = said(picked, prompts) + vocabulary_distance(prompts, table) + teacher.spreading(first)
            for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = grad  # of nothing else: the language model may hold trainables of a method
            optimiser.step()
            schedule.step()
            totals.append(float(loss.detach()))
            show("p-former", step + 1, steps)
    teacher.requires_grad_(False).eval()
    return {"sentences": len(rows), "steps": steps, "first_loss": totals[0], "last_loss": totals[-1]}
