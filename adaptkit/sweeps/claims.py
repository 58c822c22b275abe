"""Claims: who is doing which run, so that several processes, sweeps and machines can share one folder.

A claim is a locked file at OUT/claims/<digest>. The system gives the lock back when its holder dies, however it dies;
the file then still tells what the holder was doing. On a cluster the folder must lie where all machines see it, on a
file system with locks (NFS 4, Lustre, GPFS have them).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from adaptkit.storage import try_lock
from adaptkit.sweeps.plan import place_of

CLAIMS, JOBS = "claims", "jobs"
GROUP = "group-"
"""Begins the names of the locks that workers hold at the group of runs they are at."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Claim:
    """The right to do a run; from `take`.

    Args:
        out: The sweep's folder.
        digest: Of the run's key.
        handle: Of the locked file.
    """

    def __init__(self, out: Path, digest: str, handle: int) -> None:
        self.out, self.digest = out, digest
        self._handle = handle

    @classmethod
    def take(cls, out: Path, digest: str) -> Claim | None:
        """Claim a run; None where another process does it. What a dead one left half-made is removed.

        Raises:
            StorageError: The folder can't be written.
        """
        path = out / CLAIMS / digest
        handle = try_lock(path)
        if handle is None:
            return None
        claim = cls(out, digest, handle)
        if os.fstat(handle).st_size:  # its holder died
            claim.clean()
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()})
        with contextlib.suppress(OSError):  # on a full disk the lock counts all the same
            os.truncate(handle, 0)
            os.pwrite(handle, text.encode(), 0)
        return claim

    def clean(self) -> None:
        """Remove what an earlier holder left half-made beside the run's folder."""
        folder = (self.out / place_of(self.digest)).parent
        for path in folder.glob(f".{self.digest[:48]}.*.tmp"):
            shutil.rmtree(path, ignore_errors=True)

    def release(self) -> None:
        """Give the run free. The file goes before the lock does."""
        with contextlib.suppress(OSError):
            (self.out / CLAIMS / self.digest).unlink()
        os.close(self._handle)


def abandoned(out: Path) -> list[str]:
    """Digests of the runs whose holders died; what dead processes left is removed: claims, half-made folders, files."""
    found = []
    for path in [*(out / CLAIMS).glob(f"{GROUP}*"), *(out / JOBS).glob("*.json")]:
        handle = try_lock(path)
        if handle is not None:
            path.unlink(missing_ok=True)
            os.close(handle)
    for digest in _claimed(out):
        claim = _taken_over(out, digest)
        if claim is not None:
            claim.clean()
            claim.release()
            found.append(digest)
    return found


def _taken_over(out: Path, digest: str) -> Claim | None:
    """A claim that has no holder any more."""
    handle = try_lock(out / CLAIMS / digest)
    return None if handle is None else Claim(out, digest, handle)


def in_progress(out: Path) -> set[str]:
    """Digests of the runs that someone does right now."""
    found = set()
    for digest in _claimed(out):
        handle = try_lock(out / CLAIMS / digest)
        if handle is None:
            found.add(digest)
        else:
            os.close(handle)
    return found


def _claimed(out: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):
        yield from sorted(name for name in os.listdir(out / CLAIMS) if _DIGEST.fullmatch(name))
