"""Plots as inline SVG: text stays text, and ink follows the page's colours, light or dark.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, each with a marker of its own; a method has the
same ones in all plots of a section. The legend is the page's.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptkit.evaluation.metrics import DEFAULT_BINS, calibration_error
from adaptkit.storage import digest_json
from adaptkit.sweeps.report.aggregate import ZERO_SHOT, Cell, Group, Section, averages_of, shots_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c7a5b")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")  # 11 and 7 share no divisor: 77 pairs
MOST_CURVES = 8
MOST_PANELS = 12
MOST_CLASSES = 24

_INK, _GRID = "#010203", "#010204"  # taken by no colour of ours; exchanged for the page's own
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names from outside may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "figure.constrained_layout.use": True,
}
_WIDTH, _HEIGHT = 4.5, 3.1


@dataclass(frozen=True)
class Plot:
    """A drawn figure.

    Args:
        title: What it shows.
        svg: An `<svg>` element; safe to put into a page.
        text: The same in words, for those who can't see it.
    """

    title: str
    svg: str
    text: str


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    colour: str
    marker: str


def looks(labels: Sequence[str]) -> dict[str, Look]:
    """A look for each method of a section."""
    return {
        label: Look(COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]) for place, label in enumerate(labels)
    }


# --- drawing ----------------------------------------------------------------------------------------------------------


class _Canvas:
    """A figure in our style, turned to SVG at the end."""

    def __init__(self, name: str, width: float = _WIDTH, height: float = _HEIGHT, panels: tuple[int, int] = (1, 1)):
        import matplotlib as mpl
        from matplotlib.figure import Figure

        style: Any = {**_STYLE, "svg.hashsalt": digest_json(name)}
        self._style = mpl.rc_context(style)
        self._name, self._size, self._panels, self._kind = name, (width, height), panels, Figure

    def __enter__(self) -> list[Axes]:
        self._style.__enter__()
        self._figure: Figure = self._kind(figsize=self._size)
        self._figure.patch.set_alpha(0)
        grid = self._figure.subplots(*self._panels, squeeze=False)
        for axes in grid.flat:
            axes.patch.set_alpha(0)
        return list(grid.flat)

    def __exit__(self, *failure: Any) -> None:
        try:
            self.svg = _svg(self._figure, self._name) if failure[0] is None else ""
        finally:
            self._style.__exit__(*failure)


def _svg(figure: Figure, name: str) -> str:
    """The figure as one `<svg>` element without sizes, comments and metadata."""
    stream = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that matplotlib's own font hasn't: the reader's browser has others
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = stream.getvalue()
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    opening = re.match(r"<svg[^>]*>", text)
    box = re.search(r'viewBox="([^"]*)"', opening.group() if opening else "")
    body = text[opening.end() if opening else 0 :].replace("xlink:href", "href")
    body = body.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    for place, colour in enumerate(COLOURS):
        body = body.replace(colour, f"var(--c{place})")
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)  # the page's own font
    # names are a page's: those that are referred to get one of the figure's own, the others go
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda found: found.group() if found.group(1) in used else "", body)
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>svg-{digest_json(name)[:8]}-", body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    return f'<svg viewBox="{box.group(1) if box else "0 0 324 223"}" aria-hidden="true">{body}'


def _shown(text: str, most: int = 28) -> str:
    """A name from outside as matplotlib can draw it: no signs that fonts refuse, no line breaks, not too long."""
    text = "".join(sign if sign.isprintable() else " " for sign in text)
    return text if len(text) <= most else text[: most - 1] + "…"


def swatch(name: str, look: Look) -> str:
    """The marker of a legend's line, as SVG; `name` names the figure."""
    with (canvas := _Canvas(f"swatch {name}", 0.28, 0.2)) as (axes,):
        axes.set_axis_off()
        axes.plot([0, 1, 2], [0, 0, 0], color=look.colour)
        axes.plot([1], [0], color=look.colour, marker=look.marker)
    return canvas.svg


