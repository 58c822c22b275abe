"""`adaptkit studio`: a page on this machine in which a classifier is made without code."""

from __future__ import annotations

import contextlib
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options
from adaptkit.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from adaptkit.studio.project import Project


@click.command("studio", short_help="a page in which a classifier is made without code")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("studio"))
@click.option("--images", type=click.Path(), help="Folder of images to start with; folders in it are classes.")
@click.option("--backbone", help=f"Of a new project: {_options._BACKBONES} [default: mini]")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0 takes a free one.")
@click.option("--no-browser", is_flag=True, help="Print the address without opening it.")
@_options.device_option
@_options.json_option
def command(
    folder: Path,
    images: str | None,
    backbone: str | None,
    port: int,
    no_browser: bool,
    device: str,
    as_json: bool,
) -> None:
    """Make a classifier on a page: name classes, drop images, correct guesses, see how good it is, save it.

    FOLDER keeps the work [default: studio]: a new folder, or one that the studio made. Every step is written at once,
    so ending it (Ctrl-C, or a power cut) loses nothing. The page is served on this machine to this machine only.

    \b
    Example:
      adaptkit studio birds --images ~/Pictures/birds
    """
    try:
        import uvicorn

        from adaptkit.studio.app import make_app
    except ImportError as error:
        raise UnsupportedError(
            f"The studio needs a package that isn't installed ({error.name}): pip install 'adaptkit[studio]'."
        ) from error

    from adaptkit.backbones.load import load_backbone
    from adaptkit.studio.pictures import find_images
    from adaptkit.studio.project import PROJECT_FILE, Project
    from adaptkit.studio.state import Settings
    from adaptkit.studio.workshop import Workshop

    if images is not None:
        find_images(images)  # before a project is made
    listening = listen(port)
    with contextlib.ExitStack() as stack:
        stack.callback(listening.close)
        if (folder.expanduser() / PROJECT_FILE).exists():
            project = Project(folder)
            stack.callback(project.close)
            model = load_backbone(check_backbone(project, backbone), device=device)
        else:  # a backbone that can't be loaded leaves no project behind
            model = load_backbone(backbone or "mini", device=device)
            project = Project(folder, Settings(backbone=backbone or "mini"))
            stack.callback(project.close)
        workshop = Workshop(project, model)
        if images is not None:
            workshop.take_folder(images, True)
        token, port = secrets.token_urlsafe(24), listening.getsockname()[1]
        address = f"http://127.0.0.1:{port}/?token={token}"
        if as_json:
            console.print_json({"url": address, "folder": str(project.folder)})
        else:
            console.say(f"The studio of {project.folder} is at\n  {address}\nEnd it with Ctrl-C; your work is saved.")
        if not no_browser:
            click.launch(address)
        config = uvicorn.Config(
            make_app(workshop, token, port), log_level="warning", access_log=False, timeout_graceful_shutdown=5
        )
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has ended in order, and passes Ctrl-C on
            uvicorn.Server(config).run(sockets=[listening])


def listen(port: int) -> socket.socket:
    """A socket on this machine's own address.

    Raises:
        ConfigError: The port is in use.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
        listening.listen(128)  # from now on, so that a browser that is quicker than the server waits for it
    except OSError as error:
        listening.close()
        raise ConfigError(f"Port {port} can't be used ({error.strerror}): give another, or --port 0.") from error
    return listening


def check_backbone(project: Project, given: str | None) -> str:
    """The project's backbone.

    Raises:
        ConfigError: Another one was given.
    """
    own = project.state.settings.backbone
    if given not in (None, own):
        raise ConfigError(
            f"This project was made with the backbone {own!r}, and --backbone says {given!r}: leave it out, or name a"
            " new folder."
        )
    return own
