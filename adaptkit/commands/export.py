"""`adaptkit export`: an adapter in another library's layout."""

from __future__ import annotations

from pathlib import Path

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options, _runs
from adaptkit.errors import ConfigError


@click.command("export", short_help="an adapter in another library's layout")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--merge", is_flag=True, help="Add what was learned to the towers' weights: an open_clip checkpoint.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--backbone", help="Where the adapter's backbone lies now; it must be the same one.")
@click.option("--overwrite", is_flag=True, help="Replace what is in --out.")
@_options.device_option
@_options.json_option
def command(
    adapter: Path, merge: bool, out: Path, backbone: str | None, overwrite: bool, device: str, as_json: bool
) -> None:
    """Write an adapter (an adapter folder or the folder of a run) for use without adaptkit.

    --merge is for methods that learn inside the towers (clip-lora, peft); the checkpoint loads in open_clip, and here
    as --backbone local-dir:FOLDER.

    \b
    Example:
      adaptkit export runs/first/best --merge --out merged
    """
    from adaptkit.export.merge import can_do, check_mergeable, merge_adapter
    from adaptkit.methods import methods
    from adaptkit.methods.adapter import load_adapter, read_adapter_config

    folder = _runs.adapter_folder(adapter)
    method = methods.get(read_adapter_config(folder).method)
    if not merge:
        raise ConfigError(f"Say what to write. {can_do(method)}")
    check_mergeable(method)  # before the backbone is loaded
    (_runs.check_writable if overwrite else _runs.check_out)(out)

    from adaptkit.backbones.load import load_backbone

    given = None if backbone is None else load_backbone(backbone, device=device)
    model = load_adapter(folder, given, device=device)
    merge_adapter(model, out, overwrite=overwrite)
    if as_json:
        files = sorted(path.name for path in out.iterdir())
        console.print_json({"folder": str(out), "adapter": str(folder), "method": method.name, "files": files})
        return
    console.say(f"Written to {out}; load it with: --backbone local-dir:{out}")


def _mergeable() -> str:
    return "clip-lora and peft"
