"""The MLLM as a backbone: image features once, prompts in one pass, features of images and texts.

Positions (three axes on Qwen) and token types (PaliGemma, Gemma 3) are settled here for everybody, because getting one
of them wrong changes numbers without an error; `language.py` goes on from there.

Source: mllm sheets `backbones.md` and `few-shot-classifier.md`; transformers 5.24, models/*/modeling_*.py.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.backbones.base import BackboneSpec, Tokens
from adaptkit.backbones.mllm.attention import pooled, watching
from adaptkit.backbones.mllm.batches import Batch, Prefix
from adaptkit.backbones.mllm.families import Family
from adaptkit.backbones.mllm.images import ImageFeatures, features_of
from adaptkit.backbones.mllm.language import LanguageSide
from adaptkit.backbones.mllm.prompts import Prompter, Turn
from adaptkit.backbones.mllm.reading import PLAIN_TEXTS, Reading, blank_images
from adaptkit.backbones.mllm.reduction import MERGED_WINDOW, PATCH_WINDOW, Reduction, thinned
from adaptkit.errors import BackboneError, UnsupportedError

LOGIT_SCALE = 100.0
"""CLIP's: feature-level methods have defaults that were chosen with it."""

IMAGE_PROMPT = "Summarise the image in one word."
TEXT_PROMPT = "{}\nSummarise the sentence in one word."

SHARED_SHARE = 0.25
"""Prompts that begin alike are split from this share of their length on; below it a second pass doesn't pay."""

_PIXEL_KEYS = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")


