"""Suites: which methods, on which datasets, with how many shots, seeds, protocols and backbones, as a YAML file.

    methods: [zero-shot, {name: coop, recipe: csc, set: [training.epochs=50]}]
    datasets: [digits, {dataset: eurosat, templates: ["a satellite photo of {}."]}]
    shots: [1, 2, 4, 8, 16]
    seeds: [1, 2, 3]
    protocols: [few-shot]
    backbones: [mini]
    task: {data_root: /data}          what holds for every dataset; the fields of `TaskSpec`
    clip_backbone: mini               of the rows beside a multimodal language model; none leaves them out
    set: [training.epochs=5]          settings for all methods that read them, as after --set
    include: [{methods: [zero-shot], shots: [1]}]      more grids; axes left out are those above
    exclude: [{methods: [coop], datasets: [digits]}]   what all words of an entry fit is left out

`all`, `feature-level` (frozen features are all they need) and `tower-level` (they run a tower while they are
fitted) stand for methods, `embedded` for datasets. A combination that can't work (a
method that needs descriptions, on a dataset without) is left out with a note where it was reached by such a word, and
refused where it was named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from adaptkit.config import from_mapping, load_yaml
from adaptkit.errors import ConfigError, MissingPathError, UnknownNameError
from adaptkit.evaluation.recipes import PROTOCOLS, SUITES_FOLDER, recipes_folder
from adaptkit.evaluation.tasks import TaskSpec
from adaptkit.methods import methods
from adaptkit.sweeps.backbones import DEFAULT

METHOD_WORDS = ("all", "feature-level", "tower-level")
DATASET_WORD = "embedded"
AXES = ("methods", "datasets", "shots", "seeds", "protocols", "backbones")
_OF_THE_GRID = ("protocol", "shots", "seed")


@dataclass(frozen=True)
class MethodEntry:
    """A method of a suite.

    Args:
        name: Registered name, or one of `METHOD_WORDS`.
        recipe: As after --recipe: a recipe's name, a variant, a YAML file, or "none"; None chooses as `run` does.
        set: Settings, as after --set.
    """

    name: str
    recipe: str | None = None
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """Axes whose every combination is run; those that are None are the suite's own."""

    methods: tuple[MethodEntry, ...] | None = None
    datasets: tuple[TaskSpec, ...] | None = None
    shots: tuple[int, ...] | None = None
    seeds: tuple[int, ...] | None = None
    protocols: tuple[str, ...] | None = None
    backbones: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Exclusion:
    """What is left out: every run that fits each of the axes given."""

    methods: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    shots: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    protocols: tuple[str, ...] = ()
    backbones: tuple[str, ...] = ()

    def given(self) -> dict[str, tuple[Any, ...]]:
        """The axes that it speaks of."""
        return {axis: getattr(self, axis) for axis in AXES if getattr(self, axis)}


@dataclass(frozen=True)
class Suite:
    """A suite's file; see the top of this module.

    Args:
        name: Of its file.
        methods: The methods.
        datasets: The datasets, each with what is said about its task.
        summary: What it is for, one sentence.
        source: Where the choice comes from.
        shots: Images per class.
        seeds: Seeds of shots and training.
        protocols: Some of `PROTOCOLS`.
        backbones: Names as for `load_backbone`, or "default": a feature file's own, else `mini`.
        clip_backbone: Beside every multimodal language model, `CLIP_ROWS` are run on this backbone on the same task;
            "none" leaves them out.
        precision: Of the frozen encoder.
        set: Settings for all methods that read them.
        include: More grids.
        exclude: What is left out.
    """

    name: str
    methods: tuple[MethodEntry, ...]
    datasets: tuple[TaskSpec, ...]
    summary: str = ""
    source: str = ""
    shots: tuple[int, ...] = (16,)
    seeds: tuple[int, ...] = (1, 2, 3)
    protocols: tuple[str, ...] = ("few-shot",)
    backbones: tuple[str, ...] = (DEFAULT,)
    clip_backbone: str = "mini"
    precision: Literal["fp32", "bf16"] = "fp32"
    set: tuple[str, ...] = ()
    include: tuple[Grid, ...] = ()
    exclude: tuple[Exclusion, ...] = ()

    def grids(self) -> list[Grid]:
        """The suite's own grid and the included ones, with all axes filled in."""
        own = Grid(**{axis: getattr(self, axis) for axis in AXES})
        added = [
            Grid(**{axis: getattr(own if getattr(grid, axis) is None else grid, axis) for axis in AXES})
            for grid in self.include
        ]
        return [own, *added]


