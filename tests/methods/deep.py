"""Deep prompts computed the plain way, every token of every row, block by block; and SigLIP-like towers."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.backbones.tower import BlockShape, ImageShape, ImageTower, TextShape, TextTower
from tests.methods.tiny import DIM, SIZE, Letters, _fill, tiny_clip


def plain_text(backbone, names, words, prompts) -> Tensor:
    """Unit features [classes, dim] of "<words> <name>." with prompts over its first tokens before each block."""
    tower, count = backbone.text_tower, len(prompts[0])
    tokens = backbone.tokenize([f"{words} {name.replace('_', ' ')}." for name in names])
    start = tokens.ids[0].tolist().index(backbone.word_pieces(words)[0])

    def overwritten(x, layer):
        return torch.cat([x[:, :start], prompts[layer].expand(len(x), -1, -1), x[:, start + count :]], dim=1)

    length = tokens.ids.shape[1]
    x = overwritten(tower.token_embedding(tokens.ids), 0) + tower.positional_embedding  # [classes, length, width]
    mask = torch.ones(length, length).tril().bool() if tower.causal else None
    for layer, block in enumerate(tower.blocks):
        x = block(overwritten(x, layer) if 0 < layer < len(prompts) else x, mask=mask)
    return F.normalize(tower.projection(tower.ln_final(x))[range(len(x)), tokens.ends], dim=-1)


def plain_image(backbone, pixels, prompts) -> Tensor:
    """Unit features [batch, dim] with prompts behind the patches; none for the frozen tower."""
    tower, count = backbone.image_tower, len(prompts[0]) if prompts else 0
    x = tower.embed(pixels)
    if prompts:
        x = torch.cat([x, prompts[0].expand(len(x), -1, -1)], dim=1)
    x = tower.ln_pre(x)
    for layer, block in enumerate(tower.blocks):
        if 0 < layer < len(prompts):
            x = torch.cat([x[:, :-count], prompts[layer].expand(len(x), -1, -1)], dim=1)
        x = block(x)
    x = tower.ln_post(x)
    pooled = x[:, 0] if tower.pool_head is None else tower.pool_head(x)
    return F.normalize(tower.projection(pooled), dim=-1)


def assert_same_gradients(ours: Tensor, wanted: Tensor, parameters) -> None:
    """Both losses give every parameter the same gradient, and none of them nothing."""
    parameters = list(parameters)
    got, theirs = torch.autograd.grad(ours, parameters), torch.autograd.grad(wanted, parameters)
    for mine, other in zip(got, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
        assert float(mine.norm()) > 0


def siglip_like() -> DualEncoder:
    """No causal mask, no class token, no first norm, an attention pool; logits with a bias."""
    text = TextTower(TextShape(BlockShape(16, 2, 3, 32), 92, 12, DIM, causal=False, projection_bias=True))
    shape = ImageShape(
        BlockShape(24, 2, 3, 48), SIZE, 8, DIM, class_token=False, ln_pre=False, patch_bias=True, pool="attention"
    )
    image = ImageTower(shape)
    _fill(text, 4)
    _fill(image, 5)
    spec = replace(tiny_clip().spec, name="siglip-like", context_length=12)
    return DualEncoder(spec, image, text, Letters(), logit_scale=10.0, logit_bias=-3.0)
