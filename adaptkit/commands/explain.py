"""`adaptkit explain`: which words learned context vectors are nearest to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options, _runs

if TYPE_CHECKING:
    from adaptkit.methods.base import Method
    from adaptkit.methods.explaining import Explanation


@click.command("explain", short_help="the words nearest to learned prompts")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--top", type=click.IntRange(min=1), default=3, show_default=True, help="Words shown per vector.")
@click.option("--limit", type=click.IntRange(min=1), default=64, show_default=True, help="Vectors shown.")
@click.option("--backbone", help="Where the adapter's backbone lies now; it must be the same one.")
@_options.device_option
@_options.json_option
def command(adapter: Path, top: int, limit: int, backbone: str | None, device: str, as_json: bool) -> None:
    """Show what an adapter (or the folder of a run) learned, as words where it learned prompts.

    Each learned vector is shown with the words of the backbone's vocabulary that lie nearest to it. Methods that learn
    no such vectors are told with what they learned instead, and exit code 2.

    \b
    Examples:
      adaptkit explain runs/coop
      adaptkit explain runs/coop --top 5 --json
    """
    from adaptkit.backbones.load import load_backbone
    from adaptkit.errors import UnsupportedError
    from adaptkit.methods.adapter import load_adapter
    from adaptkit.methods.explaining import CAUTION, explain_contexts

    folder = _runs.adapter_folder(adapter)
    given = None if backbone is None else load_backbone(backbone, device=device)
    method = load_adapter(folder, given, device=device).method
    facts = _facts(method, folder)
    try:
        found = explain_contexts(method, top, limit)
    except UnsupportedError as error:
        if as_json:
            console.print_json({**facts, "vectors": [], "left_out": 0, "why_none": str(error)})
        else:
            _show_facts(facts)
        raise
    if as_json:
        from dataclasses import asdict

        vectors = [asdict(vector) for vector in found.vectors]
        console.print_json({**facts, "vectors": vectors, "left_out": found.left_out, "caution": CAUTION})
        return
    _show_facts(facts)
    _show_vectors(found)
    console.say(CAUTION)


def _facts(method: Method, folder: Path) -> dict[str, Any]:
    return {
        "adapter": str(folder),
        "method": method.name,
        "backbone": method.backbone.spec.name,
        "classes": list(method.fitted_names),
        "trained": method.num_trained(),
    }


def _show_facts(facts: dict[str, Any]) -> None:
    names = facts["classes"]
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    console.print_facts(
        facts["adapter"],
        {
            "method": facts["method"],
            "backbone": facts["backbone"],
            "classes": f"{len(names)}: {shown}",
            "trained numbers": console.count(facts["trained"]),
        },
    )


def _show_vectors(found: Explanation) -> None:
    """A table with one line per vector and word; what belongs to the vector stands in its first line only."""
    started = any(vector.start is not None for vector in found.vectors)
    rows = []
    for vector in found.vectors:
        start = [vector.start or "–", "–" if vector.moved is None else f"{vector.moved:.3f}"] if started else []
        for place, near in enumerate(vector.nearest):
            own = [f"{vector.group} {vector.index}", f"{vector.norm:.3f}", *start]
            own = own if place == 0 else [""] * len(own)
            rows.append([*own, near.word, f"{near.distance:.3f}", f"{near.cosine:.3f}"])
    columns = ["vector", "norm", *(["started from", "moved"] if started else []), "word", "distance", "cosine"]
    more = f"{console.count(found.left_out)} more vectors left out (--limit)" if found.left_out else ""
    console.print_table("Nearest words", columns, rows, left=["vector", "started from", "word"], note=more)
