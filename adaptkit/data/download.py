"""Files from the web: fetched in pieces that can be resumed, verified by checksum, unpacked safely."""

from __future__ import annotations

import hashlib
import os
import shutil
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from adaptkit import __version__
from adaptkit.errors import StorageError
from adaptkit.storage import extract_archive
from adaptkit.types import ProgressCallback

_CHUNK = 2**20
_TIMEOUT = 60  # seconds without a byte
_TRIES = 3
_NOTHING_LEFT = 416  # the server's answer to a range that starts where the file ends


def fetch(
    url: str, target: str | Path, *, md5: str = "", sha256: str = "", progress: ProgressCallback | None = None
) -> Path:
    """Download a file; what an interrupted call left in `<target>.part` is gone on with.

    Args:
        url: An http or https address.
        target: Where it goes; a file that is there already is only verified.
        md5: Checksum it must have, "" for none.
        sha256: The same.
        progress: Called as (what, MiB done, MiB in all).

    Raises:
        StorageError: The server can't be reached or refuses, the file is cut off or has another checksum (it is then
            removed), or the disk is full.
    """
    target = Path(target)
    if not url.startswith(("http://", "https://")):
        raise StorageError(f"{url} isn't an http or https address.")
    if target.is_file():
        return verify(target, md5=md5, sha256=sha256)
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(_TRIES):
        try:
            _go_on(url, part, progress)
            break
        except urllib.error.HTTPError as error:
            raise StorageError(f"{url} answers {error.code} ({error.reason}).") from error
        except (OSError, HTTPException) as error:
            if isinstance(error, StorageError) or attempt == _TRIES - 1:
                reason = getattr(error, "reason", None) or error
                raise StorageError(f"{url} can't be fetched: {reason}; run the command again to go on.") from error
    verify(part, md5=md5, sha256=sha256)
    os.replace(part, target)
    return target


def _go_on(url: str, part: Path, progress: ProgressCallback | None) -> None:
    """Fetch what `part` lacks."""
    have = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": f"adaptkit/{__version__}"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == _NOTHING_LEFT:
            return  # whole already, which the checksum tells
        raise
    with answer:
        if have and answer.status != 206:  # the server knows no ranges: from the start
            have = 0
        length = int(answer.headers.get("Content-Length") or 0)
        if length > shutil.disk_usage(part.parent).free:
            raise StorageError(f"the disk of {part.parent} has no room for {length:,} more bytes")
        total = have + length
        with open(part, "ab" if have else "wb") as file:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                if progress:
                    progress(f"downloading {part.name.removesuffix('.part')} (MiB)", have >> 20, total >> 20)
    if length and have < total:
        raise ConnectionError(f"the connection ended after {have:,} of {total:,} bytes")


def verify(path: Path, *, md5: str = "", sha256: str = "") -> Path:
    """Check a file's checksums; one with another is removed, so that it is fetched afresh.

    Raises:
        StorageError: It has another checksum.
    """
    for kind, wanted in (("md5", md5), ("sha256", sha256)):
        if not wanted:
            continue
        digest = hashlib.new(kind, usedforsecurity=False)
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != wanted:
            path.unlink()
            raise StorageError(
                f"{path.name.removesuffix('.part')} has the {kind} {digest.hexdigest()}, and {wanted} was expected: it"
                " was damaged on the way, or changed where it comes from. It was removed."
            )
    return path


def unpack_into(archive: Path, folder: Path, *, inner: str = "", progress: ProgressCallback | None = None) -> None:
    """Unpack an archive into a folder that may hold files; what is there already stays as it is.

    Args:
        archive: A zip or tar.
        folder: Where its members go.
        inner: An archive inside it; only what that holds is wanted.
        progress: Called as (what, files done, files in all).

    Raises:
        StorageError: The archive is damaged or hostile; nothing is left behind then.
    """
    staging = archive.with_name(f".{archive.name}.unpacked")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        extract_archive(archive, staging / "outer", progress=progress)
        wanted = staging / "outer"
        if inner:
            extract_archive(staging / "outer" / inner, staging / "inner", progress=progress)
            wanted = staging / "inner"
        _move_into(wanted, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_into(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for entry in sorted(source.iterdir()):
        target = folder / entry.name
        if not os.path.lexists(target):
            os.replace(entry, target)
        elif entry.is_dir() and target.is_dir():
            _move_into(entry, target)
