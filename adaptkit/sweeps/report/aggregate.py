"""From single runs to what a report shows: sections, groups of runs on the same images, and cells of equal runs.

A *cell* is runs that differ in their seed alone. A *group* is the cells that were tested on the same images of one
dataset with the same number of shots, so that they may be compared. A *section* is the groups of one protocol and one
backbone.

Source: protocols sheet, sections 2 (both averages of H) and 3 (a target average leaves the source out).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from adaptkit.errors import DataError
from adaptkit.evaluation.metrics import BaseToNovel, average_base_to_novel, harmonic_mean
from adaptkit.evaluation.results import SCHEMA_VERSION, SOURCE, RunKey, RunResult
from adaptkit.evaluation.statistics import Summary, summarise
from adaptkit.methods import methods
from adaptkit.storage import digest_json
from adaptkit.sweeps.results import BadRun, RunRecord

ZERO_SHOT = "zero-shot"
ACCURACY, H, MEAN_OF_H, TARGET_AVERAGE = "accuracy", "H of means", "mean of H", "target average"


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seed alone.

    Args:
        label: The method, with what sets it apart from its other variants in the report.
        runs: By rising seed.
    """

    label: str
    runs: tuple[RunRecord, ...]

    @property
    def first(self) -> RunResult:
        """The run of the lowest seed, for what all share."""
        return self.runs[0].result

    @property
    def key(self) -> RunKey:
        return self.first.key

    @property
    def method(self) -> str:
        return self.key.method

    @cached_property
    def anchor(self) -> str:
        """A name for links to this cell: the same whenever the same runs are reported."""
        return "runs-" + digest_json(_without_seed(self.key))[:12]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(record.result.key.seed for record in self.runs)

    @cached_property
    def summaries(self) -> dict[str, Summary]:
        """Mean and spread over the seeds, by measure; fractions."""
        every = [measures(record.result) for record in self.runs]
        shared = [name for name in every[0] if all(name in values for values in every)]
        return {name: summarise([values[name] for values in every]) for name in shared}

    @cached_property
    def averages(self) -> BaseToNovel | None:
        """Both averages of H over the seeds; None outside base-to-novel."""
        if {"base", "novel"} <= self.summaries.keys():
            base, novel = (self.summaries[name].values for name in ("base", "novel"))
            return average_base_to_novel(list(zip(base, novel, strict=True)))
        return None

    def value(self, measure: str) -> float | None:
        """A measure's mean over the seeds; for "H of means" the H of the means."""
        if measure == H:
            return None if self.averages is None else self.averages.h_of_means
        return self.summaries[measure].mean if measure in self.summaries else None

    @property
    def fallback_parts(self) -> tuple[str, ...]:
        """Parts on which the method answered zero-shot."""
        return tuple(part.name for part in self.first.parts if part.fallback)

    @property
    def seconds(self) -> float:
        """Mean seconds of a run: features, fitting and testing."""
        return summarise([sum(record.result.seconds.values()) for record in self.runs]).mean

    @property
    def ece(self) -> float | None:
        """Mean calibration error over the runs' first part, where it was kept."""
        stored = [record.result.parts[0].metrics.get("ece") for record in self.runs]
        found = [value for value in stored if isinstance(value, (int, float))]
        return summarise(found).mean if len(found) == len(stored) else None


@dataclass(frozen=True)
class Group:
    """Cells that were tested on the same images.

    Args:
        dataset: Its name; with the split's digest where one name stands for several splits.
        shots: Images per class.
        cells: Best first, by the ranking measure; zero-shot wherever it ranks.
        ranked_by: The ranking measure.
    """

    dataset: str
    shots: int
    cells: tuple[Cell, ...]
    ranked_by: str

    @property
    def first(self) -> RunResult:
        """Any run, for what all share of the data."""
        return self.cells[0].first

    @property
    def embedded(self) -> bool:
        return is_embedded(self.first)

    @property
    def zero_shot(self) -> Cell | None:
        """The plain zero-shot cell, None where it wasn't run."""
        return next((cell for cell in self.cells if cell.method == ZERO_SHOT), None)

    @property
    def best(self) -> Cell:
        """The best cell that isn't zero-shot, if there is one."""
        return next((cell for cell in self.cells if cell.method != ZERO_SHOT), self.cells[0])

    @property
    def measures(self) -> tuple[str, ...]:
        """What was measured, in table order."""
        return _ordered(name for cell in self.cells for name in cell_measures(cell))

    def cell(self, label: str) -> Cell | None:
        return next((cell for cell in self.cells if cell.label == label), None)


