"""Tasks: from a dataset's name to shots to train on and parts to test.

few-shot               all classes: shots of every class, the whole test split
base-to-novel          shots drawn over all classes, trained on the first half of them; base and novel test images,
                       each among its own half's names. Marked options: a random split into halves, halves from files,
                       and all classes as candidates for every image ("joint", generalised)
cross-dataset          trained on all classes of a source; its test split, and those of other datasets, each among its
                       own class names and described by its own templates
domain-generalisation  trained as above; tested on shifted versions of the source, with the source's names and
                       templates. Candidates are the classes that the shifted version has, found by stored names
                       (ImageNet's ids): the logits over all source classes are computed and only those classes'
                       columns kept ("logits"), or the classifier is made for those classes alone ("names"). The two
                       agree for methods that score each class by itself. Labels are in the source's order, so in
                       ascending order of ids

Source: protocols sheet, sections 1-4; datasets sheet, sections 4, 5 and 9.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from adaptkit.errors import AdaptKitError, ConfigError, DataError, UnknownNameError
from adaptkit.evaluation.recipes import PROTOCOLS
from adaptkit.evaluation.results import SOURCE
from adaptkit.types import OtherDataset

if TYPE_CHECKING:
    import numpy as np

    from adaptkit.data.base_to_novel import ClassSubset
    from adaptkit.data.few_shot import FewShot
    from adaptkit.data.splits import Dataset, TestSplit, TrainSplit, ValSplit
    from adaptkit.types import ProgressCallback

Masking = Literal["logits", "names"]

T = TypeVar("T")

_MOST_PROBLEMS = 10

TRANSFER_PROTOCOLS = ("cross-dataset", "domain-generalisation")
"""Protocols with targets: trained once, tested on several datasets."""

KNOWN_TARGETS: Mapping[tuple[str, str], tuple[str, ...]] = MappingProxyType(
    {
        ("cross-dataset", "imagenet"): (
            "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft", "sun397", "dtd",
            "eurosat", "ucf101",
        ),
        ("domain-generalisation", "imagenet"): ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"),
        ("cross-dataset", "shapes"): ("textures", "species", "digits"),
        ("domain-generalisation", "shapes"): (
            "shapes-sketch", "shapes-noise", "shapes-inverted", "shapes-lowcontrast",
        ),
    }
)  # fmt: skip
"""Usual targets by protocol and source."""


@dataclass(frozen=True)
class TaskSpec:
    """Everything said about a task, as plain values: `load_task` makes the task.

    Args:
        dataset: A known name, a folder of class folders, a CSV, a split JSON or features:FILE.
        protocol: One of `PROTOCOLS`.
        shots: Images per class.
        seed: Seeds the draw of the shots and the training.
        sampler: Whose draws (see `adaptkit.data.few_shot`).
        allow_fewer: Accept classes with fewer images than shots.
        data_root: Folder that holds the datasets' folders.
        templates: Prompts with one "{}", or "@FILE" with one a line, for targets too; none for each dataset's own.
        display_names: JSON file of class names as the text tower shall read them (not for targets).
        own_split: A split of ours instead of a known dataset's published one, also for targets.
        skip_unreadable: Leave out training and validation images that can't be read.
        descriptions: File or folder of sentences about the classes, those of targets too.
        allow_undescribed: Accept classes that the descriptions leave out.
        targets: Datasets to test on without further training (cross-dataset, domain-generalisation); none for the
            source's usual ones (`KNOWN_TARGETS`).
        masking: How the candidates of a shifted dataset are kept to its own classes (domain-generalisation): "logits"
            or "names", see the top of this file.
        class_split: Seed of a random split into base and novel classes (base-to-novel).
        class_order: Text file with every class name once; its first half is base (base-to-novel).
        base_classes: Text file with the names of the base classes (base-to-novel).
        novel_classes: Text file with the names of the novel classes; None for all others than the base ones.
        joint: Ask about base and novel classes together instead of each half among its own (base-to-novel).
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
    own_split: bool = False
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

    @property
    def all_targets(self) -> tuple[str, ...]:
        """The targets named, else the usual ones of the source; none where the protocol has none."""
        if self.protocol not in TRANSFER_PROTOCOLS:
            return ()
        return self.targets or KNOWN_TARGETS.get((self.protocol, self.dataset), ())

    def problems(self) -> list[str]:
        """Everything about it that can't go together, in sentences; nothing is read for this."""
        if self.protocol not in PROTOCOLS:
            return [str(UnknownNameError.for_name("protocol", self.protocol, PROTOCOLS))]
        return [*self._target_problems(), *self._half_problems()]

    def _target_problems(self) -> list[str]:
        if self.masking not in get_args(Masking):
            return [str(UnknownNameError.for_name("masking", self.masking, get_args(Masking)))]
        if self.protocol not in TRANSFER_PROTOCOLS:
            both = " or ".join(TRANSFER_PROTOCOLS)
            found = [f"--targets are tested with --protocol {both} only, not with {self.protocol}."] * bool(
                self.targets
            )
            return found + self._masking_problems()
        found = self._masking_problems()
        if not self.all_targets:
            known = ", ".join(source for protocol, source in KNOWN_TARGETS if protocol == self.protocol)
            found.append(f"Name the targets of {self.dataset} with --targets a,b,c: only {known} have usual ones.")
        if self.dataset in self.all_targets:
            found.append(f"{self.dataset} is the source, and can't be a target too: leave it out of --targets.")
        twice = _repeated(self.targets)
        if twice:
            found.append(f"Named more than once as a target: {', '.join(twice)}.")
        return found

    def _masking_problems(self) -> list[str]:
        wrong = self.masking != "logits" and self.protocol != "domain-generalisation"
        return [f"--masking is for --protocol domain-generalisation only, not for {self.protocol}."] * wrong

    def _half_problems(self) -> list[str]:
        given = {
            "--class-split": self.class_split is not None,
            "--class-order": self.class_order is not None,
            "--base-classes": self.base_classes is not None,
        }
        said = [option for option, is_given in given.items() if is_given]
        found = []
        if self.protocol != "base-to-novel":
            wrong = said + ["--novel-classes"] * (self.novel_classes is not None) + ["--joint"] * self.joint
            return [f"{', '.join(wrong)}: for --protocol base-to-novel only, not for {self.protocol}."] * bool(wrong)
        if len(said) > 1:
            found.append(f"{' and '.join(said)} each say which classes are base: give one of them.")
        if self.novel_classes is not None and self.base_classes is None:
            found.append("--novel-classes needs --base-classes beside it.")
        return found


