"""adaptkit adapts frozen vision-language models to a user's own classes from a handful of images.

Public names are loaded on first use: importing adaptkit loads no torch.

Example:
    >>> from adaptkit import FewShotClassifier
    >>> classifier = FewShotClassifier("tip-adapter", backbone="ViT-B-16/openai")
    >>> classifier.fit(paths, labels).predict(new_paths)  # doctest: +SKIP
    array(['oak', 'beech'], dtype='<U5')
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptkit.backbones.load import load_backbone
    from adaptkit.data.sources import load_dataset
    from adaptkit.errors import AdaptKitError
    from adaptkit.estimator import FewShotClassifier, load
    from adaptkit.export.adapter_set import AdapterSet
    from adaptkit.methods.adapter import AdaptedModel, load_adapter, save_adapter

__version__ = "0.1.0"

_HOME = {
    "AdaptKitError": "adaptkit.errors",
    "AdaptedModel": "adaptkit.methods.adapter",
    "AdapterSet": "adaptkit.export.adapter_set",
    "FewShotClassifier": "adaptkit.estimator",
    "load": "adaptkit.estimator",
    "load_adapter": "adaptkit.methods.adapter",
    "load_backbone": "adaptkit.backbones.load",
    "load_dataset": "adaptkit.data.sources",
    "save_adapter": "adaptkit.methods.adapter",
}

__all__ = [
    "AdaptKitError",
    "AdaptedModel",
    "AdapterSet",
    "FewShotClassifier",
    "__version__",
    "load",
    "load_adapter",
    "load_backbone",
    "load_dataset",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'adaptkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
