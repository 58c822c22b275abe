"""One generic, lazy registry: names to objects, found without importing what they name.

A folder of files is a registry: the file's name is the entry's name, and the file registers its object with the
decorator when it is imported, which happens on first use. So `adaptkit list methods` imports no method.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Generic, TypeVar

from adaptkit.errors import ConfigError, UnknownNameError

T = TypeVar("T")
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Entry:
    """Where a registered name lives: its module, its folder ("family") and the first line of its docstring."""

    name: str
    module: str
    family: str = ""
    summary: str = ""


class Registry(Generic[T]):
    """Names to objects of one kind.

    Args:
        kind: What the entries are, in the singular ("method"); used in messages.
        entry_points: Name of the entry-point group through which other packages add modules, or "".
    """

    def __init__(self, kind: str, entry_points: str = "") -> None:
        self.kind = kind
        self._entry_points = entry_points
        self._entries: dict[str, Entry] = {}
        self._objects: dict[str, T] = {}
        self._lock = RLock()
        self._outside_read = not entry_points

    def discover(self, package: str, folder: Path) -> None:
        """Note every module in `folder`'s sub-folders; `tip_adapter_f.py` in `caches/` becomes "tip-adapter-f".

        Only the docstring is read (by `ast`): nothing is imported. Files whose name begins with "_" are skipped.
        """
        for path in sorted(folder.glob("*/*.py")):
            if path.stem.startswith("_"):  # also __init__.py
                continue
            family = path.parent.name
            summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
            self.add(Entry(path.stem.replace("_", "-"), f"{package}.{family}.{path.stem}", family, summary.rstrip(".")))

    def add(self, entry: Entry) -> None:
        """Add an entry whose module registers its object when imported. Refuses bad and duplicate names."""
        if not _NAME.fullmatch(entry.name):
            raise ConfigError(
                f"{entry.name!r} can't name a {self.kind}: use lower-case letters, digits and single hyphens."
            )
        with self._lock:
            if entry.name in self._entries and self._entries[entry.name] != entry:
                raise ConfigError(
                    f"Two {self.kind}s are named {entry.name!r}: {self._entries[entry.name].module} and {entry.module}."
                )
            self._entries[entry.name] = entry

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator for the object itself; `name` must be the one its file gives, where the file was discovered."""

        def keep(item: T) -> T:
            module = getattr(item, "__module__", "")
            known = self._entries.get(name)
            if known is None:
                self.add(Entry(name, module, "", (getattr(item, "__doc__", "") or "").split("\n")[0]))
            elif known.module != module:
                raise ConfigError(f"{module} registers {self.kind} {name!r}, which belongs to {known.module}.")
            self._objects[name] = item
            return item

        return keep

    def _read_outside(self) -> None:
        with self._lock:
            if self._outside_read:
                return
            for point in importlib.metadata.entry_points(group=self._entry_points):
                self.add(Entry(point.name, point.value.split(":")[0], "plugin"))
            self._outside_read = True  # only now: a bad name is refused every time, not just the first

    def get(self, name: str) -> T:
        """The object registered under `name`; imports its module on first use.

        Raises:
            UnknownNameError: No such name; the message carries near matches.
        """
        entry = self.entry(name)
        with self._lock:
            if name not in self._objects:
                importlib.import_module(entry.module)
        if name not in self._objects:
            raise ConfigError(f"{entry.module} doesn't register a {self.kind} named {name!r}.")
        return self._objects[name]

    def entry(self, name: str) -> Entry:
        """Where `name` lives, without importing it."""
        self._read_outside()
        if name not in self._entries:
            hint = f"Run 'adaptkit list {self.kind}s' to see all {len(self._entries)}."
            raise UnknownNameError.for_name(self.kind, name, self._entries, hint)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._read_outside()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._read_outside()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._read_outside()
        return len(self._entries)