@dataclass(frozen=True)
class TestPart:
    """Test images that are answered among one list of classes.

    Args:
        name: "all", "base", "novel", "source", or a target's name.
        split: The images, labelled within `split.class_names`.
        positions: Each image's position in its dataset's test split, int64 [n].
        candidates: The classes that the method is asked for, where they are others than `split.class_names`.
        columns: Which candidates the classes of `split` are, in label order; the logits of the others are dropped.
        other: The dataset of the images, where it isn't the one trained on.
    """

    __test__ = False  # pytest would collect the name

    name: str
    split: TestSplit
    positions: np.ndarray
    candidates: tuple[str, ...] = ()
    columns: tuple[int, ...] = ()
    other: OtherDataset | None = None

    @property
    def asked(self) -> tuple[str, ...]:
        """The classes that the method is asked for."""
        return self.candidates or self.split.class_names


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
        settings: What else about the task changes numbers: goes into the run's key. Empty for the plain protocols.
        notes: What a reader of results must know about the targets.
        spec: What was asked for, where the task was made from a spec: so that the run can be repeated.
    """

    dataset: Dataset
    protocol: str
    few_shot: FewShot
    train: TrainSplit
    val: ValSplit | None
    parts: tuple[TestPart, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    spec: TaskSpec | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes trained on."""
        return self.train.class_names

    @property
    def seed(self) -> int:
        return self.few_shot.seed


# --- from a spec to a task --------------------------------------------------------------------------------------------


