"""Multimodal language models against plain transformers and peft: scoring of class names, LoRA steps, memory.

The models are random LLaVAs: "tiny" is the embedded model's size, "small" has eight layers of width 512 and 65 vectors
per picture. Scores, losses and gradients of both sides are compared in the same run.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.load import load_backbone
from adaptkit.backbones.mini_mllm import model_folder
from adaptkit.backbones.mllm.model import MLLM
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.methods.mllm._tuning import NumberedInputs, answer_labels
from adaptkit.methods.mllm.mllm_lora import MllmLora, MllmLoraConfig
from adaptkit.methods.mllm.mllm_zero_shot import MllmZeroShot
from adaptkit.types import TensorInputs
from benchmarks.pretrain_mini import mllm_layout as layout
from benchmarks.speed.measure import Difference, Load, Row, Scope, medians, peak_above, run_process, time_in_turn
from benchmarks.speed.training import EAGER_MALLOC, class_names

ROUNDS = 5
CLASSES = 100
BATCH = 8
LARGE_VOCABULARY = 150_000


# --- random models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Of a random LLaVA: the Llama's width, layers and vocabulary, and the pictures' side and patch."""

    width: int
    layers: int
    vocabulary: int
    side: int
    patch: int


SHAPES = {
    "tiny": Shape(192, 4, layout.VOCABULARY, 32, 8),
    "small": Shape(512, 8, 32_000, 224, 28),
    "large-vocabulary": Shape(256, 4, LARGE_VOCABULARY, 224, 28),
}


def write_random(folder: Path, shape: Shape) -> Path:
    """A random LLaVA in its hub layout, with the embedded model's tokenizer and template."""
    from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = layout.config(shape.width, shape.layers, 2 * shape.width).to_dict()
    vision = config["vision_config"] | {"image_size": shape.side, "patch_size": shape.patch}
    text = config["text_config"] | {"vocab_size": shape.vocabulary}
    vectors = (shape.side // shape.patch) ** 2 + 1
    config |= {"vision_config": vision, "text_config": text, "image_seq_length": vectors}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(LlavaConfig.from_dict(config))
    layout.write_folder(folder, model, AutoTokenizer.from_pretrained(model_folder()))
    return folder


class Model:
    """A random model, loaded as adaptkit loads it, with pictures.

    Attributes:
        backbone: In fp32.
        pixels: [BATCH, 3, side, side] in [0, 1].
    """

    def __init__(self, name: str, batch: int = BATCH) -> None:
        with TemporaryDirectory() as folder:
            backbone = load_backbone(f"transformers:{write_random(Path(folder), SHAPES[name])}")
        self.backbone = cast(MLLM, backbone)
        side, numbers = SHAPES[name].side, torch.Generator().manual_seed(0)
        self.pixels = torch.rand(batch, 3, side, side, generator=numbers)

    @cached_property
    def plain_pixels(self) -> Tensor:
        """What the image processor makes of the pictures, [BATCH, 3, side, side]."""
        pictures = list((self.pixels * 255).round().to(torch.uint8))
        made: Tensor = self.backbone._processor(images=pictures, return_tensors="pt").pixel_values
        return made

    def plain_rows(self, question: str, answers: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, list[int]]:
        """Ids and mask [answers, length] of the question with each answer behind it, padded on the left."""
        vectors = self.backbone.model.config.image_seq_length
        prompt = self.backbone.prompter.ids([Turn(question)], [vectors])
        batch = self.backbone.batch([prompt + list(answer) for answer in answers])
        return batch.ids, batch.mask, [len(answer) for answer in answers]


# --- scoring ----------------------------------------------------------------------------------------------------------


class Scoring:
    """Likelihoods of class names, through the tree and its cache and by a full forward per class."""

    def __init__(self, model: Model, classes: int) -> None:
        self.model = model
        self.method = MllmZeroShot(model.backbone, class_names(classes)).eval()
        self.method.set_classes(self.method.fitted_names)
        self.answers = model.backbone.prompter.answers([Turn(self.method.question)], self.method.shown_names)

    @torch.no_grad()
    def ours(self) -> Tensor:
        """Mean log-probability of each name, [1, classes]."""
        return self.method(self.model.pixels[:1])

    @torch.no_grad()
    def plain(self, at_once: int = 10) -> Tensor:
        """The same by transformers' own forward on picture, question and name, `at_once` classes in a batch."""
        scores = []
        for start in range(0, len(self.answers), at_once):
            answers = self.answers[start : start + at_once]
            ids, mask, lengths = self.model.plain_rows(self.method.question, answers)
            pixels = self.model.plain_pixels[:1].expand(len(ids), -1, -1, -1)
            logits = self.model.backbone.model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
            following = answer_labels(ids, lengths)[:, 1:]
            losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), following, reduction="none")
            scores.append(-losses.sum(dim=1) / torch.tensor(lengths))
        return torch.cat(scores)[None]


