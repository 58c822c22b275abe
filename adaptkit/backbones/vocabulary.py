"""The words of a backbone's token embedding, and which of them lie nearest to a vector."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.errors import ConfigError

CHUNK = 8192
"""Tokens compared at once, so that 49,408 of them never lie there in double precision together."""


class Nearest(NamedTuple):
    """The nearest tokens of each vector, nearest first, all [vectors, top].

    Args:
        tokens: Rows of the embedding, int64; of equally near ones the lower comes first.
        distances: Euclidean, float64.
        cosines: Of the same pairs, float64; 0 where a vector is zero.
    """

    tokens: Tensor
    distances: Tensor
    cosines: Tensor


@torch.no_grad()
def nearest_words(vectors: Tensor, embedding: Tensor, top: int = 3, *, chunk: int = CHUNK) -> Nearest:
    """The tokens whose embeddings lie nearest to vectors, by Euclidean distance.

    In double precision, on the embedding's device: the expanded square loses small distances in fp32.

    Args:
        vectors: [vectors, width].
        embedding: [tokens, width]; all tokens take part, also start, end and single bytes.
        top: How many per vector; no more than there are tokens.
        chunk: Tokens compared at once.

    Raises:
        ConfigError: The widths differ, or `top` or `chunk` is below 1.

    Source: arXiv 2109.01134, the experiments on interpreting the learned prompts.

    Example:
        >>> nearest_words(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]]), 1).tokens.tolist()
        [[0]]
    """
    if vectors.dim() != 2 or embedding.dim() != 2 or vectors.shape[1] != embedding.shape[1]:
        raise ConfigError(
            f"Vectors of shape {tuple(vectors.shape)} can't be compared with an embedding of shape"
            f" {tuple(embedding.shape)}: both must be [rows, width], with one width."
        )
    if top < 1 or chunk < 1:
        raise ConfigError(f"top is {top} and chunk is {chunk}, but both must be at least 1.")
    v = vectors.to(embedding.device, torch.float64)
    best = v.new_zeros(len(v), 0)  # squared distances
    tokens = torch.zeros(len(v), 0, dtype=torch.int64, device=v.device)
    for start in range(0, len(embedding), chunk):
        part = embedding[start : start + chunk].double()  # [chunk, width]
        squares = v.square().sum(1, keepdim=True) - 2 * v @ part.T + part.square().sum(1)  # [vectors, chunk]
        ids = torch.arange(start, start + len(part), device=v.device).expand(len(v), -1)
        best, order = torch.cat([best, squares], dim=1).sort(dim=1, stable=True)
        tokens = torch.cat([tokens, ids], dim=1).gather(1, order)[:, :top]
        best = best[:, :top]
    words = embedding[tokens].double()  # [vectors, top, width]
    distances = (v[:, None] - words).norm(dim=-1)  # anew: the expanded square of equal vectors isn't exactly 0
    return Nearest(tokens, distances, F.cosine_similarity(v[:, None], words, dim=-1, eps=1e-30))