class MLLM(LanguageSide):
    """An image-text-to-text model with its tokenizer, chat template and image processor.

    Args:
        spec: Facts about the weights; pixels come as RGB in [0, 1].
        family: Which family it belongs to.
        model: The model of transformers.
        prompter: Its way of asking.
        processor: Its image processor.
        image_options: Settings of the image processor for one image in one piece.
        instruction_tokenizer: InstructBLIP's second tokenizer, or None.
    """

    is_mllm = True
    image_centre: Tensor
    text_centre: Tensor

    def __init__(
        self,
        spec: BackboneSpec,
        family: Family,
        model: Any,
        prompter: Prompter,
        processor: Any,
        image_options: dict[str, Any],
        instruction_tokenizer: Any = None,
    ) -> None:
        super().__init__(spec, LOGIT_SCALE)
        self.family, self.model, self.prompter = family, model, prompter
        self._processor, self._image_options = processor, image_options
        self._instruction_tokenizer = instruction_tokenizer
        self.reading = Reading()
        for side in ("image_centre", "text_centre"):
            self.register_buffer(side, torch.zeros(()), persistent=False)
        self.image_token = int(model.config.image_token_id)
        self._text_config = model.config.get_text_config()
        body = inspect.signature(self.language.forward).parameters
        self._cache_name = "cache" if "cache" in body else "past_key_values"  # renamed between releases

    def big_blocks(self) -> list[nn.Module]:
        return [self.language]

    # --- images -------------------------------------------------------------------------------------------------------

    def image_features(
        self, pixels: Tensor, instruction: str = "", reduction: Reduction | None = None
    ) -> ImageFeatures:
        """What the language model will read of images; reusable in any number of prompts.

        Args:
            pixels: RGB in [0, 1], [images, 3, size, size].
            instruction: The question, for families whose image features depend on it (InstructBLIP).
            reduction: How many of the vectors are left out, and which; None for none.

        Raises:
            UnsupportedError: The family's vectors can't be thinned out.
        """
        if reduction is not None and reduction.active:
            return self._reduced_features(pixels, instruction, reduction)
        bytes_ = (pixels.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
        made = self._processor(images=list(bytes_), return_tensors="pt", **self._image_options)
        given = {key: made[key].to(self.device) for key in _PIXEL_KEYS if key in made}
        given["pixel_values"] = given["pixel_values"].to(self.model.dtype)
        if self.family.prompted:
            words = self._instruction_tokenizer([instruction] * len(pixels), return_tensors="pt").to(self.device)
            given |= {"qformer_input_ids": words.input_ids, "qformer_attention_mask": words.attention_mask}
        output = self.model.get_image_features(**given, return_dict=True)
        return features_of(output, len(pixels), given.get("image_grid_thw"))

    def _reduced_features(self, pixels: Tensor, instruction: str, reduction: Reduction) -> ImageFeatures:
        if self.family.scattered:
            raise UnsupportedError(
                f"Image tokens of {self.family.name} can't be left out ({self.family.scattered}): set token_reduction"
                " to none, or choose LLaVA 1.5, Qwen2-VL, Qwen2.5-VL, SmolVLM, Idefics3, InternVL, Gemma 3 or"
                " PaliGemma."
            )
        if not reduction.attends:
            return thinned(self.image_features(pixels, instruction), reduction, pixels)
        with watching(self.model.get_submodule(self.family.vision)) as watched:
            features = self.image_features(pixels, instruction)
        shallow, deep, class_token = watched.maps(len(pixels), features.grids)
        maps = [pooled(attention, features.counts[0]) for attention in (shallow, deep)]
        patches = class_token and maps[0].shape == shallow.shape  # each patch is a token
        return thinned(features, reduction, pixels, maps, PATCH_WINDOW if patches else MERGED_WINDOW)

    # --- prompts ------------------------------------------------------------------------------------------------------

    def batch(
        self, rows: Sequence[Sequence[int]], features: ImageFeatures | None = None, answers: Sequence[int] | None = None
    ) -> Batch:
        """Token rows as one batch, with the positions and types that the family needs.

        Args:
            rows: Token ids.
            features: The images of all rows in reading order; only their grids are looked at.
            answers: How many tokens at the end of each row belong to the answer; None for none.
        """
        length = max(map(len, rows))
        pad = self.prompter.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows], device=self.device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.device)
        if features is not None and features.kept:
            positions, after = self._original_positions(rows, features)
        else:
            positions, after = self._positions(ids, mask, features)
        return Batch(ids, mask, positions, after, self._types(ids, answers))

    def _original_positions(self, rows: Sequence[Sequence[int]], features: ImageFeatures) -> tuple[Tensor, Tensor]:
        """Positions as if no image token had been left out, of those that are there."""
        wholes, places, image = [], [], 0
        for row in rows:
            whole, own, at = list[int](), list[int](), 0
            while at < len(row):
                step = 1
                if row[at] == self.image_token:
                    own += [len(whole) + place for place in features.kept[image].tolist()]
                    whole += [self.image_token] * features.whole[image]
                    step, image = features.counts[image], image + 1
                else:
                    own.append(len(whole))
                    whole.append(row[at])
                at += step
            self.prompter.check_length(len(whole), "The prompt with all of its image tokens")
            wholes.append(whole)
            places.append(own)
        batch = self.batch(wholes, replace(features, kept=(), whole=()))
        length, width = batch.ids.shape[1], max(map(len, places))
        picked = [
            [0] * (width - len(own)) + [length - len(whole) + place for place in own]
            for own, whole in zip(places, wholes, strict=True)
        ]
        index = torch.tensor(picked, device=batch.ids.device).expand(*batch.positions.shape[:-1], -1)
        return batch.positions.gather(-1, index), batch.next_position

    def _positions(self, ids: Tensor, mask: Tensor, features: ImageFeatures | None) -> tuple[Tensor, Tensor]:
        if self.family.positions == "mrope":
            grids = None if features is None or not len(features) else features.grids
            kinds = ((ids == self.image_token) & mask.bool()).int()
            positions, _ = self.model.model.get_rope_index(
                ids, mm_token_type_ids=kinds, image_grid_thw=grids, attention_mask=mask
            )
            shown = positions.masked_fill(mask[None] == 0, -1)
            return positions, shown.amax(dim=(0, 2)) + 1
        first = self.family.first_position
        return (mask.cumsum(dim=1) - 1).clamp(min=0) + first, mask.sum(dim=1) + first

    def _types(self, ids: Tensor, answers: Sequence[int] | None) -> Tensor | None:
        if self.family.token_types == "image":
            return (ids == self.image_token).int()
        if self.family.token_types == "suffix":
            counts = torch.tensor(list(answers) if answers is not None else [0] * len(ids), device=ids.device)
            return (torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - counts[:, None]).int()
        return None

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings as the language model reads them, [..., width]."""
        vectors: Tensor = self.model.get_input_embeddings()(ids)
        return vectors

    def hidden(
        self,
        batch: Batch,
        features: ImageFeatures | None = None,
        *,
        embeds: Tensor | None = None,
        cache: Any = None,
        layers: list[Tensor] | None = None,
    ) -> Tensor:
        """Last hidden states [rows, length, width] of a batch in one pass, differentiable.

        Args:
            batch: From `batch`.
            features: The images of all rows in reading order.
            embeds: Token embeddings [rows, length, width] in place of those of `batch.ids` (soft prompts); images still
                go where the ids have placeholders.
            cache: A cache to fill.
            layers: A list to fill with the embeddings and the states behind each layer, [rows, length, width] each; the
                last ones normalised, as they are returned.
        """
        common = {"attention_mask": batch.mask, "position_ids": batch.positions, "use_cache": cache is not None}
        common[self._cache_name] = cache
        if layers is not None:
            common["output_hidden_states"] = True
        shown = features is not None and len(features)
        if self.family.composed:
            vectors = self.embed(batch.ids) if embeds is None else embeds
            if features is not None and shown:
                places = (batch.ids == self.image_token)[..., None]
                vectors = vectors.masked_scatter(places, torch.cat(features.tokens).to(vectors.dtype))
            output = self.language(inputs_embeds=vectors, **common)
        else:
            if batch.types is not None:
                common["token_type_ids"] = batch.types
            if features is not None and shown:
                common["mm_encoder_outputs"] = {"image": features.as_outputs(self.family)}
            common |= {"input_ids": batch.ids} if embeds is None else {"inputs_embeds": embeds}
            output = self.model.model(**common)
        if layers is not None:
            layers.extend(output.hidden_states)
        last: Tensor = output.last_hidden_state
        return last

    def prefix(
        self,
        rows: Sequence[Sequence[int]],
        features: ImageFeatures | None = None,
        embedded: Callable[[Batch], Tensor | None] = lambda batch: None,
    ) -> Prefix:
        """Put prompts through the model and keep their keys and values.

        Args:
            rows: Token ids of the prompts.
            features: The images of all rows in reading order.
            embedded: Gives the batch's embeddings in place of those of its ids (see `hidden`), or None.
        """
        from transformers import DynamicCache

        cache, batch = DynamicCache(), self.batch(rows, features)  # without a config it keeps all keys of all layers
        embeds, left = embedded(batch), batch
        cut, images = (0, 0) if embeds is not None else self._shared_start(rows, features)
        if cut and features is not None:
            self.hidden(batch.part(slice(1), slice(cut)), features.select(range(images)), cache=cache)
            cache.batch_repeat_interleave(len(rows))
            each = len(features) // len(rows)
            features = features.select([place for place in range(len(features)) if place % each >= images])
            left = batch.part(slice(len(rows)), slice(cut, None))
        hidden = self.hidden(left, features, embeds=embeds, cache=cache)
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        return Prefix(layers, batch.mask, batch.next_position, hidden[:, -1])

    def _shared_start(self, rows: Sequence[Sequence[int]], features: ImageFeatures | None) -> tuple[int, int]:
        """Tokens that all rows begin with, up to the first image that differs, and the images among them; else 0, 0.

        A token sees nothing behind it, so they go through the model once. That isn't so in families in which image or
        question tokens see each other both ways. Training takes the plain way.
        """
        count = len(features) if features is not None else 0
        alike = count and count % len(rows) == 0 and len({len(row) for row in rows}) == 1
        if len(rows) < 2 or not alike or self.family.token_types or torch.is_grad_enabled() or features is None:
            return 0, 0
        each, places = count // len(rows), [at for at, token in enumerate(rows[0]) if token == self.image_token]
        if any(sum(token == self.image_token for token in row) != len(places) for row in rows):
            return 0, 0
        images = 0
        while images < each and all(one is features.tokens[images] for one in features.tokens[images::each]):
            images += 1
        behind = sum(features.counts[:images])  # placeholders of the shared images
        cut = places[behind] if behind < len(places) else len(rows[0]) - 1
        cut = next((at for at in range(cut) if any(row[at] != rows[0][at] for row in rows)), cut)
        if cut < len(rows[0]) * SHARED_SHARE or (behind and places[behind - 1] >= cut):
            return 0, 0
        return cut, images

    # --- as a dual encoder --------------------------------------------------------------------------------------------

    def read_as(self, reading: Reading) -> MLLM:
        """Read features elsewhere in the language model from now on; for a freshly loaded backbone. Returns itself.

        Its name and digest change, so stored features of other readings aren't taken for these.

        Raises:
            BackboneError: It has fewer layers.
        """
        layers = self._text_config.num_hidden_layers
        if reading.layer > layers:
            raise BackboneError(
                f"The language model of {self.spec.name!r} has {layers} layers, and {reading.suffix} asks for layer"
                f" {reading.layer}: choose one from 1 to {layers}."
            )
        self.reading, spec = reading, self.spec
        if reading.centred:
            side = spec.preprocessing.image_size
            with torch.no_grad():
                self.image_centre = self.encode_image(blank_images(side).to(self.device)).mean(dim=0)
                self.text_centre = self.encode_text(self.tokenize(PLAIN_TEXTS)).mean(dim=0)
        digest = hashlib.sha256(f"{spec.digest}{reading.suffix}".encode()).hexdigest()
        self.spec = replace(spec, name=f"{spec.name}{reading.suffix}", digest=digest)
        return self

    def _states(self, batch: Batch, features: ImageFeatures | None = None) -> Tensor:
        """Hidden states [rows, length, width] where features are read."""
        if not self.reading.layer:
            return self.hidden(batch, features)
        kept: list[Tensor] = []
        self.hidden(batch, features, layers=kept)
        return kept[self.reading.layer]

    def encode_image(self, pixels: Tensor) -> Tensor:
        features = self.image_features(pixels, IMAGE_PROMPT)
        rows = [self.prompter.ids([Turn(IMAGE_PROMPT)], [count]) for count in features.counts]
        batch = self.batch(rows, features)
        states = self._states(batch, features).float()
        if self.reading.pooling == "last":
            return states[:, -1] - self.image_centre
        shown = (batch.ids == self.image_token)[..., None]
        return (states * shown).sum(dim=1) / shown.sum(dim=1) - self.image_centre

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        if isinstance(texts, str):
            raise BackboneError(f"tokenize takes a list of texts, not one text: write [{texts!r}].")
        rows = []
        for text in texts:
            self.prompter.check_text(text, "text")
            rows.append(self.prompter.ids([Turn(TEXT_PROMPT.format(text), 0)]))
        ends = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        ids = torch.zeros(len(rows), int(ends.max()) + 1, dtype=torch.int64, device=self.device)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
        return Tokens(ids, ends)

    def encode_text(self, tokens: Tokens) -> Tensor:
        rows = [ids[: end + 1] for ids, end in zip(tokens.ids.tolist(), tokens.ends.tolist(), strict=True)]
        parts = [self._states(self.batch(rows[start : start + 64]))[:, -1] for start in range(0, len(rows), 64)]
        return torch.cat(parts).float() - self.text_centre