def _values_text(values: Mapping[str, float]) -> str:
    return "; ".join(f"{label} {100 * value:.1f}" for label, value in values.items())


# --- curves -----------------------------------------------------------------------------------------------------------


def curves(section: Section, style: Mapping[str, Look]) -> list[Plot]:
    """The ranking measure over the shots, one plot per dataset; [] with one number of shots."""
    if len(section.shot_counts) < 2:
        return []
    shown = leaders(section)
    plots = []
    for dataset in list(dict.fromkeys(group.dataset for group in section.groups))[:MOST_PANELS]:
        groups = [group for group in section.groups if group.dataset == dataset]
        if len(groups) > 1:
            plots.append(_curve(section, dataset, groups, shown, style))
    return plots


def leaders(section: Section) -> list[str]:
    """Zero-shot and the methods that do best at the most shots, for plots that hold only so many."""
    rows = averages_of(section, section.shot_counts[-1])
    zero = [row.label for row in rows if row.cells[0].method == ZERO_SHOT][:1]
    best = [row.label for row in rows if row.label not in zero][: MOST_CURVES - len(zero)]
    return [label for label in section.labels if label in (*zero, *best)]


def _curve(
    section: Section, dataset: str, groups: Sequence[Group], shown: Sequence[str], style: Mapping[str, Look]
) -> Plot:
    last: dict[str, float] = {}
    with (canvas := _Canvas(f"curve {section.anchor} {dataset}")) as (axes,):
        for place, label in enumerate(shown):
            points = _points(groups, label)
            if not points:
                continue
            shots, values, widths = zip(*points, strict=True)
            aside = 2 ** (0.05 * (place - (len(shown) - 1) / 2))  # so that intervals don't cover each other
            axes.errorbar(
                [aside * count for count in shots],
                [100 * value for value in values],
                [100 * width for width in widths],
                color=style[label].colour,
                marker=style[label].marker,
                linestyle=(0, (4, 2)) if label == ZERO_SHOT else "-",
                elinewidth=0.8,
                capsize=2,
            )
            last[label] = values[-1]
        axes.set_xscale("log", base=2)
        axes.set_xticks(section.shot_counts, [str(shots) for shots in section.shot_counts])
        axes.minorticks_off()
        axes.set(xlabel="images per class", ylabel=f"{section.ranked_by} (%)", title=_shown(dataset, 50))
    words = f"{section.ranked_by} over images per class on {dataset}; at {groups[-1].shots}: {_values_text(last)}"
    return Plot(f"{dataset}: over shots", canvas.svg, words)


def _points(groups: Sequence[Group], label: str) -> list[tuple[int, float, float]]:
    """(shots, value, half width or 0) of a method."""
    found = []
    for group in groups:
        cell = group.cell(label)
        value = None if cell is None else cell.value(group.ranked_by)
        if cell is not None and value is not None:
            summary = cell.summaries.get(group.ranked_by)
            found.append((group.shots, value, (summary.half_width or 0.0) if summary else 0.0))
    return found


# --- scatters ---------------------------------------------------------------------------------------------------------


def base_against_novel(section: Section, style: Mapping[str, Look]) -> list[Plot]:
    """Novel over base accuracy at the most shots, with lines of equal H, one plot per dataset."""
    if "novel" not in section.measures:
        return []
    return [_base_novel(section, group, style) for group in section.at(section.shot_counts[-1])[:MOST_PANELS]]


def _base_novel(section: Section, group: Group, style: Mapping[str, Look]) -> Plot:
    points = {
        cell.label: (cell.averages.base, cell.averages.novel) for cell in group.cells if cell.averages is not None
    }
    with (canvas := _Canvas(f"base-novel {section.anchor} {group.dataset}")) as (axes,):
        for label, (base, novel) in points.items():
            look = style[label]
            axes.plot(100 * base, 100 * novel, look.marker, color=look.colour, markersize=7, linestyle="none")
        axes.margins(0.12)
        _equal_h(axes)
        axes.set(
            xlabel="base accuracy (%)",
            ylabel="novel accuracy (%)",
            title=f"{_shown(group.dataset, 40)}, {shots_text(group.shots)}",
        )
    words = f"base and novel accuracy on {group.dataset}: "
    words += "; ".join(f"{label} {100 * base:.1f} and {100 * novel:.1f}" for label, (base, novel) in points.items())
    return Plot(f"{group.dataset}: base and novel", canvas.svg, words)


