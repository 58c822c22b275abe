"""Candidate likelihoods and their normalisations.

Source: mllm sheet `few-shot-classifier.md`, route 1.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Normalisation = Literal["sum", "mean", "pmi", "pmi-null", "calibrated"]
SHRINKAGE = 0.1
"""Weight of the pull of the calibration towards (1, 0), against a mean cross-entropy."""

_STEPS = 100


def normalised(scores: Tensor, lengths: Tensor, kind: Normalisation, prior: Tensor | None = None) -> Tensor:
    """Summed log-likelihoods as logits, [rows, candidates].

    Args:
        scores: Sums over tokens, [rows, candidates].
        lengths: Tokens of each candidate, [candidates].
        kind: "sum"; "mean" (also what is calibrated); "pmi" and "pmi-null", which take off `prior`.
        prior: Sums without the image, or of images without content, [k, candidates].
    """
    if kind == "sum":
        return scores
    if prior is not None:
        return scores - prior.mean(dim=0)
    return scores / lengths.to(scores)


def fit_calibration(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift per class, [classes] each, that make softmax(scale · score + shift) fit the labels.

    Args:
        scores: Normalised scores of the training images, [images, classes].
        labels: int64 [images].
    """
    scores = scores.double()
    scale = torch.ones(scores.shape[1], dtype=torch.float64, device=scores.device, requires_grad=True)
    shift = torch.zeros_like(scale, requires_grad=True)
    optimiser = torch.optim.LBFGS([scale, shift], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        pull = (scale - 1).square().mean() + shift.square().mean()
        loss = F.cross_entropy(scores * scale + shift, labels) + SHRINKAGE * pull
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    return scale.detach().float(), shift.detach().float()
