"""`adaptkit list`: methods, datasets, backbones, recipes."""

from __future__ import annotations

from typing import Any

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options

KINDS = ("methods", "datasets", "backbones", "recipes")


@click.command("list", short_help="methods, datasets, backbones or recipes")
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("name", required=False)
@_options.json_option
def command(kind: str, name: str | None, as_json: bool) -> None:
    """Show what there is, or one of them by NAME with all its settings.

    \b
    Examples:
      adaptkit list methods
      adaptkit list methods coop
      adaptkit list recipes coop/few-shot
    """
    show = {"methods": _methods, "datasets": _datasets, "backbones": _backbones, "recipes": _recipes}[kind]
    show(name, as_json)


def _print(title: str, columns: list[str], rows: list[list[str]], as_json: bool) -> None:
    if as_json:
        console.print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        console.print_table(title, columns, rows, left=columns)


def _methods(name: str | None, as_json: bool) -> None:
    from adaptkit.methods import methods

    if name is None:
        rows = [[entry, methods.entry(entry).family, methods.entry(entry).summary] for entry in methods]
        return _print("Methods", ["name", "family", "what it does"], rows, as_json)
    from adaptkit.config import describe

    methods.entry(name)
    kind = methods.get(name)
    settings = [[f.name, f.type, str(f.default), f.help] for f in describe(kind.config_class)]
    facts = {
        "name": name,
        "what it does": methods.entry(name).summary,
        "reads": kind.reads,
        "classes it never saw": str(kind.novel_classes),
        "needs text": kind.needs_text,
        "needs a multimodal language model": kind.needs_mllm,
    }
    if as_json:
        keys = ["name", "type", "default", "help"]
        return console.print_json({**facts, "settings": [dict(zip(keys, row, strict=True)) for row in settings]})
    console.print_facts(name, facts)
    console.print_table("Settings (--set KEY=VALUE)", ["name", "type", "default", "help"], settings,
                        left=["name", "type", "default", "help"])  # fmt: skip
    return None


def _datasets(name: str | None, as_json: bool) -> None:
    from adaptkit.data.catalogue import CATALOGUE

    if name is None:
        return _all_datasets(as_json)
    if name in CATALOGUE:
        return _known_dataset(name, as_json)
    from adaptkit.data.sources import load_dataset
    from adaptkit.data.templates import preview

    dataset = load_dataset(name)
    facts: dict[str, Any] = {**dataset.summary(), "templates": list(dataset.templates), "prompts": preview(dataset, 5)}
    if as_json:
        return console.print_json({**facts, "class_names": list(dataset.class_names)})
    shown = {"classes": ", ".join(dataset.class_names[:30]), "images": facts["images"], "split digest": dataset.digest}
    return console.print_facts(
        name, {**shown, "prompts": "\n".join(facts["prompts"]), "notes": "\n".join(dataset.notes)}
    )


def _all_datasets(as_json: bool) -> None:
    from adaptkit.data.catalogue import CATALOGUE
    from adaptkit.data.synthetic import SUMMARIES

    columns = ["name", "group", "classes", "train", "val", "test"]
    known = [(each.name, each.group, (each.classes, *each.sizes)) for each in CATALOGUE.values()]
    if as_json:
        rows: list[dict[str, Any]] = [
            {"name": key, "group": "embedded", "what": text} for key, text in SUMMARIES.items()
        ]
        rows += [dict(zip(columns, (name, group, *sizes), strict=True)) for name, group, sizes in known]
        return console.print_json(rows)
    _print("Embedded datasets", ["name", "what"], [list(pair) for pair in SUMMARIES.items()], False)
    cells = [[name, group, *(console.count(size) if size else "" for size in sizes)] for name, group, sizes in known]
    return console.print_table("Known datasets, images per split", columns, cells, left=["name", "group"],
                               note="adaptkit list datasets NAME: all about one. adaptkit data prepare NAME: get it."
                               " Folders of class folders, CSVs and split JSONs are accepted too.")  # fmt: skip


