"""Spherical Gaussians over unit features, as UNEM's variant for vision-only features fits them.

Source: arXiv 2412.16739; unem sheet, "Gaussian version". The sheet names neither a start of the features' factor nor
the first assignments: the factor starts so that its square is the Dirichlet version's feature temperature, and the
first assignments are zero-shot's, which also serve classes without shots (the reference's backbones have no text).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptkit.methods.transductive._dirichlet import EPS


def log_densities(f: Tensor, centres: Tensor, factor: Tensor) -> Tensor:
    """-1/2 |factor · f - factor · w|² up to a number per image, [..., images, classes].

    Args:
        f: Unit features [..., images, dim].
        centres: [..., classes, dim].
        factor: [].
    """
    return factor.square() * (f @ centres.transpose(-1, -2) - 0.5 * centres.square().sum(dim=-1).unsqueeze(-2))


def gaussian_mixture(
    chunks: Sequence[Tensor],
    log_u: Sequence[Tensor],
    layers: Sequence[tuple[Tensor | float, Tensor | float]],
    factor: Tensor,
    support: tuple[Tensor, Tensor],
) -> list[Tensor]:
    """Log-assignments [..., images, classes] of each chunk after one EM iteration per layer; differentiable.

    Args:
        chunks: Unit features [..., images, dim] of a batch, in parts.
        log_u: First log-assignments of each part; their dtype is that of the answers.
        layers: Class weight and temperature of each iteration.
        factor: Of the features, [].
        support: Number of shots [..., classes] and sum of their features [..., classes, dim], float64.
    """
    current, images = list(log_u), sum(part.shape[-2] for part in chunks)
    for weight, temperature in layers:
        mass, sums = torch.zeros_like(support[0]), torch.zeros_like(support[1])
        for part, assigned in zip(chunks, current, strict=True):
            u = assigned.double().exp()
            mass, sums = mass + u.sum(dim=-2), sums + u.transpose(-1, -2) @ part.double()
        total = (mass + support[0]).clamp_min(EPS).unsqueeze(-1)
        centres = (sums + support[1]) / total
        v = (torch.log(mass / images + EPS) + 1).unsqueeze(-2)
        current = [
            ((log_densities(part.double(), centres, factor) + weight * v) / temperature)
            .log_softmax(dim=-1)
            .to(assigned.dtype)
            for part, assigned in zip(chunks, current, strict=True)
        ]
    return current
