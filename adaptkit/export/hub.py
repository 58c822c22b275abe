"""Adapters on the Hugging Face Hub: pushed with a card made from facts, fetched by name and revision.

What is fetched is what an adapter folder consists of, three files of safetensors, JSON and text: no code comes along.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from adaptkit import __version__
from adaptkit.errors import AdapterError, AdaptKitError, ConfigError, StorageError
from adaptkit.export.card import model_card
from adaptkit.methods.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, read_adapter_config
from adaptkit.storage import read_json, read_safetensors, write_json

PREFIX = "hf-hub:"
CARD_FILE = "README.md"
_FILES = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE)
_SENT = (WEIGHTS_FILE, CONFIG_FILE)
_LOGIN = "log in with 'hf auth login', or set HF_TOKEN to a token that may write"


@dataclass(frozen=True)
class Pushed:
    """An adapter on the Hub.

    Args:
        url: Its page.
        commit: The commit that holds it.
        name: What `adaptkit.load` takes to get these very files again.
    """

    url: str
    commit: str
    name: str


def push(folder: str | Path, repo: str, *, private: bool = False, licence: str | None = None) -> Pushed:
    """Send an adapter to the Hub, in one commit; the repository is made where there is none.

    The card says what is known of the adapter; of a run, with the figures of its `result.json`. Of a dataset or
    backbone that is a path only the last part is sent, and no files but the adapter's own. Who you are is
    huggingface_hub's matter (`hf auth login`, HF_TOKEN).

    Args:
        folder: Adapter folder.
        repo: "user/name".
        private: Whether a new repository is hidden from others.
        licence: Of the adapter, as the Hub calls it ("apache-2.0"); None states none.

    Raises:
        ConfigError: Not a repository's name, or the Hub doesn't let you in.
        AdapterError: The folder is damaged.
        StorageError: The Hub can't be reached.
    """
    from huggingface_hub import HfApi

    check_repo(repo)
    with tempfile.TemporaryDirectory() as place:
        building = Path(place)
        prepare(folder, building, licence)
        with _hub_errors(repo):
            api = HfApi(library_name="adaptkit", library_version=__version__)
            api.create_repo(repo, private=private, exist_ok=True)
            info = api.upload_folder(
                repo_id=repo,
                folder_path=building,
                commit_message=f"adaptkit {__version__}",
                delete_patterns=[f"*/{name}" for name in _SENT],  # peft's layout of an adapter that was there before
            )
        return Pushed(f"{api.endpoint}/{repo}", info.oid, f"{PREFIX}{repo}@{info.oid}")


def prepare(folder: str | Path, building: Path, licence: str | None = None) -> None:
    """Write what a push sends into an empty folder.

    Raises:
        AdapterError: The adapter is damaged.
    """
    config = read_adapter_config(folder)
    try:
        read_safetensors(Path(folder) / WEIGHTS_FILE)
    except (StorageError, FileNotFoundError) as error:
        raise AdapterError(f"{Path(folder) / WEIGHTS_FILE} can't be read ({error}): save the adapter again.") from error
    for path in Path(folder).rglob("*"):  # peft's layout lies in a folder of its own, under the same names
        if path.name in _SENT and path.is_file() and not path.is_symlink():
            target = building / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    content = read_json(building / CONFIG_FILE)
    config = _without_paths(config)
    write_json(building / CONFIG_FILE, {**content, "facts": config.facts, "backbone": config.backbone})
    (building / CARD_FILE).write_text(model_card(folder, config, licence), encoding="utf-8")


def _without_paths(config: AdapterConfig) -> AdapterConfig:
    """The same without folders of this machine, of which only the last part is told."""
    facts, name = dict(config.facts), str(config.backbone["name"])
    if isinstance(facts.get("dataset"), str):
        facts["dataset"] = Path(facts["dataset"]).name
    scheme, colon, rest = name.partition(":")
    place = Path(rest).expanduser()
    if colon and (scheme == "local-dir" or rest.startswith((".", "~")) or place.is_absolute() or place.is_dir()):
        name = f"{scheme}:{place.name}"
    return replace(config, facts=facts, backbone={**config.backbone, "name": name})


def is_on_hub(source: str | Path) -> bool:
    """Whether something names an adapter on the Hub."""
    return str(source).startswith(PREFIX)


def fetch(source: str | Path) -> Path:
    """The folder of an adapter on the Hub; what was fetched before isn't fetched again.

    Args:
        source: "hf-hub:user/name" or "hf-hub:user/name@revision"; a revision is a commit, a tag or a branch. Only a
            commit always means the same files.

    Raises:
        ConfigError: Not such a name.
        AdapterError: There is no such adapter or revision.
        StorageError: The Hub can't be reached.
    """
    from huggingface_hub import snapshot_download

    repo, at, revision = str(source).removeprefix(PREFIX).partition("@")
    check_repo(repo)
    if at and not revision:
        raise ConfigError(f"{source} names no revision: put a commit, a tag or a branch behind the @, or leave it out.")
    with _hub_errors(str(source)):
        found = snapshot_download(
            repo,
            revision=revision or None,
            allow_patterns=list(_FILES),
            library_name="adaptkit",
            library_version=__version__,
        )
    return Path(found)


def check_repo(repo: str) -> None:
    """Refuse what can't name a repository on the Hub.

    Raises:
        ConfigError: It isn't user/name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined,unused-ignore]

    try:
        validate_repo_id(repo)
        valid = repo.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ConfigError(f"{repo!r} isn't the name of a repository on the Hub: write user/name.")


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """What goes wrong with the Hub, in one sentence."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except AdaptKitError:
        raise
    except RevisionNotFoundError as error:
        raise AdapterError(f"{what} can't be had: the repository has no such revision.") from error
    except RepositoryNotFoundError as error:
        raise AdapterError(
            f"{what} can't be had: there is no such repository, or you may not see it ({_LOGIN})."
        ) from error
    except LocalTokenNotFoundError as error:
        raise ConfigError(f"The Hub doesn't know you: {_LOGIN}.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise ConfigError(f"The Hub refuses {what} ({status}): {_LOGIN}.") from error
        raise StorageError(f"The Hub can't serve {what} (status {status}): try again later.") from error
    except Exception as error:  # of whichever client library huggingface_hub uses
        reason = str(error).split("\n")[0][:200]
        raise StorageError(f"The Hub can't be reached for {what} ({type(error).__name__}: {reason}).") from error
