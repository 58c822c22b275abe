"""What every adaptation method gives: settings, trainables, fit, logits, and what it does for classes it never saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.base import Backbone
from adaptkit.config import check_templates
from adaptkit.errors import AdapterError, ConfigError, DataError, UnsupportedError
from adaptkit.methods.folding import Fold, MatrixHead
from adaptkit.types import (
    DEFAULT_TEMPLATES,
    FitTask,
    Inputs,
    NovelClasses,
    OtherDataset,
    ProgressCallback,
    Reads,
    TrainingLoop,
    TrainingSettings,
)


@dataclass(frozen=True)
class MethodConfig:
    """Base of the methods' settings: frozen, every field with help text in its metadata."""


Check = tuple[str, str, bool]
"""Name of a setting, what it must be, and whether it is."""


def at_least(settings: Any, least: int, *names: str) -> list[Check]:
    """That settings are at least so large, for `refuse`."""
    return [(name, f"at least {least}", getattr(settings, name) >= least) for name in names]


def refuse(settings: Any, *checks: Check, more: Sequence[str] = ()) -> None:
    """Refuse settings, all problems in one message.

    Args:
        settings: A dataclass.
        checks: What its settings must be.
        more: Problems that aren't one setting's.

    Raises:
        ConfigError: One or more checks fail, or there are more problems.
    """
    wrong = [f"{name} is {getattr(settings, name)!r}, but must be {wanted}" for name, wanted, ok in checks if not ok]
    if wrong or more:
        raise ConfigError(f"These settings can't be used: {'; '.join([*wrong, *more])}.")


def render_prompts(names: Sequence[str], template: str) -> list[str]:
    """One prompt per class; underscores of a name become spaces."""
    return [template.format(name.replace("_", " ")) for name in names]


