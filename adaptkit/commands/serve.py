"""`adaptkit serve`: adapters behind HTTP."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options, _runs
from adaptkit.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from adaptkit.serving.limits import Limits

TOKEN_VARIABLE = "ADAPTKIT_SERVE_TOKEN"
_SHORTEST_TOKEN = 16
_NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


@click.command("serve", short_help="adapters behind HTTP")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every network.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="Name that requests may ask for beside localhost, such as that of a proxy on this machine.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help=f"File with the bearer token that requests must bring [default: ${TOKEN_VARIABLE}, or none].",
)
@click.option("--max-body", type=click.FloatRange(0, min_open=True), default=16, show_default=True, help="MiB.")
@click.option(
    "--max-pixels", type=click.IntRange(1), default=50_000_000, show_default=True, help="Of an image, decoded."
)
@click.option("--max-images", type=click.IntRange(1), default=16, show_default=True, help="In a request.")
@click.option(
    "--max-requests", type=click.IntRange(1), default=64, show_default=True, help="Predictions worked on at once."
)
@click.option("--max-waiting", type=click.IntRange(1), default=256, show_default=True, help="Images inside at once.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=30,
    show_default=True,
    help="Seconds for a request's head to arrive, again for its body, and again to be answered.",
)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Images encoded at once.")
@click.option("--backbone", help="Where the adapters' backbone lies now; it must be the same one.")
@_options.device_option
@_options.json_option
def command(
    adapters: tuple[str, ...],
    host: str,
    port: int,
    allow_host: tuple[str, ...],
    token_file: Path | None,
    max_body: float,
    max_pixels: int,
    max_images: int,
    max_requests: int,
    max_waiting: int,
    timeout: float,
    batch_size: int,
    backbone: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Answer images over HTTP with adapters of one backbone, until Ctrl-C or SIGTERM.

    ADAPTER is an adapter folder, the folder of a run, a folder that holds such, or hf-hub:user/name@revision;
    NAME=ADAPTER gives another name.

    \b
    POST /predict?adapter=NAME&top=5   image files (field "images"), or {"images": [base64, …]}
    GET /adapters, /adapters/NAME      what there is, with the cards
    GET /health, /metrics, /openapi.json

    Requests that come together are encoded together. Only the adapters found at the start are served.

    \b
    Example:
      adaptkit serve runs/first/best
      curl -F images=@photo.png 'http://127.0.0.1:8000/predict?top=3'
    """
    check_installed()
    from adaptkit.serving.limits import Limits

    token = read_token(token_file, os.environ)
    limits = Limits(
        body_bytes=int(max_body * 2**20),
        pixels=max_pixels,
        images=max_images,
        seconds=timeout,
        requests=max_requests,
        waiting=max_waiting,
        batch=batch_size,
    )
    _serve(find_adapters(adapters), host, port, allow_host, token, limits, backbone, device, as_json)


def _serve(
    folders: Mapping[str, Path],
    host: str,
    port: int,
    allowed: Sequence[str],
    token: str | None,
    limits: Limits,
    backbone: str | None,
    device: str,
    as_json: bool,
) -> None:
    from adaptkit.backbones.load import load_backbone
    from adaptkit.serving.app import create_app
    from adaptkit.serving.hosts import LOCAL
    from adaptkit.serving.server import bind, is_local, serve, url
    from adaptkit.serving.shelf import Shelf

    bound = bind(host, port)  # a taken port is known before the backbone is loaded
    try:
        given = None if backbone is None else load_backbone(backbone, device=device)
        shelf = Shelf(folders, given, device=device)
        hosts = {*LOCAL, host.lower(), *map(str.lower, allowed)} if is_local(bound) else None
        app = create_app(shelf, limits, token=token, hosts=hosts)
    except BaseException:
        bound.close()
        raise

    def ready() -> None:
        facts: dict[str, Any] = {"url": url(bound), "adapters": sorted(folders), "token": token is not None}
        if as_json:
            console.print_json({**facts, "backbone": shelf.backbone.spec.name, "local": is_local(bound)})
        else:
            for line in _announcement(facts, is_local(bound)):
                console.say(line)

    serve(app, bound, limits, ready)


def _announcement(facts: Mapping[str, Any], local: bool) -> list[str]:
    lines = [f"Serving {', '.join(facts['adapters'])} on {facts['url']} (Ctrl-C stops it)."]
    if local:
        return [*lines, "Only this machine can reach it; --host opens it to others."]
    if facts["token"]:
        return [*lines, "Other machines can reach it with the token. The connection isn't encrypted."]
    return [*lines, f"warning: every machine that reaches it can ask it; a token keeps others out (${TOKEN_VARIABLE})."]


def check_installed() -> None:
    """Refuse to serve without the packages for it.

    Raises:
        UnsupportedError: Some are missing.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"Serving needs {', '.join(missing)}: pip install 'adaptkit[serve]'.")


def read_token(path: Path | None, environment: Mapping[str, str]) -> str | None:
    """The token from a file or the environment; never from an argument, which other users of the machine can see.

    Raises:
        ConfigError: The file can't be read, or the token can't be used.
    """
    if path is None:
        token, where = environment.get(TOKEN_VARIABLE), f"${TOKEN_VARIABLE}"
        if token is None:
            return None
    else:
        where = str(path)
        try:
            with path.open(encoding="ascii") as file:
                token = file.read(4096)
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"The token can't be read from {where}: {error}.") from error
    token = token.strip()
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"The token in {where} can't be used: at least {_SHORTEST_TOKEN} letters, digits and signs without blanks"
            " are needed, such as those of: openssl rand -hex 32."
        )
    return token


def find_adapters(words: Sequence[str]) -> dict[str, Path]:
    """Adapter folders by name, of the words of the command line.

    Raises:
        ConfigError: A folder without adapters, or two adapters of one name; one message names them all.
    """
    found: dict[str, Path] = {}
    problems = []
    for word in words:
        given, _, rest = word.partition("=")
        named = bool(rest) and "/" not in given and not Path(word).exists()
        path = Path(rest if named else word)
        folders = [path] if _is_adapter(path) else _inside(path)
        if not folders:
            problems.append(f"{path} is no adapter folder, and holds none: give what 'adaptkit run' wrote.")
        if named and len(folders) > 1:
            problems.append(f"{path} holds {len(folders)} adapters, and {given!r} can name only one.")
        for folder in folders:
            name = given if named else _own_name(folder)
            if name in found:
                problems.append(f"{found[name]} and {folder} are both called {name!r}: write NAME={folder}.")
            found[name] = _runs.adapter_folder(folder)
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def _is_adapter(path: Path) -> bool:
    return (_runs.adapter_folder(path) / "adapter_config.json").is_file()


def _inside(path: Path) -> list[Path]:
    return sorted(below for below in path.iterdir() if _is_adapter(below)) if path.is_dir() else []


def _own_name(folder: Path) -> str:
    """The folder's own name; that of the run where it is called "adapter", and without the revision on the Hub."""
    from adaptkit.export.hub import is_on_hub

    if is_on_hub(folder):
        return folder.name.partition("@")[0]
    whole = Path(os.path.abspath(folder))  # the best run of a comparison is a link with a name of its own
    return whole.parent.name if whole.name == "adapter" else whole.name
