"""Q-Former tuning of BLIP-2 and InstructBLIP: queries and projection, low-rank or whole, by either stage or both.

Stage 1 teaches the queries what in an image a text is about (contrast, matching, generation through the Q-Former),
stage 2 lets the frozen language model caption what the queries say.

Source: BLIP-2 arXiv 2301.12597; mllm sheet `blip2-qformer.md` (tuning levels, losses, hyper-parameters).
Differs from the paper: texts of stage 1 are the language model's tokens by its frozen embeddings, with the queries'
layers where the checkpoint has no text layers; pairs of one class share targets and aren't negatives; shots in the
place of captioned images; a cosine without warm-up. Region features in the cross-attention and other encoders in the
Q-Former's place aren't offered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.model import MLLM
from adaptkit.errors import ConfigError, UnsupportedError
from adaptkit.methods import methods
from adaptkit.methods.base import at_least, refuse
from adaptkit.methods.mllm._bridged import BridgedConfig, BridgedMllm
from adaptkit.methods.mllm._lowrank import add_low_rank
from adaptkit.methods.mllm._querying import (
    FirstStage,
    contrast_loss,
    give_text_side,
    hard_negatives,
    nearest_query,
    run_layers,
    sees,
)
from adaptkit.methods.mllm._tuning import own_parameters
from adaptkit.methods.mllm._vision import as_image, vision_states
from adaptkit.types import FitTask, TrainingSettings

LONGEST = 32
"""Most tokens of a text in stage 1; what is longer is cut off."""

FIRST_ALIGN = 0.1
"""How much the teacher's term weighs in stage 1 beside stage 2: the P-Former sheet has 10 and 100."""

_QUERYING = r"qformer\..*\.(attention|crossattention)\.attention\.(query|key|value)"


