"""Published figures beside ours, where they may stand there, and why not where they may not.

The figures are facts from papers and read-mes, each with its source, in `published.csv`. They are set beside ours where
method, backbone, protocol, shots, split and sampler agree. Embedded data has no published figures, ever.

Source: protocols sheet, sections 1-4 and 8; published-results.csv.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from adaptkit.evaluation.results import SOURCE, RunResult
from adaptkit.sweeps.report.aggregate import (
    ACCURACY,
    MEAN_OF_H,
    TARGET_AVERAGE,
    ZERO_SHOT,
    Average,
    Cell,
    Group,
    H,
    Section,
    averages_of,
    is_embedded,
    notes_of,
    overridden,
    shots_text,
    source_of,
)
from adaptkit.sweeps.report.repeat import spec_of

# --- spellings: the table's names to ours -----------------------------------------------------------------------------

METHODS: Mapping[str, str] = {
    "CLIP": ZERO_SHOT,
    "CLIP single prompt": ZERO_SHOT,
    "CLIP-Adapter": "clip-adapter",
    "CLIP-LoRA": "clip-lora",
    "CoCoOp": "cocoop",
    "CoCoOp (CLIP-SVD rerun)": "cocoop",
    "CoCoOp (RVP table)": "cocoop",
    "CoOp": "coop",
    "CoOp (CLIP-SVD rerun)": "coop",
    "CoOp (KgCoOp rerun, 100 epochs)": "coop",
    "CoOp (RVP table)": "coop",
    "GDA": "gda",
    "IVLP": "ivlp",
    "IVLP (MaPLe repo, 5 epochs)": "ivlp",
    "KgCoOp": "kgcoop",
    "LP++": "lp-plus-plus",
    "Linear probe (CLIP-SVD rerun)": "linear-probe",
    "Linear probe CLIP": "linear-probe",
    "MMRL": "mmrl",
    "MMRL++": "mmrlpp",
    "MaPLe": "maple",
    "ProGrad": "prograd",
    "PromptSRC": "promptsrc",
    "TaskRes": "taskres",
    "Tip-Adapter": "tip-adapter",
    "Tip-Adapter-F": "tip-adapter-f",
}
OTHER_METHODS = frozenset(
    {
        "2SFS", "ATPrompt", "AdaLoRA", "CLIP (CLIP_benchmark templates)", "CLIP 7-template ensemble", "CLIP ensemble",
        "CLIP-SVD", "CasPL", "CoPrompt", "DePT", "DePT+PromptSRC", "Deep Language Prompting (MaPLe repo)",
        "Deep Vision Prompting (MaPLe repo)", "HPT", "LLaMP", "MMA", "ProDA", "ProKeR", "PromptKD", "QNet", "RPO",
        "SkipTuning", "TCP", "TPT", "TextRefiner",
    }
)  # fmt: skip
"""Methods of the table that adaptkit hasn't, or has with other prompts."""

DATASETS: Mapping[str, str] = {
    "Caltech101": "caltech101",
    "DTD": "dtd",
    "EuroSAT": "eurosat",
    "FGVCAircraft": "fgvc_aircraft",
    "Flowers102": "oxford_flowers",
    "Food101": "food101",
    "ImageNet": "imagenet",
    "ImageNet-A": "imagenet_a",
    "ImageNet-R": "imagenet_r",
    "ImageNet-Sketch": "imagenet_sketch",
    "ImageNetV2": "imagenetv2",
    "OxfordPets": "oxford_pets",
    "SUN397": "sun397",
    "StanfordCars": "stanford_cars",
    "UCF101": "ucf101",
}
AVERAGE = "average"
AVERAGES = frozenset({"Average", "Average (10 targets)", "Average (4 targets)"})
"""Means over the eleven datasets, over the ten targets without ImageNet, and over its four shifted versions."""

OTHER_DATASETS = frozenset(
    {
        "Average (7)", "Average (RVP 11)", "P-Air", "P-Cars", "P-Ctech", "P-Ins", "P-Mam", "P-Pets", "P-UCF",
        "RESISC45",
    }
)  # fmt: skip
"""Datasets of other suites or splits."""

ELEVEN = frozenset(DATASETS.values()) - {"imagenet_a", "imagenet_r", "imagenet_sketch", "imagenetv2"}
TEN_TARGETS = ELEVEN - {"imagenet"}
FOUR_TARGETS = frozenset(DATASETS.values()) - ELEVEN

