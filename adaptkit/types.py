"""Small values shared by every room; importing this loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Reads = Literal["image_features", "images"]
"""What a method trains on: frozen features (the image tower never runs in training) or pixels."""

NovelClasses = Literal["open", "synthesised", "zero-shot", "refused"]
"""What a method does for classes it never saw: serves them by what it learned, makes parameters for them from their
names and what it saw of others, falls back to zero-shot (flagged), or refuses."""

DEFAULT_TEMPLATES = ("a photo of a {}.",)


class Inputs(Protocol):
    """Labelled training or validation inputs, in one or several views.

    View 0 is the plain test transform; views 1 … `num_views` - 1 are augmented looks at the same images.
    """

    @property
    def labels(self) -> Tensor:
        """Class index of each image, int64 [n]."""

    @property
    def num_views(self) -> int:
        """How many views there are, the plain one included."""

    def select(self, indices: Tensor, view: int = 0) -> Tensor:
        """Inputs `indices` in one view: unnormalised features [k, dim], or preprocessed pixels [k, 3, h, w]."""


@dataclass(frozen=True)
class TensorInputs:
    """`Inputs` that lie in memory.

    Args:
        values: [views, n, dim] features (unnormalised) or [views, n, 3, h, w] preprocessed pixels.
        labels: int64 [n].
    """

    values: Tensor
    labels: Tensor

    @property
    def num_views(self) -> int:
        return int(self.values.shape[0])

    def select(self, indices: Tensor, view: int = 0) -> Tensor:
        return self.values[view][indices]


@dataclass(frozen=True)
class OtherDataset:
    """What a method is told about classes of a dataset that it wasn't fitted on.

    Args:
        templates: Zero-shot templates of that dataset; methods with `fixed_templates` keep theirs.
        descriptions: Sentences by class name.
        settings: Values of the method's `settable` settings, chosen knowing that dataset: results must say so.
    """

    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    descriptions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FitTask:
    """What a method is fitted on. Test data has no place in it.

    Args:
        class_names: One display name per class; label i is `class_names[i]`.
        train: The few shots.
        val: Validation shots for methods that choose settings, or None. Never drawn from the test split.
        seed: Seeds everything random in the fit.
        frozen: Frozen features of `train` in the same views, for methods that train on pixels and compare with the
            frozen backbone; None where they weren't stored, and such methods then encode each batch themselves.
    """

    class_names: tuple[str, ...]
    train: Inputs
    val: Inputs | None = None
    seed: int = 0
    frozen: Inputs | None = None


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of the gradient loop; a method's defaults are its paper's few-shot ones.

    Source: protocol-training sheet, section 4 (CoOp line: SGD with one constant warm-up epoch, cosine per epoch).
    """

    epochs: int = field(default=50, metadata={"help": "Passes over the few shots; 0 leaves it to steps_per_shot."})
    steps_per_shot: int = field(default=0, metadata={"help": "Steps in all per shot of a class, where epochs is 0."})
    batch_size: int = field(default=32, metadata={"help": "Images per step."})
    keep_last: bool = field(
        default=False, metadata={"help": "Train also on an epoch's last, smaller batch, not only on full ones."}
    )
    optimiser: Literal["sgd", "adam", "adamw"] = field(
        default="sgd", metadata={"help": "sgd (momentum), adam or adamw."}
    )
    lr: float = field(default=2e-3, metadata={"help": "Base learning rate."})
    min_lr: float = field(default=0.0, metadata={"help": "Where the cosine ends."})
    momentum: float = field(default=0.9, metadata={"help": "Momentum of sgd."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay on every trained tensor."})
    eps: float = field(default=1e-8, metadata={"help": "Epsilon of adam and adamw."})
    schedule: Literal["cosine-epoch", "cosine-epoch-squared", "cosine-step", "cosine-restarts", "constant"] = field(
        default="cosine-epoch", metadata={"help": "How the learning rate falls: per epoch, per step, or not."}
    )
    warmup_epochs: int = field(default=1, metadata={"help": "First epochs at the constant warm-up rate."})
    warmup_lr: float = field(default=1e-5, metadata={"help": "Learning rate of the warm-up epochs."})
    views: int = field(default=0, metadata={"help": "Stored augmented views per image; 0 trains on the plain view."})
    fresh_views: bool = field(
        default=False, metadata={"help": "Draw new augmentations every epoch instead of storing views (slow)."}
    )
    crop_scale: float = field(default=0.08, metadata={"help": "Smallest area share of the random crop."})
    flip: bool = field(default=True, metadata={"help": "Mirror views at random (wrong for digits and letters)."})
    colour_jitter: float = field(
        default=0.0,
        metadata={"help": "Most that brightness, contrast and saturation of views change by; 0: none.", "later": True},
    )
    precision: Literal["fp32", "bf16", "fp16"] = field(
        default="fp32", metadata={"help": "fp32, or autocast in bf16/fp16 with fp32 weights."}
    )


class TrainingLoop(Protocol):
    """The gradient loop as a method sees it: `evaluation` hands it to `Method.fit`."""

    settings: TrainingSettings

    def with_settings(self, settings: TrainingSettings) -> TrainingLoop:
        """The same loop under other settings, for a method that fits another one first."""

    def __call__(self, method: Any, task: FitTask) -> dict[str, Any]:
        """Train `method` on `task` in place; the report holds losses, steps and whether it was interrupted."""


ProgressCallback = Callable[[str, int, int], None]
"""Called as (what, done, total) by anything that may take over two seconds."""