@dataclass(frozen=True)
class RunSpec:
    """One run that a suite asks for.

    Args:
        method: Registered name.
        task: What it runs on.
        backbone: Name as for `load_backbone`, or "default".
        recipe: As after --recipe.
        overrides: Settings of its own, as after --set.
        shared: Settings of the suite, for methods that read them.
        precision: Of the frozen encoder.
        named: False where the method was reached by a word such as "all".
    """

    method: str
    task: TaskSpec
    backbone: str
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    precision: Literal["fp32", "bf16"] = "fp32"
    named: bool = True

    @property
    def group(self) -> tuple[str, TaskSpec]:
        """Runs with equal groups share a backbone and a dataset."""
        return self.backbone, replace(self.task, protocol="", shots=0, seed=0)


# --- files ------------------------------------------------------------------------------------------------------------


def list_suites() -> tuple[str, ...]:
    """Names of the suites that come with adaptkit.

    Example:
        >>> "embedded" in list_suites()
        True
    """
    return tuple(sorted(path.stem for path in (recipes_folder() / SUITES_FOLDER).glob("*.yaml")))


def load_suite(name_or_path: str | Path, *, data_root: str | None = None) -> Suite:
    """Read a suite by name or by the path of its YAML file.

    Args:
        name_or_path: A shipped suite's name, or a file (".yaml" or ".yml").
        data_root: For all its datasets, in place of what it says.

    Raises:
        UnknownNameError: No suite of that name.
        MissingPathError: No such file.
        ConfigError: The file isn't a suite; everything wrong with its form is listed.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise MissingPathError(f"There is no suite file {path}: check the path, or give a shipped suite's name.")
    else:
        if text not in list_suites():
            raise UnknownNameError.for_name("suite", text, list_suites(), "The path of a .yaml file is accepted too.")
        path = recipes_folder() / SUITES_FOLDER / f"{text}.yaml"
    content = load_yaml(path)
    if "name" in content:
        raise ConfigError(f"Suite {text}: its name is that of its file; remove the key 'name'.")
    return read_suite({**content, "name": path.stem}, data_root=data_root)


def read_suite(content: Mapping[str, Any], *, data_root: str | None = None) -> Suite:
    """A suite from plain values.

    Raises:
        ConfigError: Everything wrong with its form, in one message.
    """
    said = dict(content)
    task = said.pop("task", {}) or {}
    where = f"suite {said.get('name', '')}"
    if not isinstance(task, Mapping):
        raise ConfigError(f"In {where}: task is {task!r}; names and values are accepted, as in {{data_root: /data}}.")
    if data_root is not None:
        task = {**task, "data_root": data_root}
    said = _spelled_out(said, task, data_root)
    if isinstance(said.get("include"), list):
        said["include"] = [_spelled_out(grid, task, data_root) for grid in said["include"]]
    problems = list(_grid_words(said, task, where))
    suite = None
    try:
        suite = from_mapping(Suite, said, where=where)
    except ConfigError as error:
        problems.insert(0, str(error))
    if suite is not None:
        problems += _form_problems(suite)
    raise_problems(where, problems)
    if suite is None:  # a problem was noted, and raised
        raise ConfigError(f"{where} can't be used.")
    return suite


def raise_problems(where: str, problems: Iterable[str]) -> None:
    """Everything wrong, in one error.

    Raises:
        ConfigError: There are problems.
    """
    found = list(dict.fromkeys(problems))
    if len(found) == 1:
        raise ConfigError(found[0])
    if found:
        raise ConfigError("\n".join([f"{len(found)} things are wrong with {where}:", *(f"- {text}" for text in found)]))


def _spelled_out(grid: Any, task: Mapping[str, Any], data_root: str | None) -> Any:
    """A grid in which bare names became entries, and every dataset has the suite's task settings."""
    if not isinstance(grid, Mapping):
        return grid  # refused by its type
    grid = dict(grid)
    for axis, key in (("methods", "name"), ("datasets", "dataset")):
        entries = grid.get(axis)
        if isinstance(entries, str):
            entries = [entries]
        if isinstance(entries, list):
            grid[axis] = [{key: entry} if isinstance(entry, str) else entry for entry in entries]
    if isinstance(grid.get("datasets"), list):
        given = {} if data_root is None else {"data_root": data_root}
        grid["datasets"] = [
            {**task, **entry, **given} if isinstance(entry, Mapping) else entry
            for entry in _embedded_named(grid["datasets"])
        ]
    return grid


