"""The errors adaptkit raises: one base, and kinds that are also familiar built-ins.

Every message says what was wrong, what is accepted and what to do, in one or two sentences. The command line prints
the message and exits with code 2; a traceback there is always a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdaptKitError(Exception):
    """Base of every error that a user's input or surroundings can cause."""


class UnknownNameError(AdaptKitError, LookupError):
    """A name that no registry knows (a `LookupError`, not a `KeyError`, which prints its message in quotes)."""

    @classmethod
    def for_name(cls, kind: str, name: str, known: Iterable[str], hint: str = "") -> UnknownNameError:
        """Build the error for an unknown `name` of some `kind` ("method", "dataset", …).

        Args:
            kind: What the name should have been, in the singular.
            name: The name as given.
            known: Every name that would have been accepted.
            hint: What else to do; a full sentence.
        """
        known = sorted(known)
        near = difflib.get_close_matches(str(name).lower(), known, n=3, cutoff=0.6)
        parts = [f"Unknown {kind} {name!r}."]
        if near:
            parts.append(f"Did you mean {' or '.join(repr(match) for match in near)}?")
        elif 0 < len(known) <= 12:
            parts.append(f"Known: {', '.join(known)}.")
        if hint:
            parts.append(hint)
        return cls(" ".join(parts))


class ConfigError(AdaptKitError, ValueError):
    """A setting, recipe or option with a value that isn't accepted."""


class DataError(AdaptKitError, ValueError):
    """A dataset, split or image that can't be used as it is."""


class MissingPathError(DataError, FileNotFoundError):
    """A file or folder that isn't there."""

    def __str__(self) -> str:  # FileNotFoundError would print an errno tuple
        return str(self.args[0]) if self.args else ""


class BackboneError(AdaptKitError, ValueError):
    """A backbone that can't be loaded, or can't do what a method needs."""


class AdapterError(AdaptKitError, ValueError):
    """An adapter on disk that is damaged, unsafe, or made for something else."""


class StorageError(AdaptKitError, OSError):
    """A folder that can't be written, a full disk, a damaged stored file."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class TrainingError(AdaptKitError, RuntimeError):
    """Training that can't go on (for one: a loss that isn't finite)."""


class UnsupportedError(AdaptKitError, TypeError):
    """A combination that isn't defined, such as novel classes for a method with one weight per class."""


class AdaptKitWarning(UserWarning):
    """Something a user should know that doesn't stop the work (counted and kept in the result where there is one)."""
