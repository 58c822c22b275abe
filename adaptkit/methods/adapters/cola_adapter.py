"""COLA's multi-modal adapter: patches and words attend to each other, a learned query gives the pair's score.

Source: arXiv 2305.03689, Sec. 4; cola_mm_adapter sheet; reference code arijitray1993/COLA, the example of its read-me.
Differs from the reference: padding behind a text is hidden from attention (there it takes part, so that a score depends
on the other texts of its batch), and what can't be seen behind the end token isn't computed; text tokens are computed
once for a class list; pairs go through in chunks of bounded memory. Choosing among classes is our extension: a class's
score is that of its prompt, or the mean over its prompts where there are several templates. Against class prompts, the
image-to-text half of the paper's contrastive objective is the cross-entropy (`loss`); its other half isn't defined
there, since several images of a batch share a prompt.
Kept: no positions in the adapter, so it is order-blind itself; scores without norm or temperature; post-norm layers.
The unused positional encoding of the reference doesn't exist here.

The score is learned from random numbers, CLIP's own isn't part of it: the paper trains on tens of thousands of images
with thousands of texts. From few shots of few classes it stays behind zero-shot on some data, and classes it never saw
stay near chance, though any text can be scored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptkit.backbones.base import Backbone
from adaptkit.backbones.tower import ImageTower, TextState
from adaptkit.errors import ConfigError, DataError
from adaptkit.methods import methods
from adaptkit.methods.base import GradientMethod, MethodConfig
from adaptkit.methods.folding import Fold
from adaptkit.methods.prompts._layout import open_image
from adaptkit.methods.prompts._representation import open_started_text, template_rows
from adaptkit.types import Reads, TrainingSettings

_TITLE = "The COLA adapter"
_TEXTS_AT_ONCE = 1024
_WIDTHS_KEPT = 20  # what the layers keep of a token for backward, in multiples of the width, the feed-forward apart


@dataclass(frozen=True)
class ColaAdapterConfig(MethodConfig):
    """Settings of the COLA adapter."""

    heads: int = field(default=4, metadata={"help": "Attention heads; must divide the text tower's width."})
    feedforward: int = field(default=2048, metadata={"help": "Width of the feed-forward layers."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout while training."})
    loss: Literal["sigmoid", "cross-entropy"] = field(
        default="sigmoid",
        metadata={"help": "sigmoid: each image-class pair is true or false; cross-entropy: one of the classes is."},
    )

    def __post_init__(self) -> None:
        for name in ("heads", "feedforward"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}, but must be at least 0 and below 1.")


@methods.register("cola-adapter")
class ColaAdapter(GradientMethod):
    """An encoder-decoder layer over an image's patches and a text's tokens; `query` [1, text width] is decoded.

    Trains `linear` (image width to text width), `transformer` and `query`.

    Attributes:
        activation_bytes: Pairs go through in chunks whose activations stay below this many bytes.
    """

    name = "cola-adapter"
    config_class = ColaAdapterConfig
    config: ColaAdapterConfig
    reads: ClassVar[Reads] = "images"
    # optimiser, batch and epochs aren't stated in the paper; lr and weight decay are (sheet)
    default_training = TrainingSettings(
        epochs=50,
        batch_size=64,
        optimiser="adamw",
        lr=1e-5,
        weight_decay=1e-4,
        schedule="constant",
        warmup_epochs=0,
        views=4,
        crop_scale=0.5,
    )
    activation_bytes: float = 1e9
    _texts: tuple[Tensor, Tensor] | None = None

    def build(self) -> None:
        image = self._image
        _, text = open_started_text(self.backbone, _TITLE)
        _check_heads(self.config.heads, text.width, self.backbone)
        drawn = int(torch.randint(2**62, (1,), generator=self.generator))
        with torch.random.fork_rng(devices=()):  # torch's layers draw from its own generator
            torch.default_generator.manual_seed(drawn)
            self.transformer = _transformer(text.width, self.config)
            self.linear = nn.Linear(image.width, text.width)
            self.query = nn.Parameter(torch.rand(1, text.width))

    # --- frozen tokens ------------------------------------------------------------------------------------------------

    @property
    def _image(self) -> ImageTower:
        return open_image(self.backbone, _TITLE)

    def classes_changed(self) -> None:
        backbone, _ = open_started_text(self.backbone, _TITLE)
        self._rows = template_rows(backbone, self.class_names, self.templates)
        self._texts = None

    def patch_tokens(self, pixels: Tensor) -> Tensor:
        """Frozen patch tokens [batch, patches, image width] on entry to the image tower's last block."""
        image = self._image
        with torch.set_grad_enabled(torch.is_grad_enabled() and pixels.requires_grad):
            tokens = image.hidden(pixels, stop=image.layers - 1)
        return tokens if image.class_embedding is None else tokens[:, 1:]

    def text_tokens(self) -> tuple[Tensor, Tensor]:
        """Frozen tokens of the class prompts on entry to the text tower's last block, template by template.

        Computed once for a class list, in fp32 also within autocast, since evaluation reads them too.

        Returns:
            Tokens [templates · classes, length, text width], zero behind a text's end; and which of them are the text's
            own, start and end included, bool [templates · classes, length].
        """
        device = self.backbone.device
        if self._texts is None or self._texts[0].device != device:
            _, text = open_started_text(self.backbone, _TITLE)
            # made in inference mode, they couldn't serve training
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                state = text.embed(self._rows.to(device))
                rows = torch.split(torch.arange(len(state.ends)), _TEXTS_AT_ONCE)
                parts = [_whole_rows(text.advance(state.take(part.tolist()), stop=text.layers - 1)) for part in rows]
                length = max(tokens.shape[1] for tokens, _ in parts)
                tokens = torch.cat([F.pad(part, (0, 0, 0, length - part.shape[1])) for part, _ in parts])
                mask = torch.cat([F.pad(part, (0, length - part.shape[1])) for _, part in parts])
            self._texts = (tokens, mask)
        return self._texts

    # --- scores -------------------------------------------------------------------------------------------------------

    def pair_scores(self, patch_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        """The score of every image with every text, [images, texts], fp32.

        Args:
            patch_tokens: [images, patches, image width], without the class token.
            text_tokens: [texts, length, text width].
            mask: bool [texts, length], True for a text's own tokens, start and end included. Others are hidden.

        Raises:
            DataError: The shapes don't fit together, or a text has no token.
        """
        _check_pairs(patch_tokens, text_tokens, mask, (self.linear.in_features, self.linear.out_features))
        patches = self.linear(patch_tokens)  # [images, patches, text width]
        words = word_means(text_tokens, mask)  # [texts, text width]
        pairs = torch.arange(len(patches) * len(words), device=words.device)  # texts of one image one after the other

        def score(part: Tensor) -> Tensor:
            at_image, at_text = part // len(words), part % len(words)
            decoded = decode(self.transformer, self.query, patches[at_image], text_tokens[at_text], mask[at_text])
            return (decoded.float() * words[at_text]).sum(dim=-1)  # [pairs]

        parts = torch.split(pairs, self._pairs_at_once(patches.shape[1] + mask.shape[1]))
        return torch.cat(_in_chunks(score, parts)).unflatten(0, (len(patches), len(words)))

    def _pairs_at_once(self, tokens: int) -> int:
        """How many pairs of that many tokens fit into `activation_bytes`."""
        config = self.config
        per_token = _WIDTHS_KEPT * self.linear.out_features + 3 * config.feedforward + 3 * config.heads * tokens
        return max(1, int(self.activation_bytes / (4 * per_token * tokens)))

    def forward(self, inputs: Tensor) -> Tensor:
        scores = self.pair_scores(self.patch_tokens(inputs), *self.text_tokens())  # [batch, templates · classes]
        return scores.unflatten(1, (len(self.templates), len(self.class_names))).mean(dim=1)  # [batch, classes]

    def fold(self) -> Fold:
        """The texts' tokens are frozen, so they stand in the head as they are, and no text tower runs."""
        return Fold(_PairHead(self), _PatchTower(self._image))

    def losses(self, inputs: Tensor, labels: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        """`sigmoid`: binary cross-entropy averaged over all pairs; or `cross_entropy` over the classes."""
        scores = self(inputs)  # [batch, classes]
        if self.config.loss == "cross-entropy":
            return {"cross_entropy": F.cross_entropy(scores, labels)}
        truth = F.one_hot(labels, scores.shape[1]).to(scores.dtype)
        return {"sigmoid": F.binary_cross_entropy_with_logits(scores, truth)}


def decode(transformer: nn.Module, query: Tensor, patches: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
    """The decoded query [pairs, width] of patches [pairs, n, width] and text tokens [pairs, length, width].

    Text tokens count where `mask` [pairs, length] is True.
    """
    hidden = torch.cat([torch.zeros_like(patches[..., 0], dtype=torch.bool), ~mask], dim=1)  # [pairs, n + length]
    joint = torch.cat([patches, texts.to(patches.dtype)], dim=1)  # [pairs, n + length, width]
    queries = query.to(joint.dtype).expand(joint.shape[0], 1, -1)
    decoded: Tensor = transformer(joint, queries, src_key_padding_mask=hidden, memory_key_padding_mask=hidden)
    return decoded[:, 0]


class _PatchTower(nn.Module):
    """The frozen image tower up to its last block: pixels to patch tokens [batch, patches, width]."""

    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        self.tower, self.stop = tower, tower.layers - 1

    def forward(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.tower.hidden(pixels, stop=self.stop)
        return tokens if self.tower.class_embedding is None else tokens[:, 1:]


class _PairHead(nn.Module):
    """`ColaAdapter.forward` from patch tokens on, for one list of classes."""

    texts: Tensor
    mask: Tensor
    words: Tensor
    query: Tensor

    def __init__(self, method: ColaAdapter) -> None:
        super().__init__()
        texts, mask = method.text_tokens()
        for name, value in (("texts", texts), ("mask", mask), ("words", word_means(texts, mask))):
            self.register_buffer(name, value.detach().clone())
        self.register_buffer("query", method.query.detach().clone())
        self.linear, self.transformer = copy.deepcopy(method.linear), copy.deepcopy(method.transformer)
        self.shape = (len(method.templates), len(method.class_names))
        self.requires_grad_(False).eval()

    def forward(self, patches: Tensor) -> Tensor:
        """Logits [batch, classes] of patch tokens; one text after the other, which bounds the memory."""
        patches = self.linear(patches)  # [batch, patches, text width]
        scores = []
        for row in range(self.texts.shape[0]):
            texts = self.texts[row].expand(patches.shape[0], -1, -1)
            mask = self.mask[row].expand(patches.shape[0], -1)
            decoded = decode(self.transformer, self.query, patches, texts, mask)  # [batch, text width]
            scores.append((decoded.float() * self.words[row]).sum(dim=-1))
        return torch.stack(scores, dim=1).unflatten(1, self.shape).mean(dim=1)  # [batch, classes]


def _check_heads(heads: int, width: int, backbone: Backbone) -> None:
    if width % heads:
        raise ConfigError(
            f"heads is {heads}, but must divide {width}, the width of {backbone.spec.name!r}'s text tower: choose"
            f" another number (1 always works)."
        )


def _transformer(width: int, config: ColaAdapterConfig) -> nn.Transformer:
    """One encoder and one decoder layer with final norms."""
    sizes: dict[str, Any] = {
        "dim_feedforward": config.feedforward,
        "dropout": config.dropout,
        "batch_first": True,
    }
    layer = nn.TransformerEncoderLayer(width, config.heads, **sizes)
    # without nested tensors, whose short cut warns and cuts off columns that are padding in all rows
    encoder = nn.TransformerEncoder(layer, 1, nn.LayerNorm(width), enable_nested_tensor=False)
    return nn.Transformer(width, config.heads, num_decoder_layers=1, custom_encoder=encoder, **sizes)


def _whole_rows(state: TextState) -> tuple[Tensor, Tensor]:
    """Each text's tokens [rows, n, width] with the shared prefix put back, and which are its own, bool [rows, n]."""
    prefix = state.prefix[0].expand(len(state.ends), -1, -1)  # [rows, p, width]
    tokens = torch.cat([prefix, state.suffix[0]], dim=1)
    mask = torch.arange(state.suffix.shape[2], device=state.ends.device) <= state.ends[:, None]  # [rows, s]
    if state.hidden is not None:
        mask = mask & ~state.hidden
    mask = torch.cat([mask.new_ones(prefix.shape[:2]), mask], dim=1)
    return tokens.masked_fill(~mask[..., None], 0.0), mask


def word_means(text_tokens: Tensor, mask: Tensor) -> Tensor:
    """The mean [texts, width] over each text's own tokens but the first and the last; zero where there are no others.

    The mean of products with one vector is the product with this mean.
    """
    places = mask.long().cumsum(dim=1)  # 1 for the first own token
    inner = mask & (places > 1) & (places < places[:, -1:])  # [texts, length]
    total = (text_tokens.float() * inner[..., None]).sum(dim=1)
    return total / inner.sum(dim=1, keepdim=True).clamp(min=1)


def _in_chunks(score: Callable[[Tensor], Tensor], parts: tuple[Tensor, ...]) -> list[Tensor]:
    """`score` of each part, computed again in the backward pass where there are several."""
    if len(parts) > 1 and torch.is_grad_enabled():
        return [checkpoint(score, part, use_reentrant=False) for part in parts]
    return [score(part) for part in parts]


def _check_pairs(patches: Tensor, texts: Tensor, mask: Tensor, widths: tuple[int, int]) -> None:
    if patches.dim() != 3 or patches.shape[-1] != widths[0] or texts.dim() != 3 or texts.shape[-1] != widths[1]:
        raise DataError(
            f"Patch tokens must be [images, patches, {widths[0]}] and text tokens [texts, length, {widths[1]}], not"
            f" {tuple(patches.shape)} and {tuple(texts.shape)}."
        )
    if mask.shape != texts.shape[:2] or mask.dtype != torch.bool:
        raise DataError(f"The mask must be bool {tuple(texts.shape[:2])}, not {mask.dtype} {tuple(mask.shape)}.")