def load_task(spec: TaskSpec, progress: ProgressCallback | None = None) -> Task:
    """The task that a spec describes; images left out as unreadable are counted in the dataset's notes.

    Raises:
        ConfigError: Parts of the spec can't go together; all of them in one message.
        AdaptKitError: Something it names isn't there or can't be used.
    """
    from adaptkit.data.templates import read_templates

    problems = spec.problems()
    templates = read_templates(spec.templates)
    targets, wrong = _load_targets(spec, templates, progress)
    if wrong and not problems and len(wrong) == 1:
        raise wrong[0]
    problems += map(str, wrong)
    if problems:
        count = [f"{len(problems)} things can't be used:"] * (len(problems) > 1)
        raise ConfigError("\n".join([*count, *problems]))
    data = _load_source(spec, templates, progress)
    task = make_task(
        data,
        spec.protocol,
        spec.shots,
        spec.seed,
        spec.sampler,
        allow_fewer=spec.allow_fewer,
        targets=targets,
        masking=spec.masking,
        halves=_read_halves(spec, data),
        class_split=spec.class_split,
        joint=spec.joint,
    )
    return replace(task, spec=spec)


def _load_source(spec: TaskSpec, templates: Sequence[str], progress: ProgressCallback | None) -> Dataset:
    from adaptkit.data.checks import drop_unreadable
    from adaptkit.data.descriptions import with_descriptions
    from adaptkit.data.sources import load_dataset

    data = load_dataset(
        spec.dataset,
        data_root=spec.data_root,
        templates=templates or None,
        shots=spec.shots,
        display_names=spec.display_names,
        own_split=spec.own_split,
    )
    if spec.descriptions is not None:
        data = with_descriptions(data, spec.descriptions, allow_missing=spec.allow_undescribed)
    if not spec.skip_unreadable:
        return data
    train, dropped = drop_unreadable(data.train, progress=progress)
    val, more = (None, []) if data.val is None else drop_unreadable(data.val, progress=progress)
    dropped += more
    notes = [f"{len(dropped)} unreadable images left out, the first: {dropped[0][0]}"] if dropped else []
    return replace(data, train=train, val=val, notes=(*data.notes, *notes))


def _load_targets(
    spec: TaskSpec, templates: Sequence[str], progress: ProgressCallback | None
) -> tuple[list[Dataset], list[AdaptKitError]]:
    """The targets that can be loaded, and what is wrong with the others."""
    from adaptkit.data.sources import load_dataset

    found: list[Dataset] = []
    errors: list[AdaptKitError] = []
    for done, name in enumerate(spec.all_targets):
        if progress is not None:
            progress("loading targets", done, len(spec.all_targets))
        try:
            target = load_dataset(name, data_root=spec.data_root, templates=templates or None, own_split=spec.own_split)
            found.append(_described(target, spec.descriptions))
        except AdaptKitError as error:
            errors.append(error)
    return found, errors


def _described(target: Dataset, descriptions: str | None) -> Dataset:
    """A target with the sentences that a file has for its classes in the place of its own."""
    from adaptkit.data.descriptions import match_descriptions, read_descriptions

    if descriptions is None:
        return target
    found = read_descriptions(descriptions)
    given = match_descriptions(
        found, target.class_names, target.stored_names or None, f"The descriptions in {descriptions}"
    )
    return replace(target, descriptions={**target.descriptions, **given.descriptions})


def _read_halves(spec: TaskSpec, data: Dataset) -> Halves | None:
    """The halves that files describe, None without files.

    Raises:
        DataError: A name is unknown or there twice, or the lists overlap or leave classes out; all in one message.
    """
    from adaptkit.data.class_names import read_names

    paths = {"order": spec.class_order, "base": spec.base_classes, "novel": spec.novel_classes}
    files = {kind: read_names(path) for kind, path in paths.items() if path is not None}
    if not files:
        return None
    labels = {name: label for names in (data.stored_names, data.class_names) for label, name in enumerate(names)}
    problems = [
        f"The {kind} list: {UnknownNameError.for_name('class', name, labels)}"
        for kind, listed in files.items()
        for name in listed
        if name not in labels
    ]
    found = {kind: tuple(labels[name] for name in listed if name in labels) for kind, listed in files.items()}
    problems += _list_problems(found, data, complete="base" not in files or "novel" in files)
    if problems:
        raise DataError("\n".join([*problems[:_MOST_PROBLEMS], *["…"] * (len(problems) > _MOST_PROBLEMS)]))
    return Halves(order=found.get("order", ()), base=found.get("base", ()))


