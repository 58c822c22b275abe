"""VladVA: a multimodal language model as a dual encoder, by soft prompts, LoRA, a contrastive and a next-token loss.

The last hidden state behind "summarise in one word" is an image's or a text's feature. Instructions become vectors that
are trained, one set for images and one for texts, with low-rank updates of the language model.

Source: VladVA arXiv 2412.04378; mllm sheet `vladva.md`.
Differs from the paper: shots in the place of image-text pairs. A short caption is a template with the class's name;
long captions are its descriptions, where there are some, else the short ones. Images of one class in a batch aren't
each other's negatives.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.base import Backbone, Tokens
from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.model import IMAGE_PROMPT, MLLM, TEXT_PROMPT
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.errors import UnsupportedError
from adaptkit.methods import methods
from adaptkit.methods.base import ClassWeightMethod, at_least, refuse, render_prompts
from adaptkit.methods.folding import Fold
from adaptkit.methods.mllm._lowrank import add_low_rank, write_low_rank
from adaptkit.methods.mllm._reducing import TrainedReducingConfig, token_facts
from adaptkit.methods.mllm._soft import between, question_span, with_soft
from adaptkit.methods.mllm._tuning import CHECKPOINTING, IGNORED, TwinMethod, answer_labels, summed
from adaptkit.methods.mllm._weights import USUAL, text_probabilities, token_weights
from adaptkit.types import NovelClasses, TrainingSettings

MOST_SCALE = 100.0
"""The learned scale of the similarities is kept at or below this."""

_TEXTS_AT_ONCE = 32


@dataclass(frozen=True)
class VladvaConfig(TrainedReducingConfig):
    """Settings of VladVA."""

    lora: bool = field(
        default=True, metadata={"help": "Change the language model too; off: the soft prompts alone (tens of kB)."}
    )
    r: int = field(default=16, metadata={"help": "Rank of the updates."})
    alpha: float = field(default=16, metadata={"help": "Scale of the updates: alpha / r."})
    contrastive: float = field(default=1.0, metadata={"help": "Weight of the contrastive loss."})
    next_token: float = field(default=1.0, metadata={"help": "Weight of the next-token loss on long captions."})
    caption_weights: Literal["none", "linear", "power", "focal"] = field(
        default="none",
        metadata={
            "help": "Tokens of long captions weigh more the less text foretells them (see prior).",
            "later": True,
        },
    )
    reduction: Literal["sum", "mean"] = field(
        default="sum", metadata={"help": "Both directions of the contrastive loss: added, or averaged."}
    )
    temperature: float = field(default=0.07, metadata={"help": "Temperature of the similarities at the start."})
    learn_temperature: bool = field(default=True, metadata={"help": "Train the temperature too."})
    image_prompt: str = field(default=IMAGE_PROMPT, metadata={"help": "Text that the image side's vectors begin as."})
    text_prompt: str = field(
        default=TEXT_PROMPT.partition("{}")[2], metadata={"help": "Text that the text side's vectors begin as."}
    )
    micro_batch: int = field(
        default=0, metadata={"help": "Images that go through the model together; gradients stay exact. 0: all."}
    )
    clip: float = field(default=1.0, metadata={"help": "Largest norm of all gradients together; 0 doesn't clip."})
    checkpointing: bool = field(default=False, metadata=CHECKPOINTING)

    def __post_init__(self) -> None:
        super().__post_init__()
        lossless = not self.contrastive + self.next_token
        refuse(
            self,
            *at_least(self, 1, "r"),
            ("alpha", "above 0", self.alpha > 0),
            ("temperature", f"at least {1 / MOST_SCALE}", self.temperature >= 1 / MOST_SCALE),
            ("image_prompt", "a text", bool(self.image_prompt.strip())),
            ("text_prompt", "a text", bool(self.text_prompt.strip())),
            *at_least(self, 0, "contrastive", "next_token", "micro_batch", "clip"),
            more=["contrastive and next_token are both 0, so there is no loss"] * lossless,
        )


@methods.register("vladva")
class Vladva(TwinMethod, ClassWeightMethod):
    """Images and texts in one space: logits are scale · cosine, as of a dual encoder."""

    name = "vladva"
    config_class = VladvaConfig
    config: VladvaConfig
    novel_classes: NovelClasses = "open"
    reads_descriptions: ClassVar[Literal["never", "optional", "needed"]] = "optional"
    writes_texts: ClassVar[bool] = True
    image_soft: nn.Parameter
    text_soft: nn.Parameter
    log_scale: Tensor
    default_training: ClassVar[TrainingSettings | None] = TrainingSettings(
        epochs=20, batch_size=64, keep_last=True, optimiser="adamw", lr=1e-4, weight_decay=0.0, schedule="cosine-step",
        warmup_epochs=0,
    )  # fmt: skip

    def tune(self, twin: MLLM) -> None:
        self._peft_config = None
        if self.config.lora:
            self._peft_config = add_low_rank(
                twin,
                twin.family.lora_targets("language"),
                self.generator,
                r=self.config.r,
                lora_alpha=self.config.alpha,
            )

    def build(self) -> None:
        super().build()
        prompter = self.mllm.prompter
        for text in (self.config.image_prompt, self.config.text_prompt):
            prompter.check_text(text, "prompt")
        for sentence in (sentence for name in self.fitted_names for sentence in self.descriptions.get(name, ())):
            prompter.check_text(sentence, "description")
        with torch.no_grad():
            side = self.backbone.spec.preprocessing.image_size
            self._token_facts = token_facts(self.shown(torch.full((1, 3, side, side), 0.5)))
        placeholders = int(self._token_facts["tokens_per_image"])
        ids, start, end = question_span(prompter, Turn(self.config.image_prompt), [placeholders])
        self.image_soft = nn.Parameter(self._embedded_ids(ids[start:end]))
        self._weights: dict[tuple[int, ...], Tensor] = {}  # by caption
        self._image_row = [*ids[:start], *(-1 - place for place in range(end - start)), *ids[end:]]
        bare, whole = (prompter.ids([Turn(f"a photo{more}", 0)]) for more in ("", self.config.text_prompt))
        start, end = between(whole, bare)
        self.text_soft = nn.Parameter(self._embedded_ids(whole[start:end]))
        scale = torch.tensor(math.log(1 / self.config.temperature))
        if self.config.learn_temperature:
            self.log_scale = nn.Parameter(scale)
        else:
            self.register_buffer("log_scale", scale)

    def _embedded_ids(self, ids: Sequence[int]) -> Tensor:
        return self.mllm.embed(torch.tensor(ids, device=self.backbone.device)).detach().float().clone()

    def classes_changed(self) -> None:
        super().classes_changed()
        for prompt in render_prompts(self.class_names, max(self.templates, key=len)):
            self.text_row(prompt)  # says what can't be read

    def fold(self) -> Fold:
        raise UnsupportedError(
            f"{self.name} can't be folded: the language model reads every image. Keep the adapter folder, which"
            " 'adaptkit predict' reads."
        )

    # --- the two sides ------------------------------------------------------------------------------------------------

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied with, fp32 []."""
        return self.log_scale.float().exp().clamp(max=MOST_SCALE)

    def shown(self, pixels: Tensor) -> ImageFeatures:
        prompt, thinning = self.config.image_prompt, self.config.thinning
        return self.mllm.image_features(pixels.to(self.backbone.device), prompt, thinning)

    def encode_shown(self, features: ImageFeatures) -> Tensor:
        """Image features [images, width], fp32, of what the vision side gave."""
        return self._read([self._image_row] * len(features), features, self.image_soft)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Image features [images, width], fp32, of pixels [images, 3, size, size]."""
        groups = pixels.split(self.mllm.rows_at_once(len(self._image_row)))
        return torch.cat([self.encode_shown(self.shown(group)) for group in groups])

    def text_row(self, text: str) -> list[int]:
        """Token ids of a caption with the text side's vectors behind it (vector j is -1 - j)."""
        prompter = self.mllm.prompter
        prompter.check_text(text, "text")
        ids = prompter.ids([Turn(text, 0)])
        _, end = between(ids, prompter.ids([Turn("", 0)]))
        row = [*ids[:end], *(-1 - place for place in range(len(self.text_soft))), *ids[end:]]
        prompter.check_length(len(row), "A text with its soft vectors")
        return row

    def encode_rows(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Text features [texts, width], fp32, of rows from `text_row`; no image has a part in them."""
        groups = [rows[at : at + _TEXTS_AT_ONCE] for at in range(0, len(rows), _TEXTS_AT_ONCE)]
        return torch.cat([self._read(group, None, self.text_soft) for group in groups])

    def _read(self, rows: Sequence[Sequence[int]], features: ImageFeatures | None, soft: Tensor) -> Tensor:
        """The last hidden state of each row: behind it the answer's first token would come."""
        batch = self.mllm.batch(rows, features)
        embeds = with_soft(self.mllm, batch, soft)
        return self.mllm.hidden(batch, features, embeds=embeds)[:, -1].float()

    def class_weights(self) -> Tensor:
        prompts = [prompt for template in self.templates for prompt in render_prompts(self.class_names, template)]
        features = F.normalize(self.encode_rows([self.text_row(prompt) for prompt in prompts]), dim=-1)
        return F.normalize(features.unflatten(0, (len(self.templates), -1)).mean(dim=0), dim=-1)  # [classes, width]

    def scale_and_bias(self) -> tuple[float, float]:
        return float(self.scale.detach()), 0.0

    def forward(self, inputs: Tensor) -> Tensor:
        images = F.normalize(self.encode_image(inputs), dim=-1)
        return self.scale * images @ self.folded_weights().T

    # --- losses -------------------------------------------------------------------------------------------------------

    def losses(self, inputs: Tensor, labels: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        """Contrastive and next-token loss.

        Args:
            inputs: Numbers of training images, int64 [batch], or pixels [batch, 3, h, w].
            labels: int64 [batch].
            frozen: Not used.
        """
        size, config = self.config.micro_batch or len(labels), self.config
        short, long = self._captions(labels)
        tokens = self._weights_of(long).sum()
        texts = self._texts(short) if config.contrastive else None
        if size >= len(labels):
            images, following = self._image_pass(inputs, long)
            terms = {} if texts is None else {"contrastive": self._contrast(images, texts, labels)}
            return terms | ({"next_token": config.next_token * following / tokens} if config.next_token else {})
        return self._in_parts(inputs, labels, long, texts, torch.arange(len(labels)).split(size))

    def _in_parts(
        self, inputs: Tensor, labels: Tensor, long: list[list[int]], texts: Tensor | None, chunks: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The same losses and gradients, with the graphs of some images at a time.

        All features are computed without a graph first; the contrastive loss gives the gradient with respect to each,
        and every chunk is then computed again and pulled along it.
        """
        terms, pull, config, tokens = dict[str, Tensor](), None, self.config, self._weights_of(long).sum()
        if texts is not None:
            with torch.no_grad():
                found = torch.cat([self.encode_shown(self.training_features(inputs[rows])) for rows in chunks])
            found.requires_grad_(torch.is_grad_enabled())
            terms["contrastive"] = self._contrast(found, texts, labels)
            if found.requires_grad:
                (pull,) = torch.autograd.grad(terms["contrastive"], found, retain_graph=True)
        values: list[Tensor] = []

        def part(rows: Tensor) -> Tensor:
            images, following = self._image_pass(inputs[rows], [long[row] for row in rows.tolist()])
            loss = config.next_token * following / tokens
            values.append(loss.detach())
            return loss if pull is None else loss + (images * pull[rows]).sum()

        total = summed(part, chunks, self.trainables())
        terms["next_token"] = total - total.detach() + torch.stack(values).sum()
        return terms

    def _captions(self, labels: Tensor) -> tuple[list[str], list[list[int]]]:
        """A short caption of each image, the same for all of a class, and the tokens of a long one.

        The loop has seeded torch's own generator, from which they are drawn.
        """
        template = self.templates[int(torch.randint(len(self.templates), ()))]
        names = render_prompts(self.fitted_names, template)
        short, long = [names[label] for label in labels.tolist()], []
        for label, caption in zip(labels.tolist(), short, strict=True):
            sentences = self.descriptions.get(self.fitted_names[label], ()) or (caption,)
            long.append(sentences[int(torch.randint(len(sentences), ()))])
        return short, self.mllm.prompter.answers([Turn(self.config.image_prompt)], long)

    def _texts(self, captions: Sequence[str]) -> Tensor:
        """Text features of captions, [captions, width]; equal ones are computed once."""
        different = list(dict.fromkeys(captions))
        features = self.encode_rows([self.text_row(caption) for caption in different])
        return features[[different.index(caption) for caption in captions]]

    def _image_pass(self, inputs: Tensor, long: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Image features [images, width], and minus the long captions' log-probability, in one pass."""
        features = self.training_features(inputs)
        if not self.config.next_token:
            images = self.encode_shown(features)
            return images, images.new_zeros(())
        rows, lengths = [self._image_row + caption for caption in long], [len(caption) for caption in long]
        for row in rows:
            self.mllm.prompter.check_length(len(row), "An image with its long caption")
        batch = self.mllm.batch(rows, features, lengths)
        hidden = self.mllm.hidden(batch, features, embeds=with_soft(self.mllm, batch, self.image_soft))
        last = hidden.shape[1] - 1 - torch.tensor(lengths, device=hidden.device)
        images = hidden[torch.arange(len(rows), device=hidden.device), last].float()
        following = answer_labels(batch.ids, lengths)[:, 1:]
        supervised = following != IGNORED
        logits = self.mllm.logits(hidden[:, :-1][supervised])
        losses = F.cross_entropy(logits, following[supervised], reduction="none")
        return images, (losses * self._weights_of(long)).sum()

    def _weights_of(self, captions: Sequence[list[int]]) -> Tensor:
        """Weights of all tokens of long captions, fp32 [tokens]; those of each caption are computed once."""
        kind, backbone = self.config.caption_weights, cast(MLLM, self.backbone)
        if kind == "none":
            return torch.ones(sum(map(len, captions)), device=backbone.device)
        for caption in captions:
            if tuple(caption) not in self._weights:
                (found,) = text_probabilities(backbone, self.config.image_prompt, [caption])
                self._weights[tuple(caption)] = token_weights(found, kind, *USUAL[kind])
        return torch.cat([self._weights[tuple(caption)] for caption in captions])

    def _contrast(self, images: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
        """The contrastive loss of features [batch, width] each, both directions."""
        loss = contrast(self.scale, images, texts, labels)
        return self.config.contrastive * (loss if self.config.reduction == "sum" else loss / 2)

    def finish(self, task: Any) -> dict[str, Any]:
        self.classes_changed()
        return {
            "scale": float(self.scale.detach()),
            **self._token_facts,
            "soft_vectors": {"image": len(self.image_soft), "text": len(self.text_soft)},
            "long_captions": "descriptions" if self.descriptions else "templates",
        }

    def training_texts(self) -> list[str]:
        texts = [text for template in self.templates for text in render_prompts(self.fitted_names, template)]
        texts += [sentence for name in self.fitted_names for sentence in self.descriptions.get(name, ())]
        return [*texts, self.config.image_prompt, self.config.text_prompt]

    # --- leaving ------------------------------------------------------------------------------------------------------

    def write_extras(self, folder: Path) -> None:
        """Write the low-rank updates in peft's own layout too; the soft prompts are only in the adapter itself."""
        if self._peft_config is not None:
            write_low_rank(folder, self.mllm, self.named_parameters(), self._peft_config)

    def as_backbone(self) -> SummaryBackbone:
        """A frozen backbone that encodes with what was learned, for every method on features."""
        return SummaryBackbone(self)


class SummaryBackbone(Backbone):
    """The two sides of a fitted `Vladva` as a backbone of their own, with its own name and digest.

    Args:
        method: Fitted; it isn't to be trained any further.
    """

    def __init__(self, method: Vladva) -> None:
        spec, state = method.backbone.spec, hashlib.sha256()
        if method.config.thinning.active:
            state.update(repr(method.config.thinning).encode())
        for name, value in sorted(method.adapter_state().items()):
            state.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
        digest = hashlib.sha256(f"{spec.digest}+{state.hexdigest()}".encode()).hexdigest()
        named = replace(spec, name=f"{spec.name}+vladva", digest=digest)
        super().__init__(named, float(method.scale.detach()))
        self._method = (method,)  # a tuple: its weights aren't to be moved or counted here
        self.logit_scale = self.logit_scale.to(method.backbone.device)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        return self._method[0].encode_image(pixels)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        rows = [self._method[0].text_row(text) for text in texts]
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=self.device)
        return Tokens(ids, torch.tensor([len(row) - 1 for row in rows], device=self.device))

    @torch.no_grad()
    def encode_text(self, tokens: Tokens) -> Tensor:
        rows = [ids[: end + 1] for ids, end in zip(tokens.ids.tolist(), tokens.ends.tolist(), strict=True)]
        return self._method[0].encode_rows(rows)


def contrast(scale: Tensor, images: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
    """-log of the right text's share for each image, and of the right image's for each text, mean over the batch.

    Where images share a class, the others of it are left out of an image's (and its text's) comparison.

    Args:
        scale: What cosines are multiplied with, [].
        images: Features [batch, width].
        texts: Features [batch, width] of the images' captions.
        labels: int64 [batch].
    """
    similarity = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    similarity = similarity.masked_fill((labels[:, None] == labels) & ~own, -torch.inf)
    targets = torch.arange(len(labels), device=labels.device)
    return F.cross_entropy(similarity, targets) + F.cross_entropy(similarity.T, targets)
