"""What tuned MLLMs share: a twin of the model with trainable parts, the supervised tokens, and three losses.

The trainables sit in a structural copy of the model whose frozen tensors are the backbone's own, so the backbone stays
as it is. Training and answering go through the same prompts. What the frozen vision side makes of an image is computed
once and used in every epoch.

Source: mllm sheet `lora-sft.md` (label masking, loss over all supervised tokens of a step, variants).
Differs from the sheet: the last epoch is kept (no early stop), without warm-up; distractors and sampled negatives are
the classes that the frozen model confuses an image with most.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.mllm.families import Target
from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.model import MLLM
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.backbones.mllm.trie import Trie
from adaptkit.errors import ConfigError
from adaptkit.methods._tuned import set_parameter
from adaptkit.methods.base import GradientMethod, at_least, progress_of, refuse
from adaptkit.methods.lora._towers import shared_copy, state_name
from adaptkit.methods.mllm._asking import AskingMethod
from adaptkit.methods.mllm._letters import LETTERS, options_text
from adaptkit.methods.mllm._likelihood import Normalisation, normalised
from adaptkit.methods.mllm._recomputing import recompute, require_gradients
from adaptkit.methods.mllm._reducing import TrainedReducingConfig, check_training
from adaptkit.methods.mllm._sharding import spread_layers
from adaptkit.methods.mllm.mllm_zero_shot import MllmZeroShot, MllmZeroShotConfig
from adaptkit.types import FitTask, Inputs, Reads, TrainingLoop, TrainingSettings

IGNORED = -100
"""Label of a token that isn't supervised."""

Variant = Literal["sft", "letters", "softmax"]


CHECKPOINTING = {
    "help": "Keep only what goes into each decoder layer and compute the rest again on the way back (gradient"
    " checkpointing): much less memory, about a third slower, the same numbers.",
    "later": True,
}


@dataclass(frozen=True)
class TunedMllmConfig(TrainedReducingConfig, MllmZeroShotConfig):
    """Settings that tuned MLLMs share."""

    normalisation: Normalisation = field(
        default="sum",
        metadata={
            "help": "Of likelihoods: sum (what training fits); mean over tokens; pmi (less the likelihood without"
            " image); pmi-null (less that of blank images); calibrated (scale and shift per class, fitted on shots)."
        },
    )
    variant: Variant = field(
        default="sft",
        metadata={
            "help": "What is trained: sft (the name as the answer), letters (the letter of a shuffled choice; it then"
            " also answers by letters) or softmax (the right name against the other names)."
        },
    )
    negatives: int = field(
        default=0, metadata={"help": "softmax: other classes per image, those most confused with its own; 0 takes all."}
    )
    micro_batch: int = field(
        default=0, metadata={"help": "Images that go through the model together; gradients add up. 0: a whole batch."}
    )
    clip: float = field(default=1.0, metadata={"help": "Largest norm of all gradients together; 0 doesn't clip."})

    checkpointing: bool = field(default=False, metadata=CHECKPOINTING)

    def __post_init__(self) -> None:
        if self.checkpointing and self.variant == "softmax":
            raise ConfigError(
                "checkpointing saves nothing with variant softmax, whose names go on from kept keys and values: choose"
                " sft or letters, or a small micro_batch."
            )
        if self.variant == "letters" and self.route == "likelihood":
            object.__setattr__(self, "route", "letters")
        super().__post_init__()
        refuse(self, *at_least(self, 0, *self.counts()))

    def counts(self) -> tuple[str, ...]:
        """Settings that mustn't be negative."""
        return ("negatives", "micro_batch", "clip")


def twin_of(backbone: MLLM) -> MLLM:
    """The same model once more: modules of its own, whose tensors are the backbone's very own."""
    twin = copy.copy(backbone)
    twin._modules = dict(backbone._modules)
    twin.model = shared_copy(backbone.model)
    twin._text_memo = copy.copy(backbone._text_memo)
    twin._text_memo.clear()
    return twin


