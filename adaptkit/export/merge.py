"""Merging: what was learned inside the towers, added to their weights and written as an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.errors import UnsupportedError
from adaptkit.export.open_clip import CONFIG_FILE, WEIGHTS_FILE, open_clip_config, open_clip_state
from adaptkit.methods.adapter import AdaptedModel
from adaptkit.methods.base import ClassWeightMethod, Method
from adaptkit.methods.lora._towers import TowerMethod
from adaptkit.storage import new_folder, write_json, write_safetensors


def check_mergeable(method: type[Method]) -> None:
    """Refuse a method that has nothing to merge.

    Raises:
        UnsupportedError: It learns elsewhere than inside the towers.
    """
    if issubclass(method, TowerMethod):
        return
    where = "learns beside the towers and leaves their weights as they are"
    if not issubclass(method, ClassWeightMethod):
        where = "computes its logits by rules of its own, which no checkpoint of a CLIP holds"
    raise UnsupportedError(
        f"{method.name} {where}, so there is nothing to merge into a checkpoint: write --format onnx or torch,"
        " or keep the adapter folder, which 'adaptkit predict' reads. Checkpoints are for clip-lora and peft."
    )


def merge_adapter(model: AdaptedModel, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a checkpoint in open_clip's layout whose plain zero-shot logits are the adapted model's.

    `local-dir:FOLDER` loads it, here and in open_clip; its logit scale is the method's.

    Args:
        model: An adapted model of a method that learns inside the towers.
        folder: Where to; must not exist or be empty, unless `overwrite`.
        overwrite: Replace an existing folder.

    Raises:
        UnsupportedError: The method has nothing to merge, the weights are quantised, or open_clip's layout can't hold
            the backbone.
        StorageError: The folder can't be written, or isn't empty.
    """
    check_mergeable(type(model.method))
    method = cast(TowerMethod, model.method)
    with new_folder(folder, overwrite=overwrite) as building:
        write_merged(method, building)
        (building / "README.md").write_text(_card(method), encoding="utf-8")
    return Path(folder)


def write_merged(method: TowerMethod, folder: Path) -> None:
    """Write the config and the weights of the merged checkpoint into a folder that is there.

    Raises:
        UnsupportedError: As for `merge_adapter`.
    """
    config = open_clip_config(cast(DualEncoder, method.backbone))
    scale, _ = method.scale_and_bias()
    state = open_clip_state(method.merged_towers(), scale)
    write_json(folder / CONFIG_FILE, config)
    write_safetensors(folder / WEIGHTS_FILE, state)


def _card(method: TowerMethod) -> str:
    names = ", ".join(method.fitted_names[:20]) + (", …" if len(method.fitted_names) > 20 else "")
    return "\n".join(
        [
            f"# {method.backbone.spec.name} with {method.name} merged in",
            "",
            "A checkpoint in open_clip's layout: `open_clip.create_model('local-dir:FOLDER')`.",
            "",
            f"- fitted on: {names}",
            f"- templates: {'; '.join(method.templates)}",
            f"- backbone before: digest {method.backbone.spec.digest}",
            "",
        ]
    )
