"""`adaptkit import`: a checkpoint of a method's official release as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options, _runs

if TYPE_CHECKING:
    from adaptkit.methods.importing import Imported


@click.command("import", short_help="a reference checkpoint as an adapter")
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...", type=click.Path(path_type=Path))
@click.option("--method", required=True, help="What it was trained with; 'adaptkit list methods' shows the names.")
@_options.backbone_option
@click.option(
    "--classes",
    required=True,
    help="Class names in label order, which the files don't hold: a,b,c, a text file with one name per line (or"
    " 'n01440764 tench'), or a dataset.",
)
@click.option("--data-root", type=click.Path(file_okay=False), help="Folder that holds the datasets' folders.")
@click.option("--descriptions", type=click.Path(), help="Sentences about the classes, for methods that read them.")
@click.option("--template", "templates", multiple=True, help="Prompt with one {}; repeat for an ensemble.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting that the files don't show (class_position=middle) or show wrongly.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the adapter.")
@click.option("--overwrite", is_flag=True, help="Replace what is in --out.")
@_options.device_option
@_options.json_option
def command(
    checkpoints: tuple[Path, ...],
    method: str,
    backbone: str,
    classes: str,
    data_root: str | None,
    descriptions: str | None,
    templates: tuple[str, ...],
    overrides: tuple[str, ...],
    out: Path,
    overwrite: bool,
    device: str,
    as_json: bool,
) -> None:
    """Read a checkpoint of a method's official release and save it as an adapter.

    CHECKPOINT is the file that the release wrote (model.pth.tar-50, or several: keys_16shots.pt values_16shots.pt), or
    the folder that training wrote to, of which the highest epoch is taken. Settings are read from its names and
    shapes. It holds neither the class names nor the backbone's name: give those it was trained with.

    \b
    Examples:
      adaptkit import output/prompt_learner --method coop --backbone ViT-B-16/openai --classes classnames.txt --out x
      adaptkit import model.pth.tar-5 --method maple --backbone ViT-B-16/openai --classes oak,beech --out adapted
    """
    from adaptkit.config import check_templates, parse_overrides
    from adaptkit.methods import methods

    methods.entry(method)  # a misspelt name is said before anything is loaded
    settings = parse_overrides(overrides)
    (_runs.check_writable if overwrite else _runs.check_out)(out)
    _runs.check_apart(out, *checkpoints)

    from adaptkit.backbones.load import load_backbone
    from adaptkit.data.class_names import find_class_names
    from adaptkit.data.descriptions import descriptions_for
    from adaptkit.methods.adapter import save_adapter
    from adaptkit.methods.importing import find_checkpoint, import_reference
    from adaptkit.methods.reference import read_reference_checkpoint
    from adaptkit.storage import digest_file
    from adaptkit.types import DEFAULT_TEMPLATES

    files = [find_checkpoint(path) for path in checkpoints]
    state = read_reference_checkpoint(*files)
    names = find_class_names(classes, data_root=data_root)
    sentences = None if descriptions is None else descriptions_for(descriptions, names).descriptions
    prompts = check_templates(templates or DEFAULT_TEMPLATES)
    model = load_backbone(backbone, device=device)
    imported = import_reference(
        method, state, model, names, templates=prompts, settings=settings, descriptions=sentences
    )
    digests = {path.name: digest_file(path) for path in files}
    facts = {"imported_from": ", ".join(f"{name} (sha256 {digest})" for name, digest in digests.items())}
    save_adapter(out, imported.model, facts, overwrite=overwrite)
    summary = _summary(imported, out, files)
    if as_json:
        console.print_json(summary)
        return
    _show(imported, summary)
    console.say(f"Written to {out}; predict with: adaptkit predict {out} IMAGE")


def _summary(imported: Imported, out: Path, files: list[Path]) -> dict[str, Any]:
    from adaptkit.config import to_mapping

    method = imported.model.method
    return {
        "folder": str(out),
        "method": method.name,
        "backbone": method.backbone.spec.name,
        "files": [str(path) for path in files],
        "classes": list(method.fitted_names),
        "settings": to_mapping(method.config),
        "inferred": imported.inferred,
        "trained": method.num_trained(),
        "taken": list(imported.taken),
        "ignored": len(imported.ignored),
        "ignored_entries": list(imported.ignored),
        "kept": list(imported.kept),
        "notes": list(imported.notes),
    }


def _show(imported: Imported, summary: dict[str, Any]) -> None:
    names, ignored = summary["classes"], imported.ignored
    entries = len(imported.taken) + len(ignored)
    seen = {key: value for key, value in imported.inferred.items() if value != ""}
    console.print_facts(
        f"{summary['method']} from {', '.join(summary['files'])}",
        {
            "backbone": summary["backbone"],
            "classes": f"{len(names)}: {_some(names)}",
            "settings": ", ".join(f"{key}={value}" for key, value in summary["settings"].items()) or "none",
            "seen in the files": ", ".join(f"{key}={value}" for key, value in seen.items()) or "nothing",
            "trained numbers": console.count(summary["trained"]),
            "taken": f"{len(imported.taken)} of {entries} entries: {_some(imported.taken)}",
            "ignored": f"{len(ignored)} of {entries} entries" + (f": {_some(ignored)}" if ignored else ""),
        },
    )
    for note in imported.notes:
        console.say(f"note: {note}")


def _some(items: list[str] | tuple[str, ...], most: int = 6) -> str:
    return ", ".join(items[:most]) + (", …" if len(items) > most else "")
