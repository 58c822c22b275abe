"""Token embeddings by formula, for the tokens that `mini` was never trained on.

Half of CLIP's vocabulary of 49,408 would be 12 MB of noise; a seeded draw gives the same noise on every machine
(NumPy's legacy generator is frozen).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

VOCABULARY, WIDTH = 49408, 128
_SEED, _SCALE = 20260101, 0.02


@lru_cache(maxsize=1)
def _table() -> Tensor:
    drawn = np.random.RandomState(_SEED).standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    return torch.from_numpy(drawn * np.float32(_SCALE))


def token_rows(ids: Sequence[int] | None = None) -> Tensor:
    """Embeddings [len(ids), WIDTH] of some tokens, or a copy of all [VOCABULARY, WIDTH]."""
    return _table().clone() if ids is None else _table()[list(ids)]
