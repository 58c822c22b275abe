"""`adaptkit push`: an adapter to the Hugging Face Hub, with a card made from facts."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options, _runs
from adaptkit.errors import ConfigError


@click.command("push", short_help="an adapter to the Hugging Face Hub")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("repo", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Hide a new repository from others.")
@click.option("--licence", help="Of the adapter, as the Hub calls it (apache-2.0); none is stated otherwise.")
@click.option("--dry-run", is_flag=True, help="Show the card that would be sent, and send nothing.")
@_options.json_option
def command(adapter: Path, repo: str, private: bool, licence: str | None, dry_run: bool, as_json: bool) -> None:
    """Send an adapter (an adapter folder or the folder of a run) to the Hub, and say by which name it is loaded.

    The card is made from what was recorded: data, shots, figures with intervals, settings, hardware, seconds. Log in
    with 'hf auth login', or set HF_TOKEN.

    \b
    Example:
      adaptkit push runs/first/best my-name/my-adapter --dry-run
    """
    from adaptkit.export.hub import check_repo, is_on_hub, prepare, push

    if is_on_hub(adapter):
        raise ConfigError(f"{adapter} is on the Hub already: give an adapter folder of this machine.")
    check_repo(repo)
    folder = _runs.adapter_folder(adapter)
    if dry_run:
        with tempfile.TemporaryDirectory() as place:
            prepare(folder, Path(place), licence)
            files = sorted(str(path.relative_to(place)) for path in Path(place).rglob("*") if path.is_file())
            card = (Path(place) / "README.md").read_text(encoding="utf-8")
        if as_json:
            console.print_json({"repo": repo, "files": files, "card": card})
        else:
            click.echo(card, nl=False)
        return
    sent = push(folder, repo, private=private, licence=licence)
    if as_json:
        console.print_json(asdict(sent))
    else:
        console.say(f"Sent to {sent.url}. These very files are loaded by: adaptkit.load({sent.name!r})")
