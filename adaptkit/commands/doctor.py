"""`adaptkit doctor`: versions, device, caches, data roots."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from typing import Any

import click

from adaptkit import __version__
from adaptkit.commands import _console as console
from adaptkit.commands import _options

_REQUIRED = (
    "torch",
    "torchvision",
    "open_clip_torch",
    "transformers",
    "safetensors",
    "scikit-learn",
    "numpy",
    "pillow",
    "matplotlib",
)
_OPTIONAL = ("peft", "bitsandbytes", "sentencepiece")


@click.command("doctor", short_help="versions, device, caches, data roots")
@_options.json_option
def command(as_json: bool) -> None:
    """Say what adaptkit finds on this machine, and what is missing.

    \b
    Example:
      adaptkit doctor
    """
    facts, problems = examine()
    if as_json:
        console.print_json({**facts, "problems": problems})
    else:
        console.print_facts("adaptkit doctor", {k: _shown(v) for k, v in facts.items()})
        console.say("\n".join(f"problem: {problem}" for problem in problems) or "Everything needed is there.")
    if problems:
        raise SystemExit(1)


def _shown(value: Any) -> str:
    return "\n".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)


def examine() -> tuple[dict[str, Any], list[str]]:
    """Facts about the machine, and sentences on what is wrong."""
    from adaptkit.storage import cache_dir

    problems = []
    versions = {name: _version(name) for name in (*_REQUIRED, *_OPTIONAL)}
    problems += [f"{name} is not installed: pip install {name}." for name in _REQUIRED if not versions[name]]
    facts: dict[str, Any] = {
        "adaptkit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version or "not installed" for name, version in versions.items()},
    }
    if versions["torch"]:
        import torch

        cuda = torch.cuda.is_available()
        facts["device"] = torch.cuda.get_device_name(0) if cuda else f"cpu, {torch.get_num_threads()} threads"
    cache = cache_dir()
    existing = next((folder for folder in (cache, *cache.parents) if folder.is_dir()), None)
    writable = existing is not None and os.access(existing, os.W_OK)
    if not writable:
        problems.append(f"The cache folder {cache} can't be written: set ADAPTKIT_CACHE to another folder.")
    free = f"{shutil.disk_usage(existing).free / 2**30:.0f} GiB free" if existing else "missing"
    facts["cache"] = f"{cache} ({free}{'' if writable else ', not writable'})"
    root = os.environ.get("ADAPTKIT_DATA_ROOT", "")
    facts["data root"] = root or "not set (ADAPTKIT_DATA_ROOT)"
    if root and not os.path.isdir(root):
        problems.append(f"ADAPTKIT_DATA_ROOT is {root!r}, which isn't a folder.")
    return facts, problems


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