def _list_problems(found: Mapping[str, Sequence[int]], data: Dataset, *, complete: bool) -> list[str]:
    """What is wrong with lists of labels that must not overlap and, where they are `complete`, name every class."""
    from adaptkit.data.lists import first_few, many

    every = [label for labels in found.values() for label in labels]
    missing = [name for label, name in enumerate(data.class_names) if label not in set(every)]
    twice = [data.class_names[label] for label in _repeated(every)]
    problems = []
    if twice:
        problems.append(f"{many(len(twice), 'class')} listed more than once: {first_few(twice)}.")
    if complete and missing:
        problems.append(f"{many(len(missing), 'class')} of {data.name} in no list: {first_few(missing)}.")
    return problems


def _repeated(items: Sequence[T]) -> list[T]:
    """What is there more than once, in order of first appearance."""
    return [item for item, count in Counter(items).items() if count > 1]


# --- from data to a task ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halves:
    """Base and novel classes of one's own; one of the two is given.

    Args:
        order: Every label once: the first half is base.
        base: The base labels; all others are novel.
    """

    order: tuple[int, ...] = ()
    base: tuple[int, ...] = ()


def make_task(
    dataset: Dataset,
    protocol: str = "few-shot",
    shots: int = 16,
    seed: int = 1,
    sampler: str = "coop",
    *,
    allow_fewer: bool = False,
    targets: Sequence[Dataset] = (),
    masking: Masking = "logits",
    halves: Halves | None = None,
    class_split: int | None = None,
    joint: bool = False,
) -> Task:
    """Draw the shots and lay out what is tested.

    Args:
        dataset: Must have test images.
        protocol: One of `PROTOCOLS`.
        shots: Images per class.
        seed: Seeds the draw; 0 is a seed like any other.
        sampler: Whose draws (see `adaptkit.data.few_shot`).
        allow_fewer: Accept classes with fewer images than shots.
        targets: Datasets to test on as well, for cross-dataset and domain-generalisation.
        masking: As in `TaskSpec`.
        halves: Base and novel classes of one's own.
        class_split: As in `TaskSpec`.
        joint: As in `TaskSpec`.

    Raises:
        UnknownNameError: No such protocol or sampler.
        DataError: No test images, too few images for the shots, or targets that don't fit.
    """
    from adaptkit.data.few_shot import sample_few_shot
    from adaptkit.data.splits import TestSplit, require_split

    if protocol not in PROTOCOLS:
        raise UnknownNameError.for_name("protocol", protocol, PROTOCOLS)
    for each in (dataset, *targets):
        if not len(require_split(each.test, TestSplit, "Testing")):
            raise DataError(f"{each.name} has no test images: add a test split, or more images per class.")
    if protocol in TRANSFER_PROTOCOLS:
        _check_targets(dataset, targets)
    drawn = sample_few_shot(dataset.train, dataset.val, shots, seed, sampler, allow_fewer=allow_fewer)
    train = dataset.train.subset(drawn.train_indices)
    val = dataset.val.subset(drawn.val_indices) if dataset.val is not None and len(drawn.val_indices) else None
    task = Task(dataset, protocol, drawn, train, val, ())
    if protocol == "base-to-novel":
        return _halved(task, halves, class_split, joint)
    whole = _whole(dataset, "all" if protocol == "few-shot" else SOURCE)
    if protocol == "few-shot":
        return replace(task, parts=(whole,))
    shifted = protocol == "domain-generalisation"
    settings: dict[str, Any] = {"targets": {target.name: target.digest for target in targets}}
    if masking != "logits":
        settings["masking"] = masking
    return replace(
        task,
        parts=(whole, *(_shifted(dataset, each, masking) if shifted else _foreign(each) for each in targets)),
        settings=settings,
        notes=tuple(f"{each.name}: {note}" for each in targets for note in each.notes if note not in dataset.notes),
    )


def _whole(dataset: Dataset, name: str) -> TestPart:
    import numpy as np

    return TestPart(name, dataset.test, np.arange(len(dataset.test)))