@dataclass(frozen=True)
class Section:
    """The groups of one protocol and one backbone.

    Args:
        protocol: Its name.
        variants: What makes it another protocol than the plain one, such as "joint".
        backbone: Name.
        groups: By dataset, then by shots.
    """

    protocol: str
    variants: tuple[str, ...]
    backbone: str
    groups: tuple[Group, ...]

    @property
    def title(self) -> str:
        return f"{', '.join((self.protocol, *self.variants))} · {self.backbone}"

    @property
    def anchor(self) -> str:
        return "section-" + digest_json([self.protocol, self.variants, self.groups[0].first.key.backbone_digest])[:8]

    @property
    def ranked_by(self) -> str:
        return self.groups[0].ranked_by

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The methods, zero-shot first, then in the order of their names."""
        found = {cell.label: cell.method for group in self.groups for cell in group.cells}
        return tuple(sorted(found, key=lambda label: (found[label] != ZERO_SHOT, label)))

    @property
    def shot_counts(self) -> tuple[int, ...]:
        return tuple(sorted({group.shots for group in self.groups}))

    @property
    def measures(self) -> tuple[str, ...]:
        return _ordered(name for group in self.groups for name in group.measures)

    def at(self, shots: int) -> tuple[Group, ...]:
        """The groups with that many shots."""
        return tuple(group for group in self.groups if group.shots == shots)


@dataclass(frozen=True)
class Report:
    """Everything a report is made of.

    Args:
        sections: By protocol, then by backbone.
        damaged: Runs that couldn't be read.
        notes: What was left out or should be known, one sentence each.
    """

    sections: tuple[Section, ...]
    damaged: tuple[BadRun, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(cell for section in self.sections for group in section.groups for cell in group.cells)

    @property
    def runs(self) -> int:
        return sum(len(cell.runs) for cell in self.cells)


# --- one run ----------------------------------------------------------------------------------------------------------


def source_of(result: RunResult) -> Mapping[str, Any]:
    """Where the run's data came from; {} where the result doesn't say."""
    source = result.dataset.get("source")
    return source if isinstance(source, Mapping) else {}


def notes_of(result: RunResult) -> list[str]:
    """What a reader must know of the run's data."""
    notes = result.dataset.get("notes")
    return [str(note) for note in notes] if isinstance(notes, list) else []


def is_embedded(result: RunResult) -> bool:
    """Whether the run's data ships with adaptkit."""
    return source_of(result).get("kind") == "embedded"


def setting_of(result: RunResult, name: str) -> Any:
    """A setting by "section.name"."""
    section, _, field_name = name.partition(".")
    values = result.key.settings.get(section)
    return values.get(field_name) if isinstance(values, Mapping) else None


def measures(result: RunResult) -> dict[str, float]:
    """What a run measured, as fractions: a number per part, and what follows from them."""
    found = {ACCURACY if part.name == "all" and len(result.parts) == 1 else part.name: part.accuracy
             for part in result.parts}  # fmt: skip
    if "base" in found and "novel" in found:
        found[MEAN_OF_H] = harmonic_mean(found["base"], found["novel"])
    if result.target_average is not None:
        found[TARGET_AVERAGE] = result.target_average
    return found


def cell_measures(cell: Cell) -> tuple[str, ...]:
    """The measures of a cell, those that only several runs have among them."""
    return _ordered((*cell.summaries, *([H] if cell.averages is not None else [])))


def ranking_measure(result: RunResult) -> str:
    """What methods are ranked by under a run's protocol."""
    found = measures(result)
    for name, ranked in ((MEAN_OF_H, H), (TARGET_AVERAGE, TARGET_AVERAGE)):
        if name in found:
            return ranked
    return next(iter(found))