def _embedded_named(entries: list[Any]) -> Iterator[Any]:
    from adaptkit.data.synthetic import EMBEDDED

    for entry in entries:
        if isinstance(entry, Mapping) and entry.get("dataset") == DATASET_WORD:
            yield from ({**entry, "dataset": name} for name in EMBEDDED)
        else:
            yield entry


def _grid_words(content: Mapping[str, Any], task: Mapping[str, Any], where: str) -> Iterator[str]:
    """Settings of single tasks that a suite says as axes."""
    entries = [entry for entry in content.get("datasets") or () if isinstance(entry, Mapping)]
    for key in _OF_THE_GRID:
        if key in task or any(key in entry for entry in entries):
            axis = key if key == "shots" else f"{key}s"
            yield f"In {where}: {key!r} doesn't belong to a dataset: write it as the suite's {axis}: […]."


# --- from axes to runs ------------------------------------------------------------------------------------------------


def _form_problems(suite: Suite) -> Iterator[str]:
    """What is wrong with a suite that can be seen without data and backbones."""
    where = f"Suite {suite.name}"
    for grid in suite.grids():
        for axis in AXES:
            if not getattr(grid, axis):
                yield f"{where}: {axis} is empty; write at least one."
        for entry in grid.methods or ():
            if entry.name not in METHOD_WORDS and entry.name not in methods:
                yield f"{where}: {_unknown('method', entry.name, [*methods, *METHOD_WORDS])}"
        for protocol in grid.protocols or ():
            if protocol not in PROTOCOLS:
                yield f"{where}: {_unknown('protocol', protocol, PROTOCOLS)}"
        for shots in grid.shots or ():
            if shots < 1:
                yield f"{where}: shots holds {shots}; at least 1 image per class is accepted."
        for seed in grid.seeds or ():
            if seed < 0:
                yield f"{where}: seeds holds {seed}; 0 or more is accepted."
    yield from _exclusion_problems(suite)


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    return str(UnknownNameError.for_name(kind, name, known))


def _exclusion_problems(suite: Suite) -> Iterator[str]:
    """Exclusions that exclude nothing are misspelt."""
    specs = list(_all_specs(suite))
    held = {axis: sorted({str(_axis_value(spec, axis)) for spec in specs}) for axis in AXES}
    for exclusion in suite.exclude:
        if not exclusion.given():
            yield f"Suite {suite.name}: an entry of exclude is empty and would leave out everything: remove it."
        for axis, values in exclusion.given().items():
            for value in values:
                if str(value) not in held[axis]:
                    yield f"Suite {suite.name}: exclude: {_unknown(axis.rstrip('s'), str(value), held[axis])}"


