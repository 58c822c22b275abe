"""A Q-Former's two sides, masks and first-stage losses, for the layers that BLIP-2 and InstructBLIP share.

Source: BLIP-2 arXiv 2301.12597; mllm sheet `blip2-qformer.md` (masks of the three modes, ITC, ITM, ITG);
transformers 5.24, blip_2 and instructblip.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.methods.base import draw_linear
from adaptkit.methods.lora._towers import shared_copy

Mode = Literal["apart", "together", "decoding"]
SMOOTHING = 0.1


def sees(mode: Mode, queries: int, texts: int) -> Tensor:
    """Which positions see which, bool [queries + texts, queries + texts]; queries come first.

    Args:
        mode: apart (neither side sees the other, for ITC), together (all see all, for ITM) or decoding (texts see the
            queries and what is before them, queries see queries, for ITG).
        queries: How many queries.
        texts: How many text positions.
    """
    total = queries + texts
    seen = torch.zeros(total, total, dtype=torch.bool)
    seen[:queries, :queries] = True
    seen[queries:, queries:] = True
    if mode == "together":
        seen[:] = True
    elif mode == "decoding":
        seen[queries:, :queries] = True
        seen[queries:, queries:] = torch.ones(texts, texts).tril().bool()
    return seen


def run_layers(former: nn.Module, states: Tensor, visible: Tensor, images: Tensor | None, queries: int) -> Tensor:
    """Last states [rows, queries + texts, width] of a Q-Former's layers under any mask.

    Args:
        former: The library's Q-Former.
        states: Query vectors and text vectors [rows, queries + texts, width], before its LayerNorm.
        visible: Which positions see which, bool [rows, queries + texts, queries + texts].
        images: Vision states [rows, positions, vision width]; None without queries.
        queries: How many of the positions are queries.
    """
    module: Any = former
    norm = module.embeddings.layernorm if hasattr(module, "embeddings") else module.layernorm
    states = norm(states.to(norm.weight.dtype))
    mask = torch.zeros(visible.shape, dtype=states.dtype, device=states.device)
    mask = mask.masked_fill(~visible, torch.finfo(states.dtype).min)[:, None]  # [rows, 1, positions, positions]
    shown = None if images is None else images.to(states.dtype)
    out: Tensor = module.encoder(
        states, attention_mask=mask, encoder_hidden_states=shown, query_length=queries
    ).last_hidden_state
    return out


def give_text_side(former: nn.Module, *, own: bool) -> None:
    """Let a Q-Former without text layers (BLIP-2's in language models) read texts with those of its queries.

    Args:
        former: Of a twin.
        own: Whether texts get trainable copies, not the same modules.
    """
    module: Any = former
    for layer in module.encoder.layer:
        if not hasattr(layer, "intermediate"):
            layer.intermediate, layer.output = layer.intermediate_query, layer.output_query
            if own:
                layer.intermediate = copy.deepcopy(layer.intermediate_query).requires_grad_(True)
                layer.output = copy.deepcopy(layer.output_query).requires_grad_(True)


def nearest_query(queries: Tensor, texts: Tensor) -> Tensor:
    """Cosine of each text with the nearest of each image's queries, [images, texts].

    Args:
        queries: Unit rows [images, queries, dim].
        texts: Unit rows [texts, dim].
    """
    return torch.einsum("iqd,td->itq", queries, texts).amax(dim=2)


def contrast_loss(similarity: Tensor, labels: Tensor) -> Tensor:
    """ITC: both directions of a smoothed cross-entropy, averaged; images of one class share their targets.

    Args:
        similarity: Of image i and text j, over the temperature, [batch, batch].
        labels: Class of each pair, int64 [batch].
    """
    same = (labels[:, None] == labels).to(similarity)
    targets = (1 - SMOOTHING) * same / same.sum(dim=1, keepdim=True) + SMOOTHING / len(labels)
    return (F.cross_entropy(similarity, targets) + F.cross_entropy(similarity.T, targets)) / 2


def hard_negatives(similarity: Tensor, labels: Tensor) -> Tensor:
    """For each row of `similarity` [batch, batch] a column of another class, drawn by softmax, int64 [batch].

    Where a batch holds only one class, any other column is one. Draws come from torch's own generator.
    """
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    same = labels[:, None] == labels
    barred = torch.where(same.all(dim=1, keepdim=True), own, same)
    shares = similarity.detach().float().masked_fill(barred, -torch.inf).softmax(dim=1)
    return torch.multinomial(shares.cpu(), 1)[:, 0].to(labels.device)


class FirstStage(nn.Module):
    """What the first stage trains beside the Q-Former: texts in and out, projections, heads and a temperature.

    Texts are the language model's tokens through its frozen embeddings, since checkpoints of language models come
    without the Q-Former's own text tower.

    Args:
        width: Of the Q-Former.
        language: Width of the language model's embeddings.
        longest: Most tokens of a text.
        numbers: Draws the weights.
        decodes: Whether there is a head for ITG.
    """

    def __init__(self, width: int, language: int, longest: int, numbers: torch.Generator, *, decodes: bool) -> None:
        super().__init__()
        self.read = draw_linear(language, width, numbers)
        self.start, self.decode = (nn.Parameter(0.02 * torch.randn(width, generator=numbers)) for _ in range(2))
        self.positions = nn.Parameter(0.02 * torch.randn(1 + longest, width, generator=numbers))
        self.vision, self.text = (draw_linear(width, 256, numbers) for _ in range(2))
        self.match = draw_linear(width, 2, numbers)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.say = draw_linear(width, language, numbers) if decodes else None

    def texts(self, embeddings: Tensor, *, decoding: bool = False) -> Tensor:
        """Text vectors [texts, 1 + length, width] of token embeddings [texts, length, language]; a start first."""
        first = (self.decode if decoding else self.start).expand(len(embeddings), 1, -1)
        states = torch.cat([first, self.read(embeddings.detach().float())], dim=1)
        out: Tensor = states + self.positions[: states.shape[1]]
        return out

    @property
    def scale(self) -> Tensor:
        """One over the temperature, which stays at 0.001 or above, []."""
        return 1 / self.temperature.clamp(min=1e-3)


def swap_language(model: Any, language: nn.Module, numbers: torch.Generator) -> Any:
    """A BLIP-2 model with another language model: the same vision encoder and Q-Former, a new projection.

    Nothing of `model` changes, and what stays the same is shared with it. Source: mBLIP arXiv 2307.06930.

    Args:
        model: A `Blip2ForConditionalGeneration` or `InstructBlipForConditionalGeneration`.
        language: A causal language model of transformers.
        numbers: Draws the projection.
    """
    swapped = shared_copy(model)
    width = int(language.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
    swapped.config = copy.deepcopy(model.config)
    swapped.config.text_config = copy.deepcopy(language.config)
    swapped.language_model = language
    swapped.language_projection = draw_linear(model.language_projection.in_features, width, numbers)
    return swapped
