"""The backbone of a run: the one named, or a dataset's usual one; only the last used is kept in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptkit.backbones.base import Backbone
    from adaptkit.data.splits import Dataset

DEFAULT = "default"
"""In a suite: a feature file's own backbone, else `mini`, as `adaptkit run` chooses without --backbone."""


class KeptBackbone:
    """Loads backbones and keeps the last one: two at once may not fit.

    Args:
        device: Where they live.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._key: tuple[str, str] | None = None
        self._backbone: Backbone | None = None

    def get(self, name: str, dataset: Dataset) -> Backbone:
        """The backbone of that name for a dataset.

        Raises:
            AdaptKitError: It can't be loaded, or isn't the one that made the dataset's features.
        """
        from adaptkit.evaluation.stored import backbone_for, feature_file

        file = feature_file(dataset)
        key = (name, "" if file is None else str(file.path))
        if self._backbone is None or key != self._key:
            self._backbone = None
            self._backbone = backbone_for(dataset, None if name == DEFAULT else name, device=self.device)
            self._key = key
        return self._backbone
