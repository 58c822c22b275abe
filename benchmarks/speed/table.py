"""Rows of results as lines of a table for people."""

from __future__ import annotations

from benchmarks.speed.measure import Row

_COLUMNS = "{:<11}{:<66}{:>10}{:>11}{:>10}  {:<17}{}"

HEADER = _COLUMNS.format("", "", "ours", "plain", "ratio", "wanted", "largest differences (relative), notes")


def line(row: Row, *, judged: bool = True) -> str:
    """One row; `judged` says whether it is as fast as we want, which means nothing at tiny sizes."""
    plain = "" if row.plain is None else ("~" if row.extrapolated else "") + quantity(row.plain, row.unit)
    ratio = "" if row.ratio is None else f"{'~' if row.extrapolated else ''}{row.ratio:.3g}x"
    return _COLUMNS.format(
        row.benchmark, row.case, quantity(row.ours, row.unit), plain, ratio, _wanted(row, judged), _remarks(row)
    ).rstrip()


def quantity(value: float, unit: str) -> str:
    """A number with its unit, three digits."""
    if unit == "bytes":
        return f"{value / 2**30:.2f} GB" if value >= 2**30 else f"{value / 2**20:.0f} MB"
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _wanted(row: Row, judged: bool) -> str:
    if row.wanted_ratio is None and row.wanted_most is None:
        return ""
    if row.wanted_ratio is not None:
        wanted = f">= {row.wanted_ratio:g}x"
    else:
        wanted = f"<= {quantity(row.wanted_most or 0.0, row.unit)}"
    if not judged or row.met is None:
        return wanted
    return f"{wanted} {'met' if row.met else 'MISSED'}"


def _remarks(row: Row) -> str:
    remarks = [f"{name} {d.absolute:.1e} ({d.relative:.1e})" for name, d in row.differences.items()]
    if not row.same_numbers:
        remarks.insert(0, "NUMBERS DIFFER")
    if "smallest_cosine" in row.facts:
        remarks.append(f"smallest cosine {row.facts['smallest_cosine']:.6f}")
    if row.note:
        remarks.append(row.note)
    return ", ".join(remarks)