PROTOCOLS: Mapping[str, str] = {
    "few-shot-all": "few-shot",
    "zero-shot": "few-shot",
    "base-to-novel": "base-to-novel",
    "cross-dataset": "cross-dataset",
    "domain-generalisation": "domain-generalisation",
}
OTHER_PROTOCOLS = frozenset(
    {"DOSCO-2k", "zero-shot-clip-benchmark-acc1", "zero-shot-clip-benchmark-mean-per-class-recall"}
)
"""Protocols with other splits or another metric than ours."""

BACKBONES: Mapping[str, tuple[str, ...]] = {
    "ViT-B/16": ("ViT-B-16/openai", "ViT-B-16-quickgelu/openai", "transformers:openai/clip-vit-base-patch16"),
    "ViT-B/32": ("ViT-B-32/openai", "ViT-B-32-quickgelu/openai", "transformers:openai/clip-vit-base-patch32"),
    "RN50": ("RN50/openai", "RN50-quickgelu/openai"),
    "RN101": ("RN101/openai", "RN101-quickgelu/openai"),
}
SAMPLERS: Mapping[str, tuple[str, ...]] = {"gaopengcuhk/Tip-Adapter exp.log": ("tip",)}
"""Samplers of the sources that draw other images than CoOp's; "cross-modal" draws the same ones."""

METHOD_SAMPLERS: Mapping[str, tuple[str, ...]] = {"clip-lora": ("clip-lora",), "lp-plus-plus": ("lp++",)}
COOP_SAMPLERS = ("coop", "cross-modal")

CAUTIONS: Mapping[str, str] = {
    "gaopengcuhk/Tip-Adapter exp.log": "published: epoch and weights chosen on test images",
    "unverified-memory": "published: recalled, not checked",
}
SOURCES: Mapping[str, str] = {"unverified-memory": "no source at hand"}
MEASURES: Mapping[str, str] = {ACCURACY: "all", "base": "base", "novel": "novel", H: "H"}


@dataclass(frozen=True)
class Figure:
    """A published accuracy.

    Args:
        method: As its source calls it.
        backbone: As papers write it, "ViT-B/16".
        protocol: The table's name.
        shots: Images per class; 0 for zero-shot.
        dataset: The table's name.
        split: "all", "base", "novel" or "H".
        printed: The accuracy in percent, with the source's own decimals.
        source: Where it stands.
    """

    method: str
    backbone: str
    protocol: str
    shots: str
    dataset: str
    split: str
    printed: str
    source: str

    @property
    def accuracy(self) -> float:
        """Percent."""
        return float(self.printed)

    @property
    def usable(self) -> bool:
        """Whether the table's names all have a meaning here."""
        known = self.dataset in DATASETS or self.dataset in AVERAGES
        return self.method in METHODS and self.protocol in PROTOCOLS and known

    @property
    def place(self) -> tuple[str, str, str, str]:
        """(method, protocol, dataset, split) under our names."""
        dataset = DATASETS.get(self.dataset, AVERAGE)
        return METHODS[self.method], PROTOCOLS[self.protocol], dataset, self.split

    @property
    def shown_source(self) -> str:
        return SOURCES.get(self.source, self.source)


@dataclass(frozen=True)
class Beside:
    """A published figure beside ours.

    Args:
        cell: Ours; for averages the first of them.
        dataset: Its name, or "average of …".
        measure: Which of the cell's.
        ours: As a fraction.
        half_width: Of our t-interval, where there is one.
        seeds: Over how many seeds.
        figure: Theirs.
        cautions: What else differs or should be known.
    """

    cell: Cell
    dataset: str
    measure: str
    ours: float
    half_width: float | None
    seeds: int
    figure: Figure
    cautions: tuple[str, ...]


@dataclass(frozen=True)
class NotComparable:
    """Results that no published figure may stand beside.

    Args:
        what: Which results, in words.
        reason: Why not.
    """

    what: str
    reason: str


@lru_cache(maxsize=1)
def load_published() -> tuple[Figure, ...]:
    """The whole table, in its order."""
    with open(Path(__file__).with_name("published.csv"), encoding="utf-8", newline="") as file:
        return tuple(
            Figure(
                row["method"],
                row["backbone"],
                row["protocol"],
                row["shots"],
                row["dataset"],
                row["split"],
                row["accuracy"],
                row["source"],
            )
            for row in csv.DictReader(file)
        )


