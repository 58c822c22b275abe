"""Tasks: from a dataset's name to shots to train on and parts to test.

few-shot          all classes: shots of every class, the whole test split
base-to-novel     shots drawn over all classes, trained on the first half of them; base and novel test images, each
                  among its own half's names

Source: protocols sheet, sections 1 and 2; datasets sheet, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from adaptkit.errors import DataError, UnknownNameError
from adaptkit.evaluation.recipes import PROTOCOLS

if TYPE_CHECKING:
    import numpy as np

    from adaptkit.data.few_shot import FewShot
    from adaptkit.data.splits import Dataset, TestSplit, TrainSplit, ValSplit
    from adaptkit.types import ProgressCallback

Masking = Literal["logits", "names"]


@dataclass(frozen=True)
class TaskSpec:
    """Everything said about a task, as plain values: `load_task` makes the task.

    Args:
        dataset: A known name, a folder of class folders, a CSV or a split JSON.
        protocol: One of `PROTOCOLS`.
        shots: Images per class.
        seed: Seeds the draw of the shots and the training.
        sampler: Whose draws (see `adaptkit.data.few_shot`).
        allow_fewer: Accept classes with fewer images than shots.
        data_root: Folder that holds the datasets' folders.
        templates: Prompts with one "{}"; none for the dataset's own.
        display_names: JSON file of class names as the text tower shall read them.
        skip_unreadable: Leave out training and validation images that can't be read.
        descriptions: File or folder of sentences about the classes.
        allow_undescribed: Accept classes that the descriptions leave out.
        targets: Datasets to test on without further training (cross-dataset, domain-generalisation).
        masking: How the candidates of a shifted dataset are kept to its own classes: by dropping the other columns of
            the logits over all source classes, or by asking for its names alone.
        class_split: Seed of a random split into base and novel classes; None for the published halves.
        class_order: File with every class name once; its first half is base.
        base_classes: File with the names of the base classes.
        novel_classes: File with the names of the novel classes; None for all others than the base ones.
        joint: Ask about base and novel classes together instead of each half among its own.
    """

    dataset: str
    protocol: str = "few-shot"
    shots: int = 16
    seed: int = 1
    sampler: str = "coop"
    allow_fewer: bool = False
    data_root: str | None = None
    templates: tuple[str, ...] = ()
    display_names: str | None = None
    skip_unreadable: bool = False
    descriptions: str | None = None
    allow_undescribed: bool = False
    targets: tuple[str, ...] = ()
    masking: Masking = "logits"
    class_split: int | None = None
    class_order: str | None = None
    base_classes: str | None = None
    novel_classes: str | None = None
    joint: bool = False


@dataclass(frozen=True)
class TestPart:
    """Test images that are answered among one list of classes.

    Args:
        name: "all", "base" or "novel".
        split: The images, labelled within `split.class_names`.
        positions: Each image's position in the dataset's test split, int64 [n].
    """

    __test__ = False  # pytest would collect the name

    name: str
    split: TestSplit
    positions: np.ndarray


@dataclass(frozen=True)
class Task:
    """What one seed makes of a dataset under a protocol.

    Args:
        dataset: The whole dataset.
        protocol: One of `PROTOCOLS`.
        few_shot: Which images were drawn.
        train: The shots of the classes trained on.
        val: Validation images of the same classes; empty where the dataset has none.
        parts: What is tested.
    """

    dataset: Dataset
    protocol: str
    few_shot: FewShot
    train: TrainSplit
    val: ValSplit | None
    parts: tuple[TestPart, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes trained on."""
        return self.train.class_names

    @property
    def seed(self) -> int:
        return self.few_shot.seed


def load_task(spec: TaskSpec, progress: ProgressCallback | None = None) -> Task:
    """The task that a spec describes; images left out as unreadable are counted in the dataset's notes."""
    from adaptkit.data.checks import drop_unreadable
    from adaptkit.data.descriptions import with_descriptions
    from adaptkit.data.sources import load_dataset

    data = load_dataset(
        spec.dataset,
        data_root=spec.data_root,
        templates=list(spec.templates) or None,
        shots=spec.shots,
        display_names=spec.display_names,
    )
    if spec.descriptions is not None:
        data = with_descriptions(data, spec.descriptions, allow_missing=spec.allow_undescribed)
    if spec.skip_unreadable:
        train, dropped = drop_unreadable(data.train, progress=progress)
        val, more = (None, []) if data.val is None else drop_unreadable(data.val, progress=progress)
        dropped += more
        notes = [f"{len(dropped)} unreadable images left out, the first: {dropped[0][0]}"] if dropped else []
        data = replace(data, train=train, val=val, notes=(*data.notes, *notes))
    return make_task(data, spec.protocol, spec.shots, spec.seed, spec.sampler, allow_fewer=spec.allow_fewer)


def make_task(
    dataset: Dataset,
    protocol: str = "few-shot",
    shots: int = 16,
    seed: int = 1,
    sampler: str = "coop",
    *,
    allow_fewer: bool = False,
) -> Task:
    """Draw the shots and lay out what is tested.

    Args:
        dataset: Must have test images.
        protocol: "few-shot" or "base-to-novel".
        shots: Images per class.
        seed: Seeds the draw; 0 is a seed like any other.
        sampler: Whose draws (see `adaptkit.data.few_shot`).
        allow_fewer: Accept classes with fewer images than shots.

    Raises:
        UnknownNameError: No such protocol or sampler.
        DataError: No test images, or too few images for the shots.
    """
    import numpy as np

    from adaptkit.data.base_to_novel import split_base_novel
    from adaptkit.data.few_shot import sample_few_shot
    from adaptkit.data.splits import TestSplit, require_split

    if protocol not in PROTOCOLS:
        raise UnknownNameError.for_name("protocol", protocol, PROTOCOLS)
    test = require_split(dataset.test, TestSplit, "Testing")
    if not len(test):
        raise DataError(f"{dataset.name} has no test images: add a test split, or more images per class.")
    drawn = sample_few_shot(dataset.train, dataset.val, shots, seed, sampler, allow_fewer=allow_fewer)
    train = dataset.train.subset(drawn.train_indices)
    val = dataset.val.subset(drawn.val_indices) if dataset.val is not None and len(drawn.val_indices) else None
    if protocol == "few-shot":
        return Task(dataset, protocol, drawn, train, val, (TestPart("all", test, np.arange(len(test))),))
    base, novel = split_base_novel(train.labels, len(dataset.class_names))
    parts = tuple(TestPart(half.name, half.restrict(test), half.indices(test.labels)) for half in (base, novel))
    empty = [part.name for part in parts if not len(part.split)]
    if empty:
        raise DataError(f"{dataset.name} has no test images of its {empty[0]} classes.")
    return Task(dataset, protocol, drawn, base.restrict(train), None if val is None else base.restrict(val), parts)