_ORDER = {name: place for place, name in enumerate((ACCURACY, SOURCE, "base", "novel", H, MEAN_OF_H, "all"))}


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once: known ones in table order, targets after them as they came, their average last."""
    once = list(dict.fromkeys(names))
    last = len(_ORDER) + len(once)
    places = {name: _ORDER.get(name, len(_ORDER) + place) for place, name in enumerate(once)} | {TARGET_AVERAGE: last}
    return tuple(sorted(once, key=places.__getitem__))


def shots_text(shots: int) -> str:
    """ "1 shot", "16 shots"."""
    return f"{shots} shot{'' if shots == 1 else 's'}"


def _without_seed(key: RunKey) -> dict[str, Any]:
    return {name: value for name, value in asdict(key).items() if name != "seed"}


# --- many runs --------------------------------------------------------------------------------------------------------


def gather(records: Sequence[RunRecord], damaged: Sequence[BadRun] = ()) -> Report:
    """Sort runs into sections, groups and cells.

    Args:
        records: From `adaptkit.sweeps.results.read_runs`.
        damaged: The runs that couldn't be read, for the report's reader.

    Raises:
        DataError: No run is left, or the runs were written by different versions of adaptkit.
    """
    check_versions(records)
    kept, notes = _each_once(records)
    if not kept:
        raise DataError(_nothing_left(damaged, notes))
    by_section: dict[tuple[Any, ...], list[RunRecord]] = defaultdict(list)
    for record in kept:
        by_section[_section_key(record.result)].append(record)
    sections = tuple(_section(key, found) for key, found in sorted(by_section.items()))
    return Report(sections, tuple(damaged), (*notes, *_without_clip(kept)))


def _without_clip(records: Sequence[RunRecord]) -> list[str]:
    """A caution where a multimodal language model has no CLIP's zero-shot and adapter beside it on the same task.

    A backbone is taken for one where a run of a method that asks one is among the records.

    Source: mllm sheet `base-to-novel.md`, fairness rule 3.
    """
    keys = [record.result.key for record in records]
    asking = {name for name in {key.method for key in keys} if name in methods and methods.get(name).needs_mllm}
    models = {key.backbone for key in keys if key.method in asking}
    asked, beside = dict[tuple[str, ...], RunKey](), defaultdict[tuple[str, ...], set[bool]](set)
    for key in keys:
        task = (key.protocol, key.dataset, _tested_on(key), str(key.shots))
        if key.backbone in models:
            asked.setdefault(task, key)
        else:
            beside[task].add(key.method == ZERO_SHOT)
    missing = [key for task, key in asked.items() if len(beside[task]) < 2]
    if not missing:
        return []
    where = "; ".join(sorted({f"{key.dataset}, {key.protocol}, {shots_text(key.shots)}" for key in missing}))
    return [
        f"No CLIP stands beside the multimodal language models on {where}: without its zero-shot and adapter rows these"
        " figures don't say what a language model is worth. 'adaptkit compare' and 'adaptkit sweep' add them."
    ]


def _nothing_left(damaged: Sequence[BadRun], notes: Sequence[str]) -> str:
    if damaged:
        return (
            f"There is nothing to report: all {len(damaged)} runs found are damaged, the first because"
            f" {damaged[0].reason}"
        )
    if notes:
        return f"There is nothing to report: {notes[0]}"
    return (
        "There is nothing to report: no finished run (a folder with a result.json) was found. Give folders that"
        " 'adaptkit run', 'compare' or 'sweep' wrote."
    )


def check_versions(records: Sequence[RunRecord]) -> None:
    """Refuse runs of mixed or unknown layouts.

    Raises:
        DataError: They can't be read as one.
    """
    versions: dict[int, int] = defaultdict(int)
    for record in records:
        versions[record.result.schema_version] += 1
    if not set(versions) - {SCHEMA_VERSION}:
        return
    listed = ", ".join(f"{count} of version {version}" for version, count in sorted(versions.items()))
    other = next(r.folder for r in records if r.result.schema_version != SCHEMA_VERSION)
    raise DataError(
        f"The runs have other layouts than this adaptkit reads (version {SCHEMA_VERSION}): {listed}, such as {other}."
        " Report on runs of one version, or run the others again."
    )


def _each_once(records: Sequence[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    """The runs to report, each key once, and what the reader should know of those left out."""
    kept: dict[str, RunRecord] = {}
    twice, differing, interrupted = 0, 0, 0
    for record in records:
        if record.result.fit.get("interrupted"):
            interrupted += 1
            continue
        earlier = kept.setdefault(record.result.key_digest, record)
        if earlier is not record:
            twice += 1
            differing += earlier.result.parts != record.result.parts
    notes = []
    if interrupted:
        notes.append(f"{interrupted} interrupted runs aren't counted: run them again.")
    if twice:
        notes.append(
            f"{twice} runs were found a second time and count once"
            + (f"; {differing} of them gave other numbers than the first." if differing else ", with the same numbers.")
        )
    return list(kept.values()), notes


def _section_key(result: RunResult) -> tuple[Any, ...]:
    key = result.key
    return key.protocol, _variants(key), key.backbone, key.backbone_digest


def _variants(key: RunKey) -> tuple[str, ...]:
    """How the task differs from the published protocol, in words; other class lists are another protocol."""
    # settings per target are a method's, not the task's: such runs stand beside the others
    of_task = {name: value for name, value in key.settings.items() if name != "target_settings"}
    marks = replace(key, settings=of_task).marks
    return (*marks, *([f"lists {_short(of_task['class_halves'])}"] if "class_halves" in of_task else []))


def _short(value: Any) -> str:
    """A setting in a few letters: as it is, or its digest where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 24 else digest_json(value)[:6]


