"""`mini-mllm`: a small LLaVA of ours on mini's picture tower, in transformers' layout, whose files lie in the package.

`benchmarks/pretrain_mini` trains it on drawn pictures. It is a test bed, not a model for real photographs.
"""

from __future__ import annotations

from pathlib import Path

from adaptkit.errors import StorageError

FOLDER = Path(__file__).with_name("model")


def model_folder() -> Path:
    """The folder that `transformers:` reads too.

    Raises:
        StorageError: It isn't whole.
    """
    lacking = [name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (FOLDER / name).is_file()]
    if lacking:
        raise StorageError(f"mini-mllm's files in {FOLDER} are missing ({', '.join(lacking)}): install adaptkit again.")
    return FOLDER