def expand(suite: Suite) -> list[RunSpec]:
    """The runs of a suite, each once, grouped by backbone and dataset; data and backbones aren't looked at."""
    kept = [spec for spec in _all_specs(suite) if not any(_excluded(spec, entry) for entry in suite.exclude)]
    groups: dict[tuple[str, TaskSpec], dict[RunSpec, None]] = {}
    for spec in kept:
        # named wins over reached by a word, where a run is both
        found = groups.setdefault(spec.group, {})
        if spec.named:
            found.pop(replace(spec, named=False), None)
        if spec.named or replace(spec, named=True) not in found:
            found[spec] = None
    backbones = list(dict.fromkeys(backbone for backbone, _ in groups))
    ordered = sorted(groups.items(), key=lambda group: backbones.index(group[0][0]))
    return [spec for _, found in ordered for spec in sorted(found, key=_by_task)]


def _by_task(spec: RunSpec) -> tuple[str, int, int]:
    """Runs on one task come together."""
    return spec.task.protocol, spec.task.shots, spec.task.seed


def _all_specs(suite: Suite) -> Iterator[RunSpec]:
    for grid in suite.grids():
        for backbone in grid.backbones or ():
            for task in _tasks(grid):
                for entry in grid.methods or ():
                    yield from _of_entry(suite, entry, task, backbone)


def _tasks(grid: Grid) -> Iterator[TaskSpec]:
    for dataset in grid.datasets or ():
        for protocol in grid.protocols or ():
            for shots in grid.shots or ():
                for seed in grid.seeds or ():
                    yield replace(dataset, protocol=protocol, shots=shots, seed=seed)


def _of_entry(suite: Suite, entry: MethodEntry, task: TaskSpec, backbone: str) -> Iterator[RunSpec]:
    named = entry.name not in METHOD_WORDS
    for name in [entry.name] if named else methods_of(entry.name):
        yield RunSpec(name, task, backbone, entry.recipe, entry.set, suite.set, suite.precision, named)


def methods_of(word: str) -> list[str]:
    """The methods that one of `METHOD_WORDS` stands for."""
    return [name for name in methods if word == "all" or is_feature_level(name) == (word == "feature-level")]


def is_feature_level(method: str) -> bool:
    """Whether frozen features are all that a method needs: prompts, for one, run the text tower."""
    return methods.get(method).reads == "image_features" and not methods.get(method).writes_texts


def _axis_value(spec: RunSpec, axis: str) -> Any:
    task = spec.task
    return {
        "methods": spec.method,
        "datasets": task.dataset,
        "shots": task.shots,
        "seeds": task.seed,
        "protocols": task.protocol,
        "backbones": spec.backbone,
    }[axis]


def _excluded(spec: RunSpec, exclusion: Exclusion) -> bool:
    return all(_axis_value(spec, axis) in values for axis, values in exclusion.given().items())


def narrowed(suite: Suite, axis: Literal["methods", "datasets"], names: Iterable[str]) -> Suite:
    """The suite with only some of its methods or datasets.

    Args:
        suite: The suite.
        axis: Which axis.
        names: What stays; for methods, `METHOD_WORDS` are accepted too.

    Raises:
        UnknownNameError: The suite hasn't such a one.
    """
    held = sorted({str(_axis_value(spec, axis)) for spec in _all_specs(suite)})
    wanted: set[str] = set()
    for name in names:
        if axis == "methods" and name in METHOD_WORDS:
            wanted.update(methods_of(name))
        elif name in held:
            wanted.add(name)
        else:
            raise UnknownNameError.for_name(f"{axis.rstrip('s')} of suite {suite.name}", name, held)
    left_out = tuple(name for name in held if name not in wanted)
    if not left_out:
        return suite
    added = Exclusion(methods=left_out) if axis == "methods" else Exclusion(datasets=left_out)
    return replace(suite, exclude=(*suite.exclude, added))