def _section(key: tuple[Any, ...], records: Sequence[RunRecord]) -> Section:
    protocol, variants, backbone, _ = key
    cells = _cells(records)
    by_group: dict[tuple[str, str, int], list[Cell]] = defaultdict(list)
    for cell in cells:
        by_group[cell.key.dataset, _tested_on(cell.key), cell.key.shots].append(cell)
    splits: dict[tuple[str, int], set[str]] = defaultdict(set)
    for dataset, split, shots in by_group:
        splits[dataset, shots].add(split)
    groups = []
    for (dataset, split, shots), found in sorted(by_group.items()):
        name = dataset if len(splits[dataset, shots]) == 1 else f"{dataset} (split {split[:6]})"
        ranked_by = ranking_measure(found[0].first)
        ranked = sorted(found, key=lambda cell: (-(cell.value(ranked_by) or 0.0), cell.label))
        groups.append(Group(name, shots, tuple(ranked), ranked_by))
    return Section(protocol, variants, backbone, tuple(groups))


def _tested_on(key: RunKey) -> str:
    """Digest of everything about a key that says which images are tested."""
    targets = key.settings.get("targets")
    return digest_json([key.split_digest, targets]) if targets else key.split_digest


def _cells(records: Sequence[RunRecord]) -> list[Cell]:
    by_cell: dict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        by_cell[_cell_digest(record.result.key)].append(record)
    runs = [tuple(sorted(found, key=lambda record: record.result.key.seed)) for found in by_cell.values()]
    labels = _labels([found[0].result for found in runs])
    return [Cell(label, found) for label, found in zip(labels, runs, strict=True)]


def _cell_digest(key: RunKey) -> str:
    return json.dumps(_without_seed(key), sort_keys=True)


def _labels(results: Sequence[RunResult]) -> list[str]:
    """A label for each cell: the method alone where it has one variant, else with what sets its variants apart."""
    facts = [_variant(result) for result in results]
    seen: dict[str, set[str]] = defaultdict(set)
    by_fact: dict[tuple[str, str], set[str]] = defaultdict(set)
    for result, given in zip(results, facts, strict=True):
        seen[result.key.method].add(json.dumps(given, sort_keys=True))
        for name, value in given.items():
            by_fact[result.key.method, name].add(value)
    labels = []
    for result, given in zip(results, facts, strict=True):
        method = result.key.method
        # a recipe is chosen by protocol and backbone, so that within a section only a choice of the user's differs
        telling = [text for name, text in given.items() if text and len(by_fact[method, name]) > 1]
        labels.append(f"{method} ({', '.join(telling)})" if telling and len(seen[method]) > 1 else method)
    return _told_apart(results, labels)