def bench_scoring(load: Load, scope: Scope) -> Iterator[Row]:
    """One picture against 100 class names, and the memory it takes at a large vocabulary."""
    classes = 6 if scope.quick else CLASSES
    for name in ("tiny",) if scope.quick else ("tiny", "small"):
        case = Scoring(Model(name), classes)
        differences = {"scores": Difference.between(case.ours(), case.plain())}
        for at_once, wanted in ((1, 10.0), (10, None)):
            sides: dict[str, Callable[[], object]] = {"ours": case.ours, "plain": partial(case.plain, at_once)}
            samples = time_in_turn(sides, 1 if scope.quick else ROUNDS)
            yield Row(
                "mllm-score",
                f"{classes} class names of one picture, {name} model",
                "s",
                *medians(samples).values(),
                wanted_ratio=wanted,
                differences=differences,
                samples=samples,
                note=f"plain: a full forward per class, {at_once} in a batch",
            )
    name = "tiny" if scope.quick else "large-vocabulary"
    ours, plain = (_peak_in_child(name, side, classes) for side in ("ours", "plain"))
    note = "plain: logits at every place, 10 classes in a batch"
    vocabulary = SHAPES[name].vocabulary
    yield Row("mllm-score", f"memory, {classes} names, vocabulary {vocabulary:,}", "bytes", ours, plain, note=note)


def _peak_in_child(name: str, side: str, classes: int) -> int:
    """Bytes that scoring needs above the loaded model, measured in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.speed.mllm", json.dumps([name, side, classes])]
    return int(run_process(command, extra=EAGER_MALLOC).strip().splitlines()[-1])


# --- LoRA steps -------------------------------------------------------------------------------------------------------


class Steps:
    """A supervised LoRA step with AdamW: ours, and plain peft around transformers' model.

    Both begin with the same updates; dropout is off, as it draws differently.
    """

    def __init__(self, model: Model, rank: int = 8) -> None:
        self.model = model
        names = class_names(len(model.pixels))
        config = MllmLoraConfig(r=rank, alpha=2.0 * rank, dropout=0.0, clip=1.0)
        self.plain_model = self._peft(rank)
        self.method = MllmLora(model.backbone, names, config=config).train()
        self.labels = torch.arange(len(names))
        self.features = self._vision_once()
        self._copy_updates()
        self.optimisers = {
            "ours": torch.optim.AdamW(self.method.trainables(), lr=1e-4, weight_decay=0.0),
            "plain": torch.optim.AdamW(self._plain_trained(), lr=1e-4, weight_decay=0.0),
        }
        answers = model.backbone.prompter.answers([Turn(self.method.question)], names)
        self.ids, self.mask, lengths = model.plain_rows(self.method.question, answers)
        self.plain_labels = answer_labels(self.ids, lengths)

    def _peft(self, rank: int) -> Any:
        import peft

        targets = self.model.backbone.family.lora_targets("language")
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, lora_dropout=0.0)
        return peft.get_peft_model(copy.deepcopy(self.model.backbone.model), config).train()

    def _vision_once(self) -> Tensor:
        """Numbers of the pictures, whose features the method has made before the first step, as in training."""
        inputs = TensorInputs(self.model.pixels[None], self.labels)
        self.method._numbered = NumberedInputs(inputs, self.method.shown, keep=True)
        self.method._numbered.features(torch.arange(len(self.labels)))
        return torch.arange(len(self.labels))

    def _plain_trained(self) -> list[Tensor]:
        return [p for p in self.plain_model.parameters() if p.requires_grad]

    @torch.no_grad()
    def _copy_updates(self) -> None:
        """A little off the start, where half of the gradients would be zero; the same on both sides."""
        numbers = torch.Generator().manual_seed(1)
        for mine, theirs in zip(self.method.trainables(), self._plain_trained(), strict=True):
            mine.copy_(0.02 * torch.randn(mine.shape, generator=numbers))
            theirs.copy_(mine)

    def loss(self, side: str) -> Tensor:
        """The loss, with its gradients left at the trained tensors."""
        self.optimisers[side].zero_grad(set_to_none=True)
        if side == "ours":
            terms = self.method.losses(self.features, self.labels)
            self.method.backward(terms, lambda loss: loss)
            self.method.before_step(lambda loss: loss)  # clips
            return next(iter(terms.values())).detach()
        given = {"input_ids": self.ids, "attention_mask": self.mask, "labels": self.plain_labels}
        loss: Tensor = self.plain_model(pixel_values=self.model.plain_pixels, **given).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._plain_trained(), 1.0)
        return loss.detach()

    def step(self, side: str) -> None:
        self.loss(side)
        self.optimisers[side].step()

    def differences(self) -> dict[str, Difference]:
        """Of the loss and of all gradients."""
        losses = [self.loss(side) for side in ("ours", "plain")]
        gradients = [[cast(Tensor, p.grad) for p in ps] for ps in (self.method.trainables(), self._plain_trained())]
        return {"loss": Difference.between(*losses), "gradient": Difference.of_many(*gradients)}


def bench_steps(load: Load, scope: Scope) -> Iterator[Row]:
    """A LoRA step on questions about pictures."""
    for name in ("tiny",) if scope.quick else ("tiny", "small"):
        case = Steps(Model(name))
        differences = case.differences()
        sides: dict[str, Callable[[], object]] = {side: partial(case.step, side) for side in ("ours", "plain")}
        samples = time_in_turn(sides, 1 if scope.quick else 4 * ROUNDS)
        yield Row(
            "mllm-lora",
            f"supervised step, batch {BATCH}, {name} model",
            "s",
            *medians(samples).values(),
            wanted_ratio=0.9,
            differences=differences,
            samples=samples,
            note="plain: peft and transformers, pictures encoded in every step",
        )


def _measure(name: str, side: str, classes: int) -> int:
    case = Scoring(Model(name), classes)
    run = getattr(case, side)
    if side == "ours":
        run()  # kernels set themselves up on first use
    else:
        case.plain(at_once=2)
    return peak_above(run)


if __name__ == "__main__":
    print(_measure(*json.loads(sys.argv[1])))