def _equal_h(axes: Axes) -> None:
    """Lines of equal harmonic mean behind the points, labelled."""
    x0, x1 = axes.get_xlim()
    y0, y1 = axes.get_ylim()
    x, y = np.meshgrid(np.linspace(max(x0, 0.1), x1, 80), np.linspace(max(y0, 0.1), y1, 80))
    lines = axes.contour(x, y, 2 * x * y / (x + y), levels=5, colors=_INK, linewidths=0.6, alpha=0.35)
    axes.clabel(lines, fmt="H %g", fontsize=7.5)
    axes.set(xlim=(x0, x1), ylim=(y0, y1))


def costs(section: Section, style: Mapping[str, Look]) -> list[Plot]:
    """The ranking measure against trained parameters and against seconds, at the most shots, over all datasets."""
    rows = [row for row in averages_of(section, section.shot_counts[-1]) if row.value(section.ranked_by) is not None]
    if len(rows) < 2:
        return []
    scores = {row.label: row.value(section.ranked_by) or 0.0 for row in rows}
    parameters = {row.label: float(np.mean([cell.first.trained_parameters for cell in row.cells])) for row in rows}
    seconds = {row.label: max(0.01, float(np.mean([cell.seconds for cell in row.cells]))) for row in rows}
    datasets = {group.dataset for group in section.groups}
    where = f"mean of {len(datasets)} datasets" if len(datasets) > 1 else next(iter(datasets))
    return [
        _cost(section, style, scores, parameters, "trained parameters", where),
        _cost(section, style, scores, seconds, "seconds", where),
    ]


def _cost(
    section: Section,
    style: Mapping[str, Look],
    scores: Mapping[str, float],
    costs: Mapping[str, float],
    what: str,
    where: str,
) -> Plot:
    place = f"{_shown(where, 40)}, {shots_text(section.shot_counts[-1])}"
    with (canvas := _Canvas(f"{what} {section.anchor}")) as (axes,):
        for label, score in scores.items():
            look = style[label]
            axes.plot(costs[label], 100 * score, look.marker, color=look.colour, markersize=7, linestyle="none")
        _log_axis(axes, list(costs.values()))
        axes.margins(y=0.12)
        axes.set(
            xlabel=what,
            ylabel=f"{section.ranked_by} (%)",
            title=place,
        )
    words = f"{section.ranked_by} against {what}: "
    words += "; ".join(f"{label} {100 * score:.1f} at {costs[label]:,.1f}" for label, score in scores.items())
    return Plot(f"against {what}", canvas.svg, words)


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Powers of ten along x, written as numbers; methods that cost nothing stand at 0, left of them."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = int(np.floor(np.log10(min(positive)))), int(np.ceil(np.log10(max(positive))))
    ticks = [10.0**power for power in range(low, max(high, low + 1) + 1)]
    if min(values) > 0:
        axes.set_xscale("log")
        axes.set_xlim(ticks[0] * 0.9, ticks[-1] * 1.1)
    else:
        axes.set_xscale("symlog", linthresh=ticks[0], linscale=0.5)
        ticks = [0.0, *ticks]
        axes.set_xlim(-0.3 * ticks[1], ticks[-1] * 1.2)
    axes.set_xticks(ticks, [f"{tick:,.12g}" for tick in ticks])
    axes.minorticks_off()


# --- reliability ------------------------------------------------------------------------------------------------------

Pairs = tuple[np.ndarray, np.ndarray]
"""Confidences and hits, [n] each."""


