"""`mini`: a small CLIP of ours, trained on drawn pictures only, whose weights lie in the package.

`benchmarks/pretrain_mini` trains it. It is a test bed, not a model for real photographs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from adaptkit.backbones.mini import formula
from adaptkit.errors import StorageError
from adaptkit.storage import new_folder, read_safetensors, write_json, write_safetensors

WEIGHTS = Path(__file__).with_name("model.safetensors")
_MAX_BYTES = 16 * 2**20


def mini_config() -> dict[str, Any]:
    """What stands in an `open_clip_config.json` for it."""
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
            "text_cfg": {"context_length": 77, "vocab_size": formula.VOCABULARY, "width": 128, "heads": 4, "layers": 3},
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def mini_state_dict() -> dict[str, Tensor]:
    """All weights in fp32 under open_clip's names; unstored token embeddings come from the formula.

    Raises:
        StorageError: The weights in the package are missing or damaged.
    """
    if not WEIGHTS.is_file():
        raise StorageError(f"mini's weights {WEIGHTS} are missing: install adaptkit again.")
    state = read_safetensors(WEIGHTS, max_bytes=_MAX_BYTES)
    rows, stored = state.pop("token_rows").long(), state.pop("token_embedding.rows")
    embedding = formula.token_rows()
    embedding[rows] = stored.float()
    return {**{key: value.float() for key, value in state.items()}, "token_embedding.weight": embedding}


def write_open_clip_folder(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write `mini` as a folder that plain open_clip loads by `local-dir:FOLDER`, with equal features.

    Raises:
        StorageError: The folder can't be written, or isn't empty.
    """
    with new_folder(folder, overwrite=overwrite) as building:
        write_json(building / "open_clip_config.json", mini_config())
        write_safetensors(building / "open_clip_model.safetensors", mini_state_dict())
    return Path(folder)
