"""Batches of unit features around class texts, for the transductive methods' tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from adaptkit.methods.transductive._transduction import Support
from tests.methods.tiny import DIM

IMAGES = 40


def drawn(classes, seed=0, images=IMAGES, shots=2, spread=0.25):
    """Unit text weights, image features and shots around them, with labels."""
    numbers = torch.Generator().manual_seed(seed)
    text = F.normalize(torch.randn(classes, DIM, generator=numbers), dim=-1)
    labels = torch.arange(images) % classes
    f = F.normalize(text[labels] + spread * torch.randn(images, DIM, generator=numbers), dim=-1)
    shot_labels = torch.arange(classes).repeat_interleave(shots)
    support = F.normalize(text[shot_labels] + spread * torch.randn(len(shot_labels), DIM, generator=numbers), dim=-1)
    return f, text, labels, Support(support, shot_labels)