def reliability(name: str, group: Group, panels: Mapping[str, Mapping[str, Pairs]]) -> Plot:
    """Share of right answers over confidence, a panel per method, a line per kind of part.

    Args:
        name: Names the figure.
        group: What they were tested on.
        panels: Confidences and hits by method and kind of part ("base"), those of all seeds.
    """
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    errors = []
    with (canvas := _Canvas(name, _WIDTH, 2.2 * down, (down, across))) as every:
        for axes, (label, parts) in zip(every, panels.items(), strict=False):
            errors.append(f"{label}: {_panel(axes, label, parts)}")
        for axes in every[len(panels) :]:
            axes.set_axis_off()
        for axes in every[-across:]:
            axes.set_xlabel("confidence", fontsize=8)
        for axes in every[::across]:
            axes.set_ylabel("right", fontsize=8)
    words = f"calibration error (ECE, {DEFAULT_BINS} bins, percent) on {group.dataset}: {'; '.join(errors)}"
    return Plot("Reliability", canvas.svg, words)


def _panel(axes: Axes, label: str, parts: Mapping[str, Pairs]) -> str:
    """Draw one method; returns its calibration errors in words."""
    axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.7, linestyle=(0, (3, 3)), alpha=0.6)
    for place, (confidence, hits) in enumerate(parts.values()):
        x, y = _bins(confidence, hits)
        axes.plot(x, y, color=COLOURS[place], marker=MARKERS[place], markersize=3.5, linewidth=1.2)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    errors = {kind: f"{100 * calibration_error(*pairs):.1f}" for kind, pairs in parts.items()}
    said = ", ".join(f"{kind} {error}" for kind, error in errors.items())
    axes.set_title(f"{_shown(label)}\nECE {said if len(parts) > 1 else next(iter(errors.values()))}", fontsize=8)
    return said


def _bins(confidence: np.ndarray, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean confidence and share of hits in each bin of equal width that isn't empty."""
    edges = np.arange(1, DEFAULT_BINS) / DEFAULT_BINS
    place = np.searchsorted(edges, confidence, side="left")
    counts = np.bincount(place, minlength=DEFAULT_BINS)
    filled = counts > 0
    sums = [np.bincount(place, weights=w, minlength=DEFAULT_BINS)[filled] for w in (confidence, hits.astype(float))]
    return sums[0] / counts[filled], sums[1] / counts[filled]


# --- classes ----------------------------------------------------------------------------------------------------------


def class_gains(name: str, group: Group, cell: Cell, gains: Sequence[tuple[str, str, float]]) -> Plot:
    """Gain over zero-shot by class, largest first; the middle is left out where there are too many.

    Args:
        name: Names the figure.
        group: What was tested.
        cell: The method.
        gains: (class, kind of part, gain as a fraction).
    """
    ordered = sorted(gains, key=lambda item: -item[2])
    half = MOST_CLASSES // 2
    shown = ordered if len(ordered) <= MOST_CLASSES else [*ordered[:half], *ordered[-half:]]
    kinds = list(dict.fromkeys(kind for _, kind, _ in gains))
    left = f" ({len(ordered) - len(shown)} classes between them left out)" if len(shown) < len(ordered) else ""
    with (canvas := _Canvas(name, _WIDTH, 0.9 + 0.17 * len(shown))) as (axes,):
        for place, (_, kind, gain) in enumerate(shown):
            axes.barh(place, 100 * gain, color=COLOURS[kinds.index(kind) % len(COLOURS)], height=0.72)
        axes.set_yticks(range(len(shown)), [_shown(label) for label, _, _ in shown], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(0, color=_INK, linewidth=0.8)
        axes.grid(visible=False, axis="y")
        axes.set(
            xlabel="points gained over zero-shot",
            title=f"{_shown(cell.label, 40)}, {shots_text(group.shots)}",
            ylim=(len(shown) - 0.4, -0.6),
        )
        axes.tick_params(axis="y", length=0)
    words = f"gain of {cell.label} over zero-shot by class{left}: "
    words += "; ".join(f"{label} {100 * gain:+.1f}" for label, _, gain in shown)
    return Plot(f"Gain by class{left}", canvas.svg, words)
