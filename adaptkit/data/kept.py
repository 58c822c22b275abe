"""Datasets kept in memory, for whoever loads the same ones again and again (sweeps)."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from adaptkit.data.splits import Dataset

F = TypeVar("F", bound="Callable[..., Dataset]")

_shelves: list[_Shelf] = []


class _Shelf:
    """The datasets used last."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held: OrderedDict[Any, Dataset] = OrderedDict()

    def get(self, key: Any, load: Callable[[], Dataset]) -> Dataset:
        if key not in self.held:
            self.held[key] = load()
        self.held.move_to_end(key)
        while len(self.held) > self.most:
            self.held.popitem(last=False)
        return self.held[key]


@contextmanager
def datasets_kept(most: int = 4) -> Iterator[None]:
    """Within this block `load_dataset` gives the same object again for the same words, for the `most` used last.

    Changes on disk aren't noticed meanwhile.
    """
    shelf = _Shelf(most)
    _shelves.append(shelf)
    try:
        yield
    finally:
        _shelves.remove(shelf)


def keeping(known: Callable[[], tuple[str, ...]]) -> Callable[[F], F]:
    """Let a loader look at what `datasets_kept` holds first.

    Args:
        known: Gives the names whose splits don't depend on `shots`.
    """

    def decorate(load: F) -> F:
        @functools.wraps(load)
        def looking(name: Any, **said: Any) -> Dataset:
            if not _shelves:
                return load(name, **said)
            words = {**said, "shots": None} if name in known() else said
            return _shelves[-1].get(repr((name, sorted(words.items()))), lambda: load(name, **said))

        return looking  # type: ignore[return-value]  # the same signature

    return decorate