def _known_dataset(name: str, as_json: bool) -> None:
    """Everything the table says about one dataset, and whether it is under the data root."""
    from adaptkit.data.catalogue import CATALOGUE
    from adaptkit.data.known import DATA_ROOT_VARIABLE
    from adaptkit.data.sources import load_dataset
    from adaptkit.errors import AdaptKitError

    known = CATALOGUE[name]
    try:
        dataset = load_dataset(name)
        here = f"{dataset.source['path']} ({sum(map(len, dataset.splits.values())):,} images listed)"
    except AdaptKitError as error:
        here = f"no: {error}"
    facts: dict[str, Any] = {
        "title": known.title,
        "group": known.group,
        "classes": known.classes,
        "train": known.sizes[0],
        "val": known.sizes[1],
        "test": known.sizes[2],
        "split": known.rule,
        "split file": known.json,
        "templates": list(known.templates),
        "layouts": [f"{layout.image_path or '.'}/" for layout in known.layouts],
        "tree": known.tree(),
        "sources": [origin.where for origin in known.origins],
        "by hand": known.steps,
        "left out": list(known.dropped),
        "renamed": dict(known.renames),
        "licence": known.licence,
        "citation": known.citation,
        "to know": list(known.caveats),
        f"in ${DATA_ROOT_VARIABLE}": here,
    }
    if as_json:
        return console.print_json({"name": name, **facts})
    shown = {key: _text(value) for key, value in facts.items() if value or value == 0}
    return console.print_facts(name, shown)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{old} → {new}" for old, new in value.items())
    return (
        "\n".join(map(str, value))
        if isinstance(value, list)
        else console.count(value)
        if isinstance(value, int)
        else value
    )


def _backbones(name: str | None, as_json: bool) -> None:
    if name is not None:
        from adaptkit.backbones.load import load_backbone

        spec = load_backbone(name).spec
        facts = {
            "name": spec.name,
            "family": spec.family,
            "digest": spec.digest,
            "dim": spec.embed_dim,
            "image size": spec.preprocessing.image_size,
            "context length": spec.context_length or "no text",
            "activation": spec.activation,
            "image tower": spec.opaque_image or "open",
            "text tower": spec.opaque_text or ("open" if spec.context_length else "none"),
        }
        return console.print_json(facts) if as_json else console.print_facts(name, facts)
    import open_clip

    rows = [["mini", "embedded: a small CLIP trained on drawn pictures; needs no network"]]
    rows += [["mini-mllm", "embedded: a small LLaVA on mini's picture tower, trained on drawn pictures"]]
    rows += [[f"{arch}/{tag}", "open_clip"] for arch, tag in open_clip.list_pretrained()]
    rows += [
        ["hf-hub:ORG/REPO", "open_clip's layout on the Hugging Face hub"],
        ["local-dir:FOLDER", "the same layout in a folder"],
        [
            "transformers:ID_OR_FOLDER",
            "CLIP, SigLIP, SigLIP 2, ALIGN, AltCLIP, Chinese-CLIP, MetaCLIP 2, DINOv2 of transformers",
        ],
        [
            "transformers:ID_OR_FOLDER",
            "multimodal language models: LLaVA, Qwen-VL, SmolVLM, Idefics, InternVL, Gemma 3, PaliGemma, BLIP-2; @bf16",
        ],
        ["timm:NAME_OR_FOLDER", "image encoders without text"],
    ]
    return _print("Backbones", ["name", "what"], rows, as_json)


def _recipes(name: str | None, as_json: bool) -> None:
    from adaptkit.evaluation.recipes import list_recipes, load_recipe

    if name is None:
        found = [load_recipe(item) for item in list_recipes()]
        rows = [
            [item.name, item.summary, "marked: " + item.tuned_on if item.marked else item.tuned_on] for item in found
        ]
        return _print("Recipes", ["name", "what", "tuned on"], rows, as_json)
    from dataclasses import asdict

    recipe = load_recipe(name)
    facts = {key: value for key, value in asdict(recipe).items() if value not in ({}, (), "")}
    return console.print_json(facts) if as_json else console.print_facts(name, facts)