@dataclass(frozen=True)
class QFormerConfig(BridgedConfig):
    """Settings of Q-Former tuning."""

    level: Literal["a", "b", "c", "d"] = field(
        default="a",
        metadata={
            "help": "What is trained: a queries and projection, b low-rank updates of the Q-Former's attention too, c"
            " the whole Q-Former, d that and low-rank updates of the language model."
        },
    )
    r: int = field(default=16, metadata={"help": "Levels b and d: rank of the updates; their scale is 1."})
    stages: Literal["1", "2", "1+2"] = field(
        default="2", metadata={"help": "Which stages are trained; 1+2: half of the epochs each."}
    )
    generation: bool = field(default=True, metadata={"help": "Stage 1 also learns to say the text (ITG)."})
    answer: Literal["lm", "itc", "itm"] = field(
        default="lm",
        metadata={"help": "By the language model, or by stage 1: contrast (itc), matching (itm; one pass per class)."},
    )
    text_condition: bool = field(
        default=True, metadata={"help": "InstructBLIP: the question enters the Q-Former. BLIP-2's reads none."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, *at_least(self, 1, "r"))
        if self.answer != "lm" and "1" not in self.stages:
            raise ConfigError(f"answer={self.answer} reads what stage 1 trains: choose stages=1 or 1+2.")
        if self.answer == "lm" and self.stages == "1":
            raise ConfigError("stages=1 doesn't train what the language model reads: choose answer=itc, or stages=1+2.")


@methods.register("qformer")
class QFormer(BridgedMllm):
    """Queries between a frozen vision encoder and a frozen language model."""

    name = "qformer"
    config_class = QFormerConfig
    config: QFormerConfig
    default_training: ClassVar[TrainingSettings | None] = TrainingSettings(
        epochs=20, batch_size=16, keep_last=True, optimiser="adamw", lr=1e-4, min_lr=1e-5, weight_decay=0.05,
        schedule="cosine-step", warmup_epochs=0,
    )  # fmt: skip

    # --- parts --------------------------------------------------------------------------------------------------------

    def tune(self, twin: MLLM) -> None:
        if not hasattr(twin.model, "qformer"):
            raise UnsupportedError(
                f"{self.name} tunes a Q-Former, and {twin.spec.name!r} ({twin.family.name}) has none: choose a BLIP-2"
                " or InstructBLIP backbone, or another bridge (frozen, fromage)."
            )
        level = self.config.level
        twin.model.requires_grad_(False)
        targets = [_QUERYING] if level == "b" else [twin.family.lora_targets("language")] if level == "d" else []
        for pattern in targets:
            add_low_rank(twin, pattern, self.generator, r=self.config.r, lora_alpha=self.config.r)
        inside = set(twin.model.qformer.modules())
        whole = level in ("c", "d")
        if whole and "1" in self.config.stages:
            give_text_side(twin.model.qformer, own=True)
        own_parameters(twin, "bridge", lambda module, name: whole or module not in inside)
        self.stage_1: FirstStage | None = None
        if "1" in self.config.stages:
            give_text_side(twin.model.qformer, own=False)
            self.stage_1 = FirstStage(
                twin.model.config.qformer_config.hidden_size,
                twin.model.get_input_embeddings().weight.shape[1],
                LONGEST,
                self.generator,
                decodes=self.config.generation,
            ).to(twin.device)
        self._stage = self.config.stages[0]
        self.shares_batches = self.shares_batches and self.stage_1 is None  # which compares texts and images of a batch

    @property
    def queries(self) -> nn.Parameter:
        """The query vectors, [1, queries, width]."""
        vectors: nn.Parameter = self.mllm.model.query_tokens
        return vectors

    # --- images -------------------------------------------------------------------------------------------------------

    def shown(self, pixels: Tensor) -> ImageFeatures:
        """The vision encoder's states; they are the same for all questions."""
        return ImageFeatures(tuple(vision_states(self.mllm, pixels.to(self.backbone.device)).unbind()))

    def bridged(self, shown: ImageFeatures) -> ImageFeatures:
        states = self.asked_queries(torch.stack(shown.tokens)).to(self.mllm.model.language_projection.weight.dtype)
        return as_image(self.mllm, self.mllm.model.language_projection(states))

    def asked_queries(self, images: Tensor) -> Tensor:
        """What the queries say of vision states [images, positions, width], [images, queries, Q-Former width]."""
        former, count = self.mllm.model.qformer, self.queries.shape[1]
        given: dict[str, Tensor] = {}
        if self.mllm.family.prompted and self.config.text_condition:
            words = self.mllm._instruction_tokenizer([self.question] * len(images), return_tensors="pt")
            mask = torch.cat([torch.ones(len(images), count, dtype=torch.int64), words.attention_mask], dim=1)
            given = {"input_ids": words.input_ids.to(images.device), "attention_mask": mask.to(images.device)}
        elif self.mllm.family.prompted:
            given = {"input_ids": None}  # type: ignore[dict-item]
        there = torch.ones(images.shape[:2], dtype=torch.int64, device=images.device)
        out: Tensor = former(
            query_embeds=self.queries.expand(len(images), -1, -1),
            encoder_hidden_states=images,
            encoder_attention_mask=there,
            **given,
        ).last_hidden_state
        return out[:, :count]

    # --- stage 1 ------------------------------------------------------------------------------------------------------

    def _text_states(self, rows: Sequence[Sequence[int]], *, decoding: bool = False) -> tuple[Tensor, Tensor]:
        """Text vectors [texts, 1 + length, width] of token rows, and which positions are there, bool."""
        length, device = max(map(len, rows)), self.backbone.device
        ids = torch.tensor([list(row) + [0] * (length - len(row)) for row in rows], device=device)
        there = torch.arange(1 + length, device=device) <= torch.tensor([[len(row)] for row in rows], device=device)
        return self._first().texts(self.mllm.embed(ids), decoding=decoding), there

    def _first(self) -> FirstStage:
        if self.stage_1 is None:
            raise ConfigError("stages=2 has no first stage: choose stages=1 or 1+2.")
        return self.stage_1

    def _text_rows(self, captions: Sequence[str]) -> list[list[int]]:
        return [row[:LONGEST] for row in self.caption_rows(captions)]

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit vectors [images, queries, 256] of vision states, without any text."""
        count, rows = self.queries.shape[1], len(images)
        visible = sees("apart", count, 0).to(images.device).expand(rows, -1, -1)
        states = run_layers(self.mllm.model.qformer, self.queries.expand(rows, -1, -1), visible, images, count)
        return F.normalize(self._first().vision(states.float()), dim=-1)

    def encode_texts(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Unit vectors [texts, 256] of token rows, without any image."""
        states, there = self._text_states(rows)
        visible = there[:, None, :].expand(-1, there.shape[1], -1)
        first = run_layers(self.mllm.model.qformer, states, visible, None, 0)[:, 0]
        return F.normalize(self._first().text(first.float()), dim=-1)

    def _joint(self, images: Tensor, rows: Sequence[Sequence[int]], mode: Literal["together", "decoding"]) -> Tensor:
        """States [pairs, queries + 1 + length, width] of images and texts that attend to each other."""
        count = self.queries.shape[1]
        states, there = self._text_states(rows, decoding=mode == "decoding")
        seen = torch.cat([there.new_ones(len(rows), count), there], dim=1)
        visible = sees(mode, count, there.shape[1]).to(images.device) & seen[:, None, :]
        joined = torch.cat([self.queries.expand(len(rows), -1, -1).to(states.dtype), states], dim=1)
        return run_layers(self.mllm.model.qformer, joined, visible, images, count)

    def matching(self, images: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
        """ITM logits [pairs, 2] (no, yes): the mean over the queries of each image beside its text."""
        states = self._joint(images, rows, "together")[:, : self.queries.shape[1]]
        logits: Tensor = self._first().match(states.float()).mean(dim=1)
        return logits

    def first_stage(self, images: Tensor, captions: Sequence[str], labels: Tensor) -> dict[str, Tensor]:
        """ITC, ITM and, where it is on, ITG of vision states [batch, positions, width] and their captions."""
        rows = self._text_rows(captions)
        similarity = self._first().scale * nearest_query(self.encode_images(images), self.encode_texts(rows))
        terms = {"contrast": contrast_loss(similarity, labels)}
        if len(labels) > 1:
            other_images = hard_negatives(similarity.T, labels)
            other_texts = [rows[i] for i in hard_negatives(similarity, labels).tolist()]
            logits = self.matching(torch.cat([images, images[other_images], images]), [*rows, *rows, *other_texts])
            truth = (torch.arange(len(logits), device=logits.device) < len(labels)).long()
            terms["matching"] = F.cross_entropy(logits, truth)
        if self.config.generation:
            terms["generation"] = self._generation(images, rows)
        return terms

    def _generation(self, images: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
        """Cross-entropy of each text's tokens, said by the Q-Former itself behind what its queries see."""
        states = self._joint(images, rows, "decoding")[:, self.queries.shape[1] : -1]
        length = states.shape[1]
        wanted = torch.tensor([list(row) + [-100] * (length - len(row)) for row in rows], device=states.device)
        say: Any = self._first().say
        head = self.mllm.model.get_output_embeddings().weight.dtype
        logits = self.mllm.logits(say(states[wanted != -100].float()).to(head))
        return F.cross_entropy(logits, wanted[wanted != -100])

    # --- training and answering ---------------------------------------------------------------------------------------

    def prepare(self, task: FitTask) -> None:
        super().prepare(task)
        self._stage = self.config.stages[0]

    def training_state(self) -> dict[str, Tensor]:
        return {"stage": torch.tensor(int(self._stage))}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        self._stage = str(int(state["stage"]))

    def after_epoch(self, epoch: int, epochs: int) -> None:
        if self.config.stages == "1+2" and 2 * (epoch + 1) >= epochs:
            self._stage = "2"

    def losses(self, inputs: Tensor, labels: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        if self._stage == "2":
            return super().losses(inputs, labels, frozen)
        images = torch.stack(self.training_states(inputs).tokens)
        terms = self.first_stage(images, self.drawn_captions(labels), labels)
        return terms | self.aligned(inputs, labels, terms)

    @property
    def align_weight(self) -> float:
        return super().align_weight * (FIRST_ALIGN if self._stage == "1" else 1.0)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.config.answer == "lm":
            return super().forward(inputs)
        rows = self._text_rows(self.candidate_texts(self.class_names))
        with torch.no_grad():
            texts = self.encode_texts(rows) if self.config.answer == "itc" else None
            return torch.cat([self._first_scores(group, rows, texts) for group in inputs.split(self.at_once())])

    def _first_scores(self, pixels: Tensor, rows: Sequence[Sequence[int]], texts: Tensor | None) -> Tensor:
        """Logits [images, classes] of the first stage."""
        images = torch.stack(self.shown(pixels).tokens)
        if texts is not None:
            return self._first().scale * nearest_query(self.encode_images(images), texts)
        found = [self.matching(images, [row] * len(images)) for row in rows]
        return torch.stack([logits[:, 1] - logits[:, 0] for logits in found], dim=1)

    def finish(self, task: FitTask) -> dict[str, Any]:
        facts = {"level": self.config.level, "stages": self.config.stages, "queries": self.queries.shape[1]}
        return {**super().finish(task), **facts}
