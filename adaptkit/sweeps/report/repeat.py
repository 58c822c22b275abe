"""The command that repeats a run, from what its result holds."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from adaptkit.config import from_mapping
from adaptkit.errors import ConfigError
from adaptkit.evaluation.results import RunResult
from adaptkit.evaluation.tasks import TaskSpec
from adaptkit.sweeps.report.aggregate import is_embedded, overridden

_OPTIONS = {"templates": "--template"}
"""Options that aren't called like their field of the spec."""

_REPEATED = ("templates",)
"""Fields whose option is given once per value; other lists are one text with commas."""


def spec_of(result: RunResult) -> TaskSpec | None:
    """What was asked for; None where the run was made in Python, without a spec, on data of the user's own."""
    asked = result.dataset.get("asked")
    if asked is not None:
        try:
            return from_mapping(TaskSpec, asked, where="asked")
        except ConfigError:  # written by another version, or changed by hand
            return None
    key = result.key
    if is_embedded(result):
        return TaskSpec(key.dataset, key.protocol, key.shots, key.seed, key.sampler)
    return None


def command_words(result: RunResult) -> list[str] | None:
    """`adaptkit run …`, word by word; None where the result doesn't say enough.

    The recipe is named and every setting of the user's own is repeated, so that later changes of which recipe is chosen
    don't change the run. Paths are given as they were then: relative ones hold in the folder of that time.
    """
    spec = spec_of(result)
    if spec is None:
        return None
    key = result.key
    words = ["adaptkit", "run", "--method", key.method, "--dataset", spec.dataset, "--backbone", key.backbone]
    words += ["--protocol", spec.protocol, "--shots", str(spec.shots), "--seed", str(spec.seed)]
    words += _task_words(spec)
    if key.settings.get("precision", "fp32") != "fp32":
        words += ["--precision", str(key.settings["precision"])]
    words += ["--recipe", result.recipe or "none"]
    for name, value in overridden(result).items():
        words += ["--set", f"{name}={_setting(value)}"]
    return words


def command_text(result: RunResult) -> str | None:
    """The command as one line for a POSIX shell."""
    words = command_words(result)
    return None if words is None else shlex.join(words)


def _task_words(spec: TaskSpec) -> Iterator[str]:
    """Options of everything that isn't left at its default, but for those that every command names."""
    named = {"dataset", "protocol", "shots", "seed"}
    for item in fields(spec):
        value = getattr(spec, item.name)
        if item.name in named or item.default is MISSING or value == item.default:
            continue
        option = option_of(item.name)
        if value is True:
            yield option
        elif item.name in _REPEATED:
            for single in value:
                yield from (option, str(single))
        else:
            yield from (option, ",".join(value) if isinstance(value, tuple) else str(value))


def option_of(name: str) -> str:
    """The option of `adaptkit run` for a field of the spec.

    Example:
        >>> option_of("data_root"), option_of("templates")
        ('--data-root', '--template')
    """
    return _OPTIONS.get(name, "--" + name.replace("_", "-"))


def _setting(value: Any) -> str:
    """A value as `--set` reads it back."""
    import json

    if value is None:
        return "null"
    return value if isinstance(value, str) else json.dumps(value)