@lru_cache(maxsize=1)
def _by_place() -> dict[tuple[str, str, str, str], list[Figure]]:
    found: dict[tuple[str, str, str, str], list[Figure]] = {}
    for figure in load_published():
        if figure.usable:
            found.setdefault(figure.place, []).append(figure)
    return found


# --- what may stand beside what ---------------------------------------------------------------------------------------


def compare_section(section: Section) -> tuple[list[Beside], list[NotComparable]]:
    """Published figures for a section's results, and the results that have none and why."""
    found: list[Beside] = []
    refused: dict[tuple[str, str], list[str]] = {}
    for group in section.groups:
        why = group_obstacle(section, group)
        if why:
            refused.setdefault((group.dataset, why), [])
            continue
        for cell in group.cells:
            beside, why = _cell_beside(group, cell)
            found += beside
            if why:
                refused.setdefault((group.dataset, why), []).append(f"{cell.label}, {shots_text(group.shots)}")
    for shots in section.shot_counts:
        found += _averages_beside(section, shots)
    by_reason: dict[str, list[str]] = {}
    for (dataset, why), labels in refused.items():
        what = f"{dataset} ({'; '.join(dict.fromkeys(labels))})" if labels else dataset
        by_reason.setdefault(why, []).append(what)
    return found, [NotComparable(", ".join(dict.fromkeys(what)), why) for why, what in by_reason.items()]


def group_obstacle(section: Section, group: Group) -> str:
    """Why no published figure may stand beside any result of a group; "" where one may."""
    result = group.first
    if group.embedded:
        return "embedded data, which has no published figures"
    if source_of(result).get("split") == "own":
        return split_obstacle(result)
    if result.key.dataset not in DATASETS.values():
        return "no published figures are at hand for this dataset"
    if section.variants:
        return f"the protocol was varied: {', '.join(section.variants)}"
    if not any(section.backbone in names for names in BACKBONES.values()):
        return f"other backbone: {section.backbone}"
    return split_obstacle(result)


def split_obstacle(result: RunResult) -> str:
    """Why a run's data isn't that of the papers; "" where it is."""
    if is_embedded(result):
        return "embedded data, which has no published figures"
    source, notes = source_of(result), notes_of(result)
    split = source.get("split") or ("published" if source.get("kind") == "json" else "own")
    if split == "own" or any(note.startswith("own split") for note in notes):
        return "own split: the published lists weren't used"
    if split != "published" or any("isn't the published file" in note for note in notes):
        return "other split: the split file isn't the published one"
    spec = spec_of(result)
    if spec is not None and spec.skip_unreadable and any("unreadable images left out" in note for note in notes):
        return "images were left out as unreadable"
    return ""


def _cell_beside(group: Group, cell: Cell) -> tuple[list[Beside], str]:
    """Figures for one cell, and why there are none where its method has some."""
    key, found, obstacles = cell.key, [], []
    for measure in (name for name in group.measures if name != MEAN_OF_H):
        value = cell.value(measure)
        for figure in _figures(cell, measure):
            why = figure_obstacle(cell, figure) or target_obstacle(cell, measure)
            if why:
                obstacles.append(why)
            elif value is not None:
                summary = cell.summaries.get(measure)
                width = None if summary is None else summary.half_width
                dataset = key.dataset if measure in MEASURES or measure == SOURCE else measure
                cautions = tuple(_cautions(cell, figure))
                found.append(Beside(cell, dataset, measure, value, width, len(cell.runs), figure, cautions))
    return found, "" if found else next(iter(obstacles), "")


def _figures(cell: Cell, measure: str) -> list[Figure]:
    """Every published figure for a cell's method, dataset and measure, whatever the backbone and the shots."""
    key = cell.key
    if SOURCE not in cell.summaries:
        place = (key.method, key.protocol, key.dataset, MEASURES.get(measure, ""))
    elif measure == TARGET_AVERAGE:
        wanted = {"cross-dataset": TEN_TARGETS, "domain-generalisation": FOUR_TARGETS}.get(key.protocol, frozenset())
        complete = cell.summaries.keys() - {SOURCE, TARGET_AVERAGE} == wanted
        place = (key.method, key.protocol, AVERAGE if complete else "", "all")
    else:
        place = (key.method, key.protocol, key.dataset if measure == SOURCE else measure, "all")
    return _by_place().get(place, [])