def zero_shot_weights(backbone: Backbone, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The zero-shot classifier [classes, dim], unit rows: each prompt's feature is normalised, averaged, normalised.

    Source: datasets sheet, section 6 (arXiv 2103.00020).
    """
    prompts = [prompt for template in templates for prompt in render_prompts(names, template)]
    if backbone.texts_length is not None and len(templates) == 1:
        return backbone.text_features(prompts) / backbone.texts_length
    features = F.normalize(backbone.text_features(prompts), dim=-1)  # [templates · classes, dim]
    return F.normalize(torch.unflatten(features, 0, (len(templates), len(names))).mean(dim=0), dim=-1)  # [classes, dim]


class Method(nn.Module):
    """A way to adapt a frozen backbone. Its parameters are its own trainables; the backbone is not among them.

    Args:
        backbone: The frozen model; shared, never changed.
        class_names: The classes it is fitted on, in label order.
        templates: Zero-shot templates, each with one "{}".
        config: Settings; None for the defaults.
        seed: Seeds the initial draws.
        descriptions: Sentences by class name, for methods that read them; may hold more classes than these.

    Attributes:
        config_class: The type of `config`.
        reads: Whether `forward` and training take features or pixels.
        novel_classes: What `set_classes` does with names it wasn't fitted on. The class gives the usual answer; an
            instance may set another one in `build`, where it depends on the settings or the backbone.
        default_training: Settings of the gradient loop, and the views that are read; None for methods that use neither.
            Not every method that has them trains by gradient (Tip-Adapter only reads the views): see `GradientMethod`.
        name: Its registered name; `adaptkit.methods.methods.get` sets nothing, the class says it.
        needs_text: Whether the backbone must have a text encoder.
        needs_mllm: Whether the backbone must be a multimodal language model.
        keeps_images: Whether it stores training images: an adapter is then as large as they are.
        reads_descriptions: Whether it reads sentences about classes: "never", "optional" (it uses those it is given)
            or "needed".
        transductive: Whether an image's logits depend on the others of its batch: tests then come in one batch, or in
            those that the method's setting `query_batch` asks for.
        scores_by_class_list: Whether a class's logits depend on which other classes are asked for (APE chooses its
            channels for a list of classes); usually a subset's logits are those of all, picked out.
        tunes_towers: Whether it trains copies of a tower's own weights: an adapter is then as large as the backbone.
        mixes_classes: Whether it can choose between fitted classes and others; where it answers others zero-shot, it
            never can.
        fixed_templates: Whether it brings templates of its own, and takes no others.
        settable: Settings that another dataset may have values of its own for (see `OtherDataset`).
        other: What is known of the other dataset that the current classes and the images belong to; None for the one it
            was fitted on.
        writes_texts: Whether it needs a text encoder for texts of its own, or trains through one: stored features of
            prompts and sentences don't serve it.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[MethodConfig]] = MethodConfig
    reads: ClassVar[Reads] = "image_features"
    novel_classes: NovelClasses = "open"
    default_training: ClassVar[TrainingSettings | None] = None
    needs_text: ClassVar[bool] = True
    needs_mllm: ClassVar[bool] = False
    keeps_images: ClassVar[bool] = False
    reads_descriptions: ClassVar[Literal["never", "optional", "needed"]] = "never"
    transductive: ClassVar[bool] = False
    scores_by_class_list: ClassVar[bool] = False
    tunes_towers: ClassVar[bool] = False
    mixes_classes: ClassVar[bool] = True
    fixed_templates: ClassVar[bool] = False
    settable: ClassVar[tuple[str, ...]] = ()
    other: OtherDataset | None = None
    writes_texts: ClassVar[bool] = False
    _zero_shot_memo: tuple[Any, Tensor] | None = None

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        *,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        config: MethodConfig | None = None,
        seed: int = 0,
        descriptions: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        self._backbone = (backbone,)  # a tuple, so that torch doesn't count the backbone among our modules
        self.config = self.config_class() if config is None else config
        if not isinstance(self.config, self.config_class):
            raise ConfigError(f"{self.name} takes a {self.config_class.__name__}, not a {type(self.config).__name__}.")
        if self.needs_mllm and not backbone.is_mllm:
            raise UnsupportedError(
                f"{self.name} asks a multimodal language model, and {backbone.spec.name!r} isn't one: choose a backbone"
                " such as 'mini-mllm' or 'transformers:Qwen/Qwen2.5-VL-3B-Instruct', or a method for CLIP-like"
                " backbones (zero-shot)."
            )
        if self.needs_text and not backbone.has_text:
            raise UnsupportedError(
                f"{self.name} compares images with class names, and {backbone.spec.name!r} has no text encoder:"
                " choose a CLIP-like backbone, or a method that needs no text (linear-probe)."
            )
        self.templates = check_templates(templates)
        self.fitted_names = check_names(class_names)
        self.class_names = self.fitted_names
        reads = self.reads_descriptions != "never"
        self.descriptions = check_descriptions(descriptions or {}) if reads else {}
        self._require_descriptions(self.fitted_names)
        self.uses_fallback = False
        self.register_forward_pre_hook(_require_finite_inputs)
        self.generator = torch.Generator().manual_seed(seed % 2**63)  # torch takes no larger ones
        self._text_changes = 0  # of templates and descriptions, counted
        self.build()
        self._own_texts = (self.templates, self.descriptions)
        self.to(backbone.device)
        self.set_classes(class_names)
        self.eval()  # only a training loop puts it into training mode

    @property
    def backbone(self) -> Backbone:
        return self._backbone[0]

    @property
    def open_vocabulary(self) -> bool:
        """Whether classes it wasn't fitted on are served by what it learned."""
        return self.novel_classes in ("open", "synthesised")

    # --- what a method fills in ---------------------------------------------------------------------------------------

    def build(self) -> None:
        """Create the trainables; draws come from `self.generator`, on the CPU. Called once, before `set_classes`."""

    def classes_changed(self) -> None:
        """Rebuild what depends on `self.class_names` and `self.uses_fallback`. Called by `set_classes`."""

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        """Fit on the task, in place; returns facts for the result (searched settings, losses, …)."""
        raise NotImplementedError(f"{type(self).__name__} doesn't define fit.")

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [batch, classes] of unnormalised features [batch, dim] or pixels [batch, 3, h, w] (see `reads`)."""
        raise NotImplementedError(f"{type(self).__name__} doesn't define forward.")

    def answer_facts(self) -> dict[str, Any]:
        """Facts about the answers given since this was last asked, as plain values, for the result; then forgotten."""
        return {}

    def judged_facts(self, labels: Sequence[int]) -> dict[str, Any]:
        """The like that only the right classes tell (accuracies of by-products); asked for before `answer_facts`.

        Args:
            labels: Index among the current classes of each image that was answered, in order.
        """
        return {}

    def ask(self, pixels: Tensor, questions: Sequence[str], max_tokens: int = 32) -> list[str]:
        """Free answers to a question about each image; call it without gradients.

        Args:
            pixels: [images, 3, size, size].
            questions: One for each image.
            max_tokens: Most tokens of an answer.

        Raises:
            UnsupportedError: It asks no multimodal language model.
        """
        raise UnsupportedError(
            f"{self.name} asks no multimodal language model: choose mllm-zero-shot or a tuned one (mllm-lora)."
        )

    def fold(self) -> Fold:
        """What answering needs for the current classes, and no more; call it without gradients.

        Raises:
            UnsupportedError: It needs the text tower, or other images, for every answer; the message says which.
        """
        if self.transductive:
            raise UnsupportedError(
                f"{self.name} can't be folded: what it answers for an image depends on the images it is asked about"
                " with it. Keep the adapter folder, which 'adaptkit predict' reads, or choose an inductive method."
            )
        raise UnsupportedError(
            f"{self.name} doesn't say how it folds: keep the adapter folder, which 'adaptkit predict' reads."
        )

    def resize_for(self, state: Mapping[str, Tensor]) -> None:
        """Give the trainables the sizes of a state about to be loaded, for methods whose sizes come from the data.

        The sizes come from a file: check them (`AdapterError`) before anything is allocated.
        """

    def reference_key(self, key: str) -> str | None:
        """The name that this method's official release gives to our `adapter_state` entry `key`.

        None where the release keeps no such entry and ours stays as it is.
        """
        raise UnsupportedError(f"{self.name} has no reference checkpoints to read.")

    def reference_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A checkpoint under the names that `reference_key` gives, for releases that write other ones to their files.

        Args:
            state: As `adaptkit.methods.reference.read_reference_checkpoint` gives it.
        """
        return state

    def training_texts(self) -> list[str]:
        """Texts that training shows a language model, as it reads them: none may name a novel class."""
        return []

    def spread(self, device: str) -> None:
        """Spread frozen layers over the processes that train together, and move the rest to this one's device.

        Raises:
            UnsupportedError: It has none to spread.
        """
        raise UnsupportedError(
            f"{self.name} trains no multimodal language model whose layers could be spread over processes: start it"
            " without FSDP."
        )

    def write_extras(self, folder: Path) -> None:
        """Write what other libraries read into an adapter's folder, when it is saved. Most methods have nothing."""

    @classmethod
    def reference_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The settings that a checkpoint of the official release shows by its names and shapes, by field name.

        Args:
            state: As `adaptkit.methods.reference.read_reference_checkpoint` gives it.
        """
        return {}

    def context_vectors(self) -> dict[str, Tensor]:
        """Learned vectors that stand among the text tower's token embeddings, [k, width] by a readable name.

        Empty for methods that learn none; `adaptkit explain` shows the words nearest to them.
        """
        return {}

    # --- what every method has ----------------------------------------------------------------------------------------

    def set_classes(self, names: Sequence[str], other: OtherDataset | None = None) -> Method:
        """Predict among `names` from now on; returns itself.

        A subset of the fitted classes is always served by what was learned. What happens with others depends on
        `novel_classes`: they are served ("open"), all predictions become zero-shot and `uses_fallback` is set
        ("zero-shot"), or they are refused ("refused").

        Args:
            names: The classes, in the order of the logits.
            other: The dataset that the classes and the images belong to, where it isn't the one fitted on. Classes that
                happen to be called like fitted ones may then stand beside others: all of them count as new.

        Raises:
            UnsupportedError: Novel classes for a method that refuses them, or fitted and novel classes mixed for a
                method whose scores for the two aren't comparable.
            ConfigError: `other` has settings that this method can't take.
        """
        names = check_names(names)
        before = (self.class_names, self.uses_fallback, self.other, self.templates, self.descriptions)
        self._describe(other)
        try:
            self._require_descriptions(names)
            novel = check_novel(type(self), self.fitted_names, names, other is not None, self.novel_classes)
            self.class_names, self.uses_fallback = names, novel and self.novel_classes == "zero-shot"
            self.classes_changed()
        except Exception:  # a name that doesn't fit, for one: go on with the classes from before
            self.class_names, self.uses_fallback, self.other, self.templates, self.descriptions = before
            self._text_changes += 1
            raise
        return self

    def _describe(self, other: OtherDataset | None) -> None:
        """Take the other dataset's texts, or one's own again."""
        if other is self.other:
            return
        templates, descriptions = self._own_texts
        if other is not None:
            unknown = sorted(set(other.settings) - set(self.settable))
            if unknown:
                raise ConfigError(
                    f"{self.name} takes no {unknown[0]!r} for another dataset; it takes"
                    f" {', '.join(self.settable) or 'no settings there'}."
                )
            templates = templates if self.fixed_templates else check_templates(other.templates)
            reads = self.reads_descriptions != "never"
            descriptions = check_descriptions(other.descriptions) if reads else descriptions
        self.other, self.templates, self.descriptions = other, templates, descriptions
        self._text_changes += 1

    @property
    def texts_key(self) -> tuple[Any, ...]:
        """Names whatever is made of the current classes' names, templates and descriptions, and kept."""
        return (self.class_names, self._text_changes, self.backbone.device)

    @property
    def all_novel(self) -> bool:
        """Whether every current class counts as new."""
        novel = [name not in set(self.fitted_names) for name in self.class_names]
        return all(novel) or (self.other is not None and any(novel))

    def _require_descriptions(self, names: Sequence[str]) -> None:
        """Refuse classes that no sentence describes, for methods that need them."""
        missing = [name for name in names if not self.descriptions.get(name)]
        if missing and self.reads_descriptions == "needed":
            others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise DataError(
                f"{self.name} reads descriptions of the classes, and {missing[0]!r}{others} has none: give a file with"
                " sentences for every class (--descriptions), or choose a method that reads names alone."
            )

    @property
    def scores_alone(self) -> bool:
        """Whether a class's logit is the same whichever others are asked for: a subset's are those of all, picked."""
        return not (self.scores_by_class_list or self.transductive)

    def images_at_once(self, count: int, usual: int) -> int:
        """How many of `count` images to ask for together, at least 1: `usual`, unless answers depend on the others."""
        if not self.transductive:
            return usual
        return max(1, getattr(self.config, "query_batch", 0) or count)

    def fitted_indices(self) -> Tensor:
        """Index among the fitted classes of each current class, int64 [classes]; no novel classes."""
        place = {name: index for index, name in enumerate(self.fitted_names)}
        return torch.tensor([place[name] for name in self.class_names], device=self.backbone.device)

    def zero_shot(self) -> Tensor:
        """The zero-shot classifier [classes, dim] of the current classes, unit rows; remembered for one class list."""
        key = self.texts_key
        if self._zero_shot_memo is None or self._zero_shot_memo[0] != key:
            # made in inference mode, or in half precision, it couldn't serve training
            exact = torch.autocast(self.backbone.device.type, enabled=False)
            with torch.inference_mode(False), torch.no_grad(), exact:
                weights = zero_shot_weights(self.backbone, self.class_names, self.templates)
            self._zero_shot_memo = (key, weights)
        return self._zero_shot_memo[1]

    def scale_and_bias(self) -> tuple[float, float]:
        """What cosines are multiplied with, and what is added: here the backbone's."""
        return float(self.backbone.logit_scale), float(self.backbone.logit_bias)

    def cosine_head(self, weights: Tensor) -> MatrixHead:
        """The fold of `cosine_logits` with class weights [classes, dim]."""
        scale, bias = self.scale_and_bias()
        return MatrixHead(weights, scale=scale, bias=bias)

    def cosine_logits(self, features: Tensor, weights: Tensor) -> Tensor:
        """scale · cosine + bias: [batch, dim] and unit weights [classes, dim] to [batch, classes], fp32.

        Also under autocast, since half-precision logits near 30 would be multiples of 1/64 or coarser.
        """
        backbone = self.backbone
        with torch.autocast(features.device.type, enabled=False):
            cosine = F.normalize(features.float(), dim=-1) @ weights.float().T  # [batch, classes]
            return backbone.logit_scale * cosine + backbone.logit_bias

    def num_trained(self) -> int:
        """How many numbers it trains."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def adapter_state(self) -> dict[str, Tensor]:
        """What was learned, by name; enough to rebuild it next to the same backbone."""
        return {key: value.detach() for key, value in self.state_dict().items()}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what was learned.

        Raises:
            AdapterError: A tensor is missing, unknown, of another shape, or not finite.
        """
        self.resize_for(state)
        own = self.state_dict()
        missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
        if missing or unknown:
            what = f"lacks {missing[0]!r}" if missing else f"holds {unknown[0]!r}, which {self.name} doesn't know"
            raise AdapterError(f"The adapter {what}: it was made with other settings or by another method.")
        for key, value in state.items():
            if value.shape != own[key].shape:
                raise AdapterError(
                    f"The adapter's {key!r} has shape {tuple(value.shape)}, {tuple(own[key].shape)} was expected:"
                    " it was made for another backbone or with other settings."
                )
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise AdapterError(f"The adapter's {key!r} holds values that aren't finite: train it again.")
        self.load_state_dict(dict(state))
        self.classes_changed()

    def load_reference_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over a checkpoint of the method's official release, whose extra entries (CLIP itself) are ignored.

        Args:
            state: As `adaptkit.methods.reference.read_reference_checkpoint` gives it.

        Raises:
            AdapterError: An entry is missing, or has another shape than these settings and this backbone ask for.
        """
        state = self.reference_state(state)
        own = self.adapter_state()
        if not own:
            raise UnsupportedError(f"{self.name} has no reference checkpoints to read: it learns nothing.")
        for key, value in own.items():
            theirs = self.reference_key(key)
            if theirs is None:
                continue
            # CoOp's files hold the prompt learner alone ("ctx"), MaPLe's the whole model ("prompt_learner.ctx")
            found = next((name for name in (theirs, theirs.partition(".")[2]) if name in state), None)
            if found is None:
                raise AdapterError(
                    f"The checkpoint has no {theirs!r}, which holds {self.name}'s {key!r}: it was made by another"
                    " method or with other settings."
                )
            own[key] = state[found].to(value.device, value.dtype)
        self.load_adapter_state(own)


def check_novel(
    kind: type[Method],
    fitted: Sequence[str],
    names: Sequence[str],
    elsewhere: bool = False,
    novel_classes: NovelClasses | None = None,
) -> bool:
    """Whether a method answers `names` as classes it wasn't fitted on.

    Args:
        kind: The method.
        fitted: The classes it is fitted on.
        names: The classes it is asked for.
        elsewhere: Whether they belong to another dataset.
        novel_classes: What an instance does with novel classes; None for the kind's usual answer.

    Raises:
        UnsupportedError: It refuses them, or can't choose between fitted classes and others.
    """
    does, known = novel_classes or kind.novel_classes, set(fitted)
    novel = [name for name in names if name not in known]
    if novel and does == "refused":
        raise UnsupportedError(
            f"{kind.name} was fitted with weights for its own classes only and can't predict {novel[0]!r}:"
            " fit it on these classes, or choose an open-vocabulary method."
        )
    if 0 < len(novel) < len(names) and not elsewhere and (does == "zero-shot" or not kind.mixes_classes):
        own = next(name for name in names if name in known)
        raise UnsupportedError(
            f"{kind.name} scores the classes it was fitted on and others on different scales, so it can't choose"
            f" between {own!r} and {novel[0]!r}: ask for fitted classes only, for new ones only, or fit it on all."
        )
    return bool(novel)


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Class names as a tuple, refusing none at all, empty ones and duplicates."""
    names = tuple(names)
    if not names:
        raise DataError("No class names were given: at least one is needed.")
    empty = [index for index, name in enumerate(names) if not name.strip()]
    if empty:
        raise DataError(f"Class {empty[0]} has an empty name: every class needs a name.")
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise DataError(f"Class name {twice[0]!r} occurs {names.count(twice[0])} times: make the names unique.")
    return names