def own_parameters(
    twin: MLLM, part: Target, wanted: Callable[[nn.Module, str], bool] = lambda module, name: True
) -> int:
    """Give a part of a twin trainable copies of parameters in the place of the shared ones.

    Args:
        twin: From `twin_of`.
        part: Which part.
        wanted: Whether a module's own parameter of that name is trained.

    Returns:
        How many parameters there are now.
    """
    found = 0
    for path, item in twin.family.part(twin.model, part):
        if isinstance(item, nn.Parameter):
            parent, _, last = path.rpartition(".")
            places = [(twin.model.get_submodule(parent), last)]
        else:
            places = [(module, name) for module in item.modules() for name, _ in module.named_parameters(recurse=False)]
        for module, name in places:
            if wanted(module, name):
                setattr(module, name, nn.Parameter(getattr(module, name).detach().clone()))
                found += 1
    return found


def answer_labels(ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Labels [rows, length] aligned with `ids`: the last `lengths` tokens of each row; `IGNORED` for all others.

    Rows are padded on the left and end with their answer, so padding, the question and the image are all ignored, and
    the token that ends the answer's turn is not.
    """
    counts = torch.as_tensor(list(lengths), device=ids.device)
    supervised = torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - counts[:, None]
    return ids.masked_fill(~supervised, IGNORED)


def answers_loss(
    method: AskingMethod,
    turns: Sequence[Sequence[Turn]],
    answers: Sequence[list[int]],
    features: ImageFeatures,
    weights: Tensor | None = None,
) -> Tensor:
    """Minus the log-probability of all answers' tokens behind their conversations, summed.

    Args:
        method: What asks.
        turns: One conversation per answer.
        answers: Tokens of each answer.
        features: The images of all conversations in reading order.
        weights: Of all answers' tokens, one answer after the other, [tokens]; None for 1.
    """
    rows = [p + a for p, a in zip(method.prompt_rows(features, turns), answers, strict=True)]
    lengths = [len(answer) for answer in answers]
    for row in rows:
        method.mllm.prompter.check_length(len(row), "A training question with its answer")
    batch = method.mllm.batch(rows, features, lengths)
    hidden = method.mllm.hidden(batch, features, embeds=method.embedded(batch))
    following = answer_labels(batch.ids, lengths)[:, 1:]
    supervised = following != IGNORED
    logits = method.mllm.logits(hidden[:, :-1][supervised])  # the vocabulary is large: of no other token
    if weights is None:
        return F.cross_entropy(logits, following[supervised], reduction="sum")
    losses = F.cross_entropy(logits, following[supervised], reduction="none")
    return (losses * weights.to(losses)).sum()  # in autocast, a product of vectors would be in half precision


def summed(part: Callable[[Tensor], Tensor], chunks: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """The sum of a loss over chunks of a batch, whose graphs are never alive together (gradient accumulation).

    Args:
        part: The loss of some rows.
        chunks: Rows, each int64 [k].
        parameters: What gets gradients.

    Returns:
        A scalar with the sum's value and gradient.
    """
    if len(chunks) == 1 or not torch.is_grad_enabled():
        return torch.stack([part(chunk) for chunk in chunks]).sum()
    total = torch.zeros((), device=chunks[0].device)
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for chunk in chunks:
        loss = part(chunk)
        total = total + loss.detach()
        for own, found in zip(gradients, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if found is not None:
                own += found
    zeros = [((p - p.detach()) * gradient).sum() for p, gradient in zip(parameters, gradients, strict=True)]
    return total + torch.stack(zeros).sum()


class NumberedInputs:
    """Training images under numbers (view · images + place), so that each is encoded once and not once per epoch.

    Args:
        inputs: The images.
        encode: The frozen vision side.
        keep: Whether to keep what it gives; views that are drawn anew in every epoch come only once.
    """

    def __init__(self, inputs: Inputs, encode: Callable[[Tensor], ImageFeatures], *, keep: bool) -> None:
        self.inputs, self._encode, self._keep = inputs, encode, keep
        self._known: dict[int, ImageFeatures] = {}

    @property
    def labels(self) -> Tensor:
        return self.inputs.labels

    @property
    def num_views(self) -> int:
        return self.inputs.num_views

    def select(self, indices: Tensor, view: int = 0) -> Tensor:
        return indices + view * len(self.labels)

    def pixels(self, numbers: Tensor) -> Tensor:
        """Pixels [k, 3, h, w] of images by number, int64 [k]."""
        views, places = numbers // len(self.labels), numbers % len(self.labels)
        kinds = torch.unique(views).tolist()
        parts = [self.inputs.select(places[views == view], view) for view in kinds]
        order = torch.cat([(views == view).nonzero()[:, 0] for view in kinds]).argsort()
        joined = torch.cat(parts)
        return joined[order.to(joined.device)]

    @torch.no_grad()
    def features(self, numbers: Tensor) -> ImageFeatures:
        """Image features of images by number, int64 [k]."""
        wanted = numbers.tolist()
        missing = [number for number in dict.fromkeys(wanted) if number not in self._known]
        known = self._known if self._keep else dict(self._known)
        if missing:
            made = self._encode(self.pixels(torch.tensor(missing)))
            known |= {number: made.select([place]) for place, number in enumerate(missing)}
        return ImageFeatures.join([known[number] for number in wanted])


class TwinMethod(GradientMethod):
    """A method that trains parts of a twin of the model."""

    reads: ClassVar[Reads] = "images"
    needs_mllm: ClassVar[bool] = True
    config: Any
    default_training: ClassVar[TrainingSettings | None] = TrainingSettings(
        epochs=10, batch_size=16, keep_last=True, optimiser="adamw", lr=1e-4, weight_decay=0.0, schedule="cosine-step",
        warmup_epochs=0,
    )  # fmt: skip
    vision_frozen: bool = True

    # --- what a method fills in ---------------------------------------------------------------------------------------

    def tune(self, twin: MLLM) -> None:
        """Put the trainables into the twin (parameters that aren't the backbone's and ask for gradients)."""

    def shown(self, pixels: Tensor) -> ImageFeatures:
        """Image features for the method's prompt."""
        raise NotImplementedError(f"{type(self).__name__} doesn't define shown.")

    # --- the twin -----------------------------------------------------------------------------------------------------

    def build(self) -> None:
        twin = twin_of(cast(MLLM, self.backbone))
        self._twin = (twin,)  # a tuple, so that torch counts only the trainables among our modules
        self.tune(twin)
        self.backbone.requires_grad_(False)  # whatever peft marked: the twin holds the backbone's own parameters
        shared = {id(parameter) for parameter in self.backbone.parameters()}
        held = nn.Module()
        for name, parameter in twin.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in shared:
                set_parameter(held, state_name(name), parameter)
        if next(held.parameters(), None) is not None:
            self.add_module("adapter", held)
        self._numbered: NumberedInputs | None = None
        self._reached = not getattr(self.config, "checkpointing", False)  # without it nothing can go wrong there
        if not self._reached:
            recompute(twin.layers)
        super().build()

    @property
    def mllm(self) -> MLLM:
        return self._twin[0]

    def train(self, mode: bool = True) -> TwinMethod:
        for module in self._twin[0].modules() if hasattr(self, "_twin") else ():
            dropout = getattr(module, "lora_dropout", None)
            if isinstance(dropout, nn.Module):  # the model itself stays as it answers
                dropout.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TwinMethod:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for module in self._twin[0].modules():  # parameters are shared and have moved; a buffer is a new tensor then
            module._buffers = {key: b if b is None else fn(b) for key, b in module._buffers.items()}
        return self

    def trainables(self) -> list[nn.Parameter]:
        """What the loop trains."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    # --- fitting ------------------------------------------------------------------------------------------------------

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        check_training(self.name, self.config)
        keep = self.vision_frozen and not (loop is not None and loop.settings.fresh_views)
        self.set_classes(self.fitted_names)
        self._numbered = NumberedInputs(task.train, self.shown, keep=keep)
        try:
            self.look(loop)
            return super().fit(replace(task, train=self.training_inputs(self._numbered)), loop)
        finally:
            self._numbered = None

    def look(self, loop: TrainingLoop | None) -> None:
        """Look at the training images (`_numbered`) before the first step."""

    def training_inputs(self, numbered: NumberedInputs) -> Inputs:
        """What the loop draws its batches from; here the training images, by number."""
        return numbered

    def before_step(self, scale: Callable[[Tensor], Tensor]) -> None:
        if not self._reached:
            require_gradients(self.name, self.trainables())
            self._reached = True
        if self.config.clip:
            unit = float(scale(torch.ones((), device=self.backbone.device)))
            nn.utils.clip_grad_norm_(self.trainables(), self.config.clip * unit)

    def spread(self, device: str) -> None:
        if getattr(self.config, "micro_batch", 0):
            raise ConfigError(
                "micro_batch can't be set where layers are spread over processes, which would wait for each other:"
                " leave it at 0, and choose checkpointing or a smaller training.batch_size."
            )
        frozen = cast(MLLM, self.backbone)
        spread_layers(self.mllm, frozen, self.trainables(), device)

    def training_features(self, inputs: Tensor) -> ImageFeatures:
        if inputs.dim() > 1 or self._numbered is None:
            return self.shown(inputs)
        numbers = inputs.cpu()
        return self._numbered.features(numbers) if self.vision_frozen else self.shown(self._numbered.pixels(numbers))


class TunedMllm(TwinMethod, MllmZeroShot):
    """A multimodal language model with trainable parts, trained on questions about the shots and asked as before.

    It answers by every route of `mllm-zero-shot`, through the twin.
    """

    config: Any
    shares_batches: bool = True

    def build(self) -> None:
        self._supervised = 0  # tokens or images of the last batch
        self._confused: Tensor | None = None
        super().build()

    def shown(self, pixels: Tensor) -> ImageFeatures:
        return self.features(pixels)

    def classes_changed(self) -> None:
        super().classes_changed()
        self._prior_memo = None  # it depends on what was learned

    # --- fitting ------------------------------------------------------------------------------------------------------

    def finish(self, task: FitTask) -> dict[str, Any]:
        self.classes_changed()
        if self.calibrated and self._numbered is not None:
            self._calibrate(replace(task, train=self._numbered.inputs))
        letters = self.config.variant == "letters"
        answer = self.mllm.prompter.answers([Turn("?")], LETTERS[:1])[0] if letters else self._name_answers()[0]
        prompt = len(self.prompt_ids([Turn(self.question)], [self.placeholders]))
        return {
            "route": self.config.route,
            "variant": self.config.variant,
            "prompt": self.question,
            **self.token_facts,
            "supervised_text": self.mllm.prompter.tokenizer.decode(answer),
            "supervised_share": len(answer) / (prompt + len(answer)),
        }

    def training_texts(self) -> list[str]:
        prompter = self.mllm.prompter
        if self.config.variant != "letters":
            return [prompter.render([Turn(self.question, 1, name)]) for name in self._fitted_shown]
        return [prompter.render([Turn(options_text(self.question, self._fitted_shown), 1, LETTERS[0])])]

    @property
    def _fitted_shown(self) -> list[str]:
        return [name.replace("_", " ") for name in self.fitted_names]

    def _name_answers(self, *, end: bool = True) -> list[list[int]]:
        """Tokens of each fitted class's answer and the one that ends the turn, as they stand behind the question."""
        texts = self.candidate_texts(self.fitted_names)
        return self.mllm.prompter.answers([Turn(self.question)], texts, end=end)

    @torch.no_grad()
    def look(self, loop: TrainingLoop | None) -> None:
        """Note for each shot the classes that the untrained model confuses it with most, the worst first."""
        self._confused = None
        classes, show = len(self.fitted_names), progress_of(loop)
        wanted = self.config.options - 1 if self.config.variant == "letters" else self.config.negatives
        if self.config.variant == "sft" or not 0 < wanted < classes - 1 or self._numbered is None:
            return
        trie, found, labels = self.trie(), [], self._numbered.labels.cpu()
        for group in torch.arange(len(labels)).split(self.at_once()):
            prefix = self.asked(self.training_features(group))
            scores = normalised(self.mllm.candidate_scores(prefix, trie), trie.lengths, "mean").cpu()
            scores[torch.arange(len(group)), labels[group]] = -torch.inf
            found.append(scores.topk(wanted, dim=1).indices)
            show(f"{self.name}: confusions", int(group[-1]) + 1, len(labels))
        self._confused = torch.cat(found)

    # --- losses -------------------------------------------------------------------------------------------------------

    def losses(self, inputs: Tensor, labels: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        """The variant's loss.

        Args:
            inputs: Numbers of training images, int64 [batch] (see `NumberedInputs`), or pixels [batch, 3, h, w].
            labels: int64 [batch].
            frozen: Not used.
        """
        size = self.config.micro_batch or len(labels)
        chunks = torch.arange(len(labels), device=labels.device).split(size)
        self._supervised = len(labels)
        if self.config.variant == "softmax":
            loss = summed(
                lambda rows: self._softmax_loss(inputs[rows], labels[rows], len(labels)), chunks, self.trainables()
            )
            return {"candidates": loss}
        texts, answers = self._questions(inputs, labels)
        self._supervised = tokens = sum(map(len, answers))

        def part(rows: Tensor) -> Tensor:
            picked = rows.tolist()
            features = self.training_features(inputs[rows])
            return self.answer_loss([texts[i] for i in picked], [answers[i] for i in picked], features) / tokens

        return {"answer": summed(part, chunks, self.trainables())}

    def share_weight(self, labels: Tensor) -> float:
        return float(self._supervised)

    def _others(self, inputs: Tensor, labels: Tensor) -> list[list[int]]:
        """For each image the classes beside its own that it is compared with."""
        if self._confused is not None and self._numbered is not None and inputs.dim() == 1:
            rows: list[list[int]] = self._confused[inputs.cpu() % len(self._confused)].tolist()
            return rows
        everything = range(len(self.fitted_names))
        return [[other for other in everything if other != label] for label in labels.tolist()]

    def _questions(self, inputs: Tensor, labels: Tensor) -> tuple[list[str], list[list[int]]]:
        """What is asked about each image, and the tokens of its answer with the one that ends the turn."""
        if self.config.variant == "sft":
            rows = self._name_answers()
            return [self.question] * len(labels), [rows[label] for label in labels.tolist()]
        letters = self.mllm.prompter.answers([Turn("?")], LETTERS)
        texts, answers, names = list[str](), list[list[int]](), self._fitted_shown
        for label, others in zip(labels.tolist(), self._others(inputs, labels), strict=True):
            options = [label, *others[: self.config.options - 1]]
            order = torch.randperm(len(options)).tolist()  # the loop has seeded torch's own generator
            texts.append(options_text(self.question, [names[options[place]] for place in order]))
            answers.append(letters[order.index(0)])
        return texts, answers

    def answer_loss(
        self,
        texts: Sequence[str],
        answers: Sequence[list[int]],
        features: ImageFeatures,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Minus the log-probability of all answers' tokens behind their questions, summed; see `answers_loss`."""
        return answers_loss(self, [[Turn(text)] for text in texts], answers, features, weights)

    def _softmax_loss(self, inputs: Tensor, labels: Tensor, batch: int) -> Tensor:
        """Cross-entropy of the names' likelihoods over the classes, summed and divided by the whole batch's size."""
        candidates = torch.tensor(
            [[label, *others] for label, others in zip(labels.tolist(), self._others(inputs, labels), strict=True)],
            device=labels.device,
        )  # the right class first
        used, places = torch.unique(candidates, return_inverse=True)
        names = self._name_answers(end=self.config.end_token)
        trie = Trie.build([names[index] for index in used.tolist()])
        prefix = self.asked(self.training_features(inputs))
        kind: Normalisation = "mean" if self.config.normalisation == "mean" else "sum"
        scores = normalised(self.mllm.candidate_scores(prefix, trie), trie.lengths, kind).gather(1, places)
        return F.cross_entropy(scores, torch.zeros_like(labels), reduction="sum") / batch
