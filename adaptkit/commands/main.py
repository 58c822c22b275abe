"""The `adaptkit` command group: finds its verbs lazily and turns our errors into one sentence and exit code 2."""

from __future__ import annotations

import difflib
import importlib
import os
from typing import IO, Any

import click

from adaptkit import __version__
from adaptkit.errors import AdaptKitError, TrainingError

_VERBS = {
    "run": "run one method on one task",
    "compare": "many methods on one task, ranked",
    "sweep": "many runs from a YAML suite",
    "report": "tables, plots and one HTML page from results",
    "predict": "class names and probabilities for images",
    "export": "an adapter as a model that runs without adaptkit",
    "serve": "adapters behind HTTP",
    "push": "an adapter to the Hugging Face Hub",
    "studio": "a page in which a classifier is made without code",
    "import": "a reference checkpoint as an adapter",
    "explain": "the words nearest to learned prompts",
    "list": "methods, datasets, backbones or recipes",
    "data": "what is there, what is missing, what to do",
    "features": "files of features: write one, look at one",
    "describe": "let a language model describe classes",
    "doctor": "versions, device, caches, data roots",
}
_ALONE = ("compare", "sweep")  # each of several processes would do all of it
_MODULES = {"import": "import_"}  # Python keeps the word for itself


class BadInput(click.ClickException):
    """An error of ours, shown as one sentence; 2 for wrong use or bad input, 1 for a run that failed."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance as well

    def show(self, file: IO[Any] | None = None) -> None:
        if os.environ.get("RANK", "0") == "0":  # of several processes of one run, the first speaks
            super().show(file)


class LazyGroup(click.Group):
    """Verbs live in the module of their name and are imported when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module = importlib.import_module(f"adaptkit.commands.{_MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = module.command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in _VERBS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], _VERBS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" There are: {', '.join(_VERBS)}."
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        if args and args[0] in _ALONE and os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
            raise click.UsageError(
                f"Several processes can share a run, not {args[0]!r}: start it without torchrun.", ctx
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TrainingError as error:
            raise BadInput(str(error), exit_code=1) from error
        except AdaptKitError as error:
            raise BadInput(str(error), exit_code=2) from error
        except OSError as error:
            if error.filename is None:  # nothing a user named: a bug of ours, or a closed pipe
                raise
            raise BadInput(f"{error.filename} can't be used: {error.strerror or error}.", exit_code=2) from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="adaptkit")
def main() -> None:
    """Adapt a frozen vision-language model to your own classes from a handful of images.

    \b
    Examples:
      adaptkit compare my_photos --shots 4          which method for my images?
      adaptkit run --method coop --dataset digits   one method on one task
      adaptkit predict runs/first/best photo.png    class names and probabilities
    """