def check_descriptions(descriptions: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Sentences by class name as tuples, refusing what isn't a text or is empty.

    Raises:
        DataError: A sentence isn't a text, or is empty; the message names its class.
    """
    checked = {}
    for name, sentences in descriptions.items():
        wrong = [one for one in sentences if not isinstance(one, str) or not one.strip()]
        if wrong or isinstance(sentences, str):
            raise DataError(
                f"The descriptions of {name!r} must be a list of sentences; {wrong[:1] or sentences!r} isn't."
            )
        checked[name] = tuple(sentences)
    return checked


def draw_linear(inputs: int, outputs: int, numbers: torch.Generator, *, bias: bool = True) -> nn.Linear:
    """A linear layer drawn as `nn.Linear` does, uniform in ±1/sqrt(inputs), but from our own generator, on the CPU."""
    with torch.random.fork_rng(devices=()):  # its own draw would move torch's generator
        layer = nn.Linear(inputs, outputs, bias=bias)
    bound = inputs**-0.5
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=numbers)
    return layer


def draw_normal(shape: Sequence[int], std: float, numbers: torch.Generator) -> nn.Parameter:
    """A trainable of normal draws with mean 0, made on the CPU."""
    return nn.Parameter(torch.randn(tuple(shape), generator=numbers) * std)


def require_finite(values: Tensor, what: str = "Image") -> None:
    """Refuse features [n, dim] or pixels [n, 3, h, w] that aren't finite.

    Raises:
        DataError: A value isn't finite; the message says of which image.
    """
    wrong = (~torch.isfinite(values.flatten(1)).all(dim=1)).nonzero()
    if len(wrong):
        others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        kind = "features" if values.dim() == 2 else "pixels"
        raise DataError(
            f"{what} {int(wrong[0])}{others} has {kind} that aren't finite: check the image, or encode in fp32."
        )


def _require_finite_inputs(method: nn.Module, given: tuple[Tensor, ...]) -> None:
    """Before every answer: one bad row would spoil a whole transductive batch, and look like a class elsewhere."""
    if not (method.training or torch.compiler.is_compiling()):
        require_finite(given[0])


def read_all(inputs: Inputs, view: int = 0) -> Tensor:
    """All inputs in one view, fp32, in order: features [n, dim] or pixels [n, 3, h, w].

    Raises:
        DataError: A value isn't finite; the message says of which image.
    """
    values = inputs.select(torch.arange(len(inputs.labels)), view).detach().float()
    require_finite(values)
    return values


def progress_of(loop: TrainingLoop | None) -> ProgressCallback:
    """The loop's progress callback, for methods that don't train by gradient and still take a while."""
    return getattr(loop, "progress", None) or (lambda what, done, total: None)


class ClassWeightMethod(Method):
    """A method whose logits are scale · cosine with one vector per class; it folds to a matrix.

    Weights depend on the trainables and the class names alone, so evaluation computes them once and remembers them
    until either changes.
    """

    _memo: tuple[Any, Tensor] | None = None

    def class_weights(self) -> Tensor:
        """One vector per current class, [classes, dim], unit rows; differentiable with respect to the trainables."""
        raise NotImplementedError(f"{type(self).__name__} doesn't define class_weights.")

    def folded_weights(self) -> Tensor:
        """`class_weights`, remembered where no gradient is asked for."""
        if torch.is_grad_enabled():
            return self.class_weights()
        key = (
            self.class_names,
            [(id(t), t._version, t.device, t.dtype) for t in (*self.parameters(), *self.buffers())],
        )
        if self._memo is None or self._memo[0] != key:
            self._memo = (key, self.class_weights())
        return self._memo[1]

    def classes_changed(self) -> None:
        self._memo = None

    def forward(self, inputs: Tensor) -> Tensor:
        return self.cosine_logits(inputs, self.folded_weights())

    def fold_tower(self) -> nn.Module | None:
        """The adapted image tower, from pixels to features; None where it is the frozen backbone's."""
        return None

    def fold(self) -> Fold:
        return Fold(self.cosine_head(self.folded_weights()), self.fold_tower())


@dataclass(frozen=True)
class ParameterGroup:
    """Trainables that an optimiser treats alike.

    Args:
        parameters: The trainables.
        lr: Base learning rate, which the schedule moves in step with the settings' own; None for the settings'.
        weight_decay: None for the settings'.
        betas: Averages' decay of adam and adamw; None for torch's own. Other optimisers have none.
    """

    parameters: tuple[nn.Parameter, ...]
    lr: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None


def total_loss(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of named loss terms, in fp32."""
    return torch.stack([term.float() for term in terms.values()]).sum()


class GradientMethod(Method):
    """A method trained by the gradient loop: it gives a loss as named terms, the loop does the rest.

    Attributes:
        wants_frozen: Whether `losses` compares with the frozen backbone's features of the same images; they come from
            the feature store where their views are stored there.
        shares_batches: Whether several processes may each train on a share of every batch: its loss is then the mean of
            the shares', weighted by `share_weight`. Not where images of a batch are compared with each other, nor where
            terms are means over different things.
        enough: Set in `after_epoch` where training is to end with that epoch.
    """

    default_training: ClassVar[TrainingSettings | None] = TrainingSettings()
    wants_frozen: bool = False
    shares_batches: bool = False
    enough: bool = False

    def prepare(self, task: FitTask) -> None:
        """Build what depends on the training data, before the first step."""

    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        """What the loop trains, as groups of the optimiser; here all trainables as one."""
        return (ParameterGroup(tuple(p for p in self.parameters() if p.requires_grad)),)

    def losses(self, inputs: Tensor, labels: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        """Named loss terms, whose sum is minimised.

        Args:
            inputs: As `forward` takes them.
            labels: int64 [batch].
            frozen: The frozen backbone's unnormalised features [batch, dim] of the same images, for methods that
                `wants_frozen`; None where they are to be computed from `inputs` (see `frozen_features`).
        """
        return {"cross_entropy": F.cross_entropy(self(inputs), labels)}

    def frozen_features(self, inputs: Tensor, frozen: Tensor | None) -> Tensor:
        """The frozen backbone's unit features [batch, dim] of pixels `inputs`: those given, or computed."""
        if frozen is None:
            with torch.no_grad():
                frozen = self.backbone.encode_image(inputs)
        return F.normalize(frozen.float(), dim=-1)

    def backward(self, terms: Mapping[str, Tensor], scale: Callable[[Tensor], Tensor]) -> None:
        """Give the trainables their gradients, here of the terms' sum.

        Args:
            terms: From `losses`.
            scale: Scales a loss against overflow in half precision; every loss whose gradient is taken goes through it.
        """
        torch.autograd.backward(scale(total_loss(terms)))

    def share_weight(self, labels: Tensor) -> float:
        """How much the batch of the last `losses` counts beside other shares of a larger one: here its images."""
        return float(len(labels))

    def before_step(self, scale: Callable[[Tensor], Tensor]) -> None:
        """Called when the whole batch's gradients are there, before the optimiser's step.

        Args:
            scale: As for `backward`.
        """

    def after_epoch(self, epoch: int, epochs: int) -> None:
        """Called when epoch `epoch` (from 0) of `epochs` is done, after its last step."""

    def training_state(self) -> dict[str, Tensor]:
        """What training goes on from beside parameters and buffers, for a checkpoint; most methods have nothing."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `training_state`, after `prepare`."""

    def finish(self, task: FitTask) -> dict[str, Any]:
        """Choose what is chosen after training (on validation data); facts for the result."""
        return {}

    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        if loop is None:
            raise ConfigError(f"{self.name} trains by gradient: hand its fit a loop (adaptkit.training.loop).")
        self.set_classes(self.fitted_names)
        self.prepare(task)
        report = loop(self, task)
        return {**report, **self.finish(task)}
