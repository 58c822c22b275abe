"""Prompts with context vectors the reference's way: all 77 tokens of every class (and image), nothing shared or cut."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.backbones.tower import BlockShape, TextShape, TextTower
from tests.methods.tiny import Letters, _fill, image_tower, query, tiny_clip

BACKBONE = tiny_clip()
SCALE = 20.0
FEATURES = query(BACKBONE, "image_features", 6)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
PETS = "a photo of a {}, a type of pet."
TIGHT = {"rtol": 1e-5, "atol": 1e-5}


def plain_weights(names, context, phrase, backbone=BACKBONE):
    """Unit class weights: the phrase's first tokens replaced by `context` [M, width], all 77 rows of every class."""
    tower, features = backbone.text_tower, []
    for name in names:
        tokens = backbone.tokenize([f"{phrase} {name.replace('_', ' ')}."])
        x = tower.token_embedding(tokens.ids[0])  # [77, width]
        x = torch.cat([x[:1], context, x[1 + len(context) :]]) + tower.positional_embedding
        mask = torch.ones(77, 77).tril().bool()
        for block in tower.blocks:
            x = block(x[None], mask=mask)[0]
        features.append(tower.projection(tower.ln_final(x))[int(tokens.ids[0].argmax())])
    return F.normalize(torch.stack(features), dim=-1)


def frozen_weights(names, template):
    texts = [template.replace("{}", name.replace("_", " ")) for name in names]
    return F.normalize(BACKBONE.encode_text(BACKBONE.tokenize(texts)), dim=-1)


def plain_logits(features, weights):
    return SCALE * F.normalize(features, dim=-1) @ weights.T


def moved(method, seed=0):
    """The method with a context that stands for a trained one."""
    with torch.no_grad():
        numbers = torch.Generator().manual_seed(seed)
        method.context += 0.05 * torch.randn(method.context.shape, generator=numbers)
    return method


def gradients(method):
    return {name: parameter.grad for name, parameter in method.named_parameters()}


def siglip_like():
    tower = TextTower(TextShape(BlockShape(16, 2, 2, 32), 92, 12, 16, causal=False))
    _fill(tower, 4)
    spec = replace(BACKBONE.spec, context_length=12)
    return DualEncoder(spec, image_tower(), tower, Letters(), logit_scale=10.0, logit_bias=-3.0)