def _halved(task: Task, halves: Halves | None, class_split: int | None, joint: bool) -> Task:
    """A base-to-novel task of one that holds all classes."""
    from adaptkit.data.base_to_novel import ClassSubset, random_order, split_base_novel, split_by_lists

    data, labels, count = task.dataset, task.train.labels, len(task.dataset.class_names)
    if halves is not None and halves.base:
        base, novel = split_by_lists(labels, halves.base)
    elif halves is not None:
        base, novel = split_base_novel(labels, count, halves.order)
    else:
        order = None if class_split is None else random_order(count, class_split)
        base, novel = split_base_novel(labels, count, order)
    settings: dict[str, Any] = {}
    if class_split is not None:
        settings["class_split"] = class_split
    if halves is not None:
        settings["class_halves"] = {half.name: list(half.names(data.class_names)) for half in (base, novel)}
    parts = [TestPart(half.name, half.restrict(data.test), half.indices(data.test.labels)) for half in (base, novel)]
    if joint:
        settings["joint"] = True
        every = ClassSubset("all", tuple(sorted((*base.classes, *novel.classes))))
        parts = [_among(data, half, every) for half in (base, novel, every)]
    empty = [part.name for part in parts if not len(part.split)]
    if empty:
        raise DataError(f"{data.name} has no test images of its {empty[0]} classes.")
    val = None if task.val is None else base.restrict(task.val)
    return replace(task, train=base.restrict(task.train), val=val, parts=tuple(parts), settings=settings)


def _among(data: Dataset, half: ClassSubset, every: ClassSubset) -> TestPart:
    """The test images of one half, labelled among all classes."""
    import numpy as np

    positions = half.indices(data.test.labels)
    within = np.flatnonzero(np.isin(every.indices(data.test.labels), positions))
    return TestPart(half.name, every.restrict(data.test).subset(within), positions)


# --- targets ----------------------------------------------------------------------------------------------------------


def _check_targets(source: Dataset, targets: Sequence[Dataset]) -> None:
    """Refuse no targets, two of one name, and the source itself.

    Raises:
        DataError: There is one of these.
    """
    names = [target.name for target in targets]
    if not targets:
        raise DataError(f"There is no target to test {source.name} on: name some.")
    twice = _repeated([SOURCE, *names])
    if twice:
        raise DataError(
            f"Two tested datasets would be called {twice[0]!r}: give them different names (of folders or files;"
            f" {SOURCE!r} is kept for the source)."
        )
    same = [target.name for target in targets if target.digest == source.digest]
    if source.name in names or same:
        raise DataError(f"{(same or [source.name])[0]} is the source itself, and can't be a target too: leave it out.")


def _foreign(target: Dataset) -> TestPart:
    """A target with classes of its own."""
    other = OtherDataset(target.templates, target.descriptions)
    return replace(_whole(target, target.name), other=other)


def _shifted(source: Dataset, target: Dataset, masking: Masking) -> TestPart:
    """A shifted version of the source: its classes are found by stored names, and keep the source's names and order.

    Raises:
        DataError: It has classes that the source hasn't.
    """
    import numpy as np

    from adaptkit.data.lists import first_few, many

    places = {name: label for label, name in enumerate(source.stored_names or source.class_names)}
    stored = target.stored_names or target.class_names
    unknown = [name for name in stored if name not in places]
    if unknown:
        raise DataError(
            f"{target.name} has {many(len(unknown), 'class')} that {source.name} hasn't ({first_few(unknown)}): it"
            " isn't a shifted version of it. Test it with --protocol cross-dataset."
        )
    columns = sorted(places[name] for name in stored)
    new = {column: label for label, column in enumerate(columns)}
    labels = np.array([new[places[name]] for name in stored], dtype=np.int64)[target.test.labels]
    names = tuple(source.class_names[column] for column in columns)
    part = _whole(target, target.name)
    split = replace(part.split, class_names=names, labels=labels)
    other = OtherDataset(source.templates, source.descriptions)
    if masking == "names":
        return replace(part, split=split, other=other)
    return replace(part, split=split, other=other, candidates=source.class_names, columns=tuple(columns))