def _variant(result: RunResult) -> dict[str, str]:
    """What a user chose about a run beyond method, data and shots: texts, "" for the usual choice."""
    own = overridden(result)
    return {
        "recipe": result.recipe.removeprefix(f"{result.key.method}/") or "no recipe",
        "settings": ", ".join(f"{name.split('.', 1)[-1]}={_short(value)}" for name, value in own.items()),
        "sampler": "" if result.key.sampler == "coop" else f"sampler {result.key.sampler}",
        "precision": "" if _precision(result) == "fp32" else _precision(result),
    }


def _precision(result: RunResult) -> str:
    return str(result.key.settings.get("precision", "fp32"))


def overridden(result: RunResult) -> dict[str, Any]:
    """Settings that came from neither the method's defaults nor the recipe, by "section.name"."""
    found = {}
    for name, origin in sorted(result.origins.items()):
        if origin != "default" and not str(origin).startswith("recipe "):
            found[name] = setting_of(result, name)
    return found


def _told_apart(results: Sequence[RunResult], labels: Sequence[str]) -> list[str]:
    """The labels, with a piece of the key's digest where two cells of one group would still be called the same."""
    taken: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for place, (result, label) in enumerate(zip(results, labels, strict=True)):
        taken[result.key.dataset, _tested_on(result.key), str(result.key.shots), label].append(place)
    told = list(labels)
    for places in taken.values():
        for place in places if len(places) > 1 else ():
            told[place] += f" #{digest_json(_without_seed(results[place].key))[:4]}"
    return told


# --- averages over datasets -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Average:
    """A method's average over the datasets of a section, at one number of shots.

    Args:
        label: The method.
        shots: Images per class.
        cells: One per dataset that it was run on, in the order of the groups.
        datasets: How many there are; the average is of all of them or isn't given.
    """

    label: str
    shots: int
    cells: tuple[Cell, ...]
    datasets: int

    @property
    def complete(self) -> bool:
        return len(self.cells) == self.datasets

    @cached_property
    def averages(self) -> BaseToNovel | None:
        """The average row of base-to-novel tables: of the datasets' seed means."""
        pairs = [(cell.averages.base, cell.averages.novel) for cell in self.cells if cell.averages is not None]
        return average_base_to_novel(pairs) if self.complete and len(pairs) == self.datasets else None

    def value(self, measure: str) -> float | None:
        """Mean over the datasets of the means over seeds; None where a dataset is missing."""
        if measure in (H, MEAN_OF_H) and self.averages is not None:
            return self.averages.h_of_means if measure == H else self.averages.mean_of_h
        found = [cell.value(measure) for cell in self.cells]
        known = [value for value in found if value is not None]
        return sum(known) / len(known) if known and self.complete and len(known) == self.datasets else None

    def half_width(self, measure: str) -> float | None:
        """Half the t-interval over the seeds' own averages; None where seeds differ between datasets or there is one.

        It has none for the averages of H, which aren't means over seeds.
        """
        if not self.complete or measure in (H, MEAN_OF_H) or len({cell.seeds for cell in self.cells}) != 1:
            return None
        if any(measure not in cell.summaries for cell in self.cells):
            return None
        by_seed = zip(*(cell.summaries[measure].values for cell in self.cells), strict=True)
        return summarise([sum(values) / len(values) for values in by_seed]).half_width

    @property
    def seeds(self) -> int:
        """Fewest seeds of a dataset."""
        return min((len(cell.runs) for cell in self.cells), default=0)


def averages_of(section: Section, shots: int) -> tuple[Average, ...]:
    """The methods' averages over all datasets of a section, best first; incomplete ones last."""
    groups = section.at(shots)
    rows = []
    for label in section.labels:
        cells = tuple(cell for group in groups if (cell := group.cell(label)) is not None)
        if cells:
            rows.append(Average(label, shots, cells, len(groups)))
    return tuple(sorted(rows, key=lambda row: (not row.complete, -(row.value(section.ranked_by) or 0.0), row.label)))