def figure_obstacle(cell: Cell, figure: Figure) -> str:
    """Why a figure may not stand beside a cell's result; "" where it may."""
    key = cell.key
    if key.backbone not in BACKBONES.get(figure.backbone, ()):
        return f"other backbone: published with {figure.backbone}"
    if cell.method != ZERO_SHOT and str(key.shots) != figure.shots:
        return f"other number of shots: published with {figure.shots}"
    if key.settings.get("precision", "fp32") != "fp32":
        return f"other precision: {key.settings['precision']}"
    samplers = SAMPLERS.get(figure.source) or METHOD_SAMPLERS.get(cell.method) or COOP_SAMPLERS
    if cell.method != ZERO_SHOT and key.sampler not in samplers:
        return f"other sampler: ours {key.sampler}, published {samplers[0]}"
    if any(record.result.tuned_on == "test" for record in cell.runs):
        return "our settings were chosen on test images"
    return ""


def target_obstacle(cell: Cell, measure: str) -> str:
    """Why a target's accuracy, or their average, may not be compared; "" where it may."""
    targets = [part.name for part in cell.first.targets if measure in (part.name, TARGET_AVERAGE)]
    spec = spec_of(cell.first)
    for target in targets:
        said = [text for text in cell.first.warnings if text.startswith(f"{target}: ")]
        if any("own split" in text or "isn't the published file" in text for text in said):
            return f"own or other split of {target}"
        if spec is not None and target not in spec.all_targets:
            return f"{target} wasn't asked for by its name, so that its split isn't known"
    return ""


def _cautions(cell: Cell, figure: Figure) -> Iterator[str]:
    result = cell.first
    if figure.method != "CLIP" and METHODS[figure.method] != figure.method.lower():
        yield f"published as {figure.method}"
    own = overridden(result)
    if own:
        yield f"our settings: {', '.join(f'{name}={value}' for name, value in own.items())}"
    usual = f"{cell.method}/{cell.key.protocol}"
    if result.recipe != usual and cell.method != ZERO_SHOT:
        yield f"our recipe: {result.recipe or 'none'}"
    if cell.method != ZERO_SHOT and cell.seeds != (1, 2, 3):
        yield f"our seeds: {', '.join(map(str, cell.seeds))}"
    if result.tuned_on == "per-dataset-config":
        yield "our settings are chosen per dataset, as the paper's"
    if "target_settings" in cell.key.settings:
        yield "our settings were chosen for each target"
    spec = spec_of(result)
    if spec is not None and (spec.templates or spec.display_names):
        yield "our templates or class names"
    if figure.source in CAUTIONS:
        yield CAUTIONS[figure.source]


def _averages_beside(section: Section, shots: int) -> Iterator[Beside]:
    """Averages over the eleven datasets, where they are complete and every part of them may be compared."""
    groups = section.at(shots)
    if {group.dataset for group in groups} != ELEVEN or any(group_obstacle(section, group) for group in groups):
        return
    for row in averages_of(section, shots):
        if row.complete:
            yield from _average_beside(section, row)


def _average_beside(section: Section, row: Average) -> Iterator[Beside]:
    cell = row.cells[0]
    for measure in (name for name in section.measures if name in MEASURES):
        value = row.value(measure)
        for figure in _by_place().get((cell.method, section.protocol, AVERAGE, MEASURES[measure]), []):
            if value is None or any(figure_obstacle(each, figure) for each in row.cells):
                continue
            cautions = tuple(dict.fromkeys(text for each in row.cells for text in _cautions(each, figure)))
            name = f"average of {row.datasets} datasets"
            yield Beside(cell, name, measure, value, row.half_width(measure), row.seeds, figure, cautions)


def unmapped(figures: Iterable[Figure]) -> list[Figure]:
    """Figures with a name that is neither translated nor listed as another suite's; none are expected."""
    return [
        figure
        for figure in figures
        if not (
            (figure.method in METHODS or figure.method in OTHER_METHODS)
            and (figure.protocol in PROTOCOLS or figure.protocol in OTHER_PROTOCOLS)
            and (figure.backbone in BACKBONES)
            and (
                figure.dataset in DATASETS
                or figure.dataset in AVERAGES
                or figure.dataset in OTHER_DATASETS
                or figure.protocol in OTHER_PROTOCOLS
            )
        )
    ]
