"""Files: written whole or not at all, read with their sizes checked first, named through one checked function.

Nothing here unpickles, follows a name out of its folder, or allocates what a file merely claims to hold. torch is
imported on first use of tensors.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import lzma
import math
import os
import re
import secrets
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from adaptkit.errors import AdaptKitError, MissingPathError, StorageError
from adaptkit.types import ProgressCallback

if TYPE_CHECKING:
    import torch

_CHUNK = 2**20
_MOST_PADDING = 16  # chunks read behind the last member of a tar
_MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors library itself
_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_NUMPY_NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "float16": "F16", "int32": "I32",
    "uint32": "U32", "float32": "F32", "int64": "I64", "uint64": "U64", "float64": "F64",
}  # fmt: skip
_TORCH_NAMES = {f"torch.{name}": code for name, code in _NUMPY_NAMES.items()} | {"torch.bfloat16": "BF16"}
_REASONS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "your disk quota is used up: free some space",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission is denied: change its permissions, or choose another place",
    errno.EPERM: "permission is denied: change its permissions, or choose another place",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EFBIG: "the file is too large for this file system",
}
_BUILDING: set[Path] = set()  # folders that `new_folder` is making in this process
_DRIVE = re.compile(r"^[A-Za-z]:")


# --- writing -------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name next to `path`, which takes the name `path` when the block ends without an error.

    Whoever looks at `path` sees the old content or the new, never a part. After an error nothing is left behind.

    Args:
        path: The file to be; missing folders on the way are made.

    Raises:
        StorageError: The disk is full, read-only, or may not be written.

    Example:
        >>> with atomic_path(tmp_path / "notes.txt") as temporary:  # doctest: +SKIP
        ...     temporary.write_text("whole or not at all")
    """
    path = Path(path)
    temporary = _temporary_name(path)
    with _storage_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            whole = any(path.is_relative_to(folder) for folder in _BUILDING)  # `new_folder` syncs everything at its end
            if not whole:
                _sync(temporary)
            os.replace(temporary, path)
            if not whole:
                _sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder, which becomes `path` when the block ends without an error.

    Args:
        path: The folder to be. It must not exist, or be empty, unless `overwrite`.
        overwrite: Replace an existing folder, as a whole.

    Raises:
        StorageError: `path` is a file, isn't empty, or can't be written.
    """
    path = Path(os.path.realpath(path))
    _check_replaceable(path, overwrite)
    building = _temporary_name(path)
    with _storage_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            building.mkdir()
            _BUILDING.add(building)
            yield building
            _sync_below(building)
            _check_replaceable(path, overwrite)  # someone else may have finished first
            _swap_folder(building, path)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        finally:
            _BUILDING.discard(building)


def _check_replaceable(path: Path, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise StorageError(f"{path} is a file, and a folder is to be written there: choose another name.")
    used = [Path(os.path.realpath(folder)) for folder in (Path.cwd(), os.path.expanduser("~"))]
    if overwrite and any(folder.is_relative_to(path) for folder in used):
        raise StorageError(f"{path} is not overwritten, because you work or live in it: choose another folder.")
    with _storage_errors(path):
        if not overwrite and any(path.iterdir()):
            raise StorageError(f"{path} exists and isn't empty: choose another folder, or ask to overwrite it.")


def _swap_folder(building: Path, path: Path) -> None:
    if not path.exists():
        os.rename(building, path)
    elif not any(path.iterdir()):
        path.rmdir()
        os.rename(building, path)
    else:
        old = _temporary_name(path)
        os.rename(path, old)
        try:
            os.rename(building, path)
        except BaseException:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync_folder(path.parent)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, atomically. NaN and infinities are refused: other readers don't accept them.

    Raises:
        StorageError: `content` isn't plain data, holds a number that isn't finite, or the file can't be written.
    """
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        if not _is_utf8(text):  # names of files that aren't UTF-8 hold lone surrogates: written as \udc80
            text = json.dumps(content, indent=2, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} can't be written as JSON: {error}.") from error
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json(path: str | Path, max_bytes: int = 256 * 2**20) -> Any:
    """Read JSON of at most `max_bytes`.

    Raises:
        MissingPathError: No such file.
        StorageError: Too large, not UTF-8, not JSON, or with NaN or infinities.
    """
    path = Path(path)
    _existing_size(path, max_bytes)
    try:
        with _storage_errors(path, "read"):
            text = path.read_text(encoding="utf-8")
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise StorageError(f"{path} isn't valid JSON (line {error.lineno}: {error.msg}).") from error
    except UnicodeDecodeError as error:
        raise StorageError(f"{path} isn't UTF-8 text (byte {error.start}).") from error
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} can't be read as JSON: {error}.") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which JSON doesn't know")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {text:.40}, which is too large a number")
    return number


# --- tensors -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file: dtype code ("F32"), shape, and byte range from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def write_safetensors(path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write torch tensors or NumPy arrays by name, atomically; the safetensors library reads the file too.

    Raises:
        StorageError: A dtype the format doesn't know, a tensor named "__metadata__", metadata that isn't text, or the
            file can't be written.
    """
    if "__metadata__" in tensors:
        raise StorageError("A tensor is named '__metadata__', which the format keeps for itself: rename it.")
    if not all(isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
        raise StorageError("The metadata of a safetensors file must be texts by name: convert the values first.")
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    raw = {name: _raw(name, tensors[name]) for name in tensors}
    order = sorted(raw, key=lambda name: (-_DTYPE_BYTES[raw[name][0]], name))  # wide types first, so all lie aligned
    for name in order:
        dtype, shape, content = raw[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + content.nbytes]}
        offset += content.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(raw[name][2].data)


def read_safetensors_header(
    path: str | Path, max_bytes: int = 8 * 2**30
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """What a safetensors file holds, checked against its size; allocates nothing but the header.

    Returns:
        The tensors' places by name, and the file's metadata.

    Raises:
        MissingPathError: No such file.
        StorageError: The file is larger than `max_bytes`, cut off, or its header is damaged or hostile.
    """
    path = Path(path)
    size = _existing_size(path, max_bytes)
    with _storage_errors(path, "read"), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise StorageError(f"{path} isn't a safetensors file, or is cut off.")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} has a damaged header ({error}).") from error
    if not isinstance(header, dict):
        raise StorageError(f"{path} has a damaged header.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StorageError(f"{path} has damaged metadata.")
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_ranges(path, tensors, 8 + length, size)
    return tensors, metadata


def read_safetensors(
    path: str | Path,
    *,
    max_bytes: int = 8 * 2**30,
    expected: Mapping[str, tuple[tuple[int, ...], Any]] | None = None,
    mapped: bool = False,
) -> dict[str, torch.Tensor]:
    """Read torch tensors by name; every size is checked before anything is allocated.

    Args:
        path: The file.
        max_bytes: Largest file accepted.
        expected: Names to (shape, dtype), as torch dtypes or codes such as "F32"; the file must hold exactly these.
        mapped: Map the file into memory instead of reading it; pages are private, so writing to the tensors never
            reaches the file.

    Raises:
        MissingPathError: No such file.
        StorageError: The file is damaged, cut off, hostile, too large, or doesn't hold what is expected.
    """
    path = Path(path)
    places, _ = read_safetensors_header(path, max_bytes)
    if expected is not None:
        _check_expected(path, places, expected)
    with _storage_errors(path, "read"):
        if mapped:
            whole = np.memmap(path, dtype=np.uint8, mode="c")
            return {name: _as_tensor(path, place, whole[place.start : place.stop]) for name, place in places.items()}
        tensors = {}
        with open(path, "rb") as file:
            for name, place in places.items():
                file.seek(place.start)
                content = np.empty(place.stop - place.start, dtype=np.uint8)
                if file.readinto(content.data) != content.nbytes:
                    raise StorageError(f"{path} was cut off while it was read.")
                tensors[name] = _as_tensor(path, place, content)
        return tensors


def _raw(name: str, value: Any) -> tuple[str, tuple[int, ...], np.ndarray]:
    """dtype code, shape and the bytes (uint8 [bytes], without a copy where possible) of an array or tensor."""
    if isinstance(value, np.ndarray):
        code = _NUMPY_NAMES.get(value.dtype.name)
        array = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
    else:
        import torch

        if not isinstance(value, torch.Tensor):
            raise StorageError(f"{name!r} is a {type(value).__name__}, not a tensor or an array.")
        code = _TORCH_NAMES.get(str(value.dtype))
        if code is None:  # before NumPy is asked, which doesn't know all of torch's dtypes either
            raise StorageError(f"{name!r} has dtype {value.dtype}, which safetensors files don't hold.")
        tensor = value.detach().cpu().contiguous()
        array = (tensor.view(torch.int16) if code == "BF16" else tensor).numpy()  # NumPy has no bfloat16
    if code is None:
        raise StorageError(f"{name!r} has dtype {value.dtype}, which safetensors files don't hold.")
    return code, tuple(value.shape), array.reshape(-1).view(np.uint8)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is there twice")
    return result


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _stored(path: Path, name: str, entry: Any, base: int) -> StoredTensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        good = dtype in _DTYPE_BYTES and isinstance(shape, list) and len(shape) <= 64
        good = good and all(map(_is_count, [*shape, start, stop]))
        # torch counts in 64 bits, and multiplies sizes even where one of them is 0
        good = good and math.prod(max(1, length) for length in shape) * _DTYPE_BYTES[dtype] < 2**62
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise StorageError(f"{path} has a damaged header (tensor {name!r}).")
    if math.prod(shape) * _DTYPE_BYTES[dtype] != stop - start:  # also catches stop < start
        raise StorageError(f"{path} is damaged: the size of tensor {name!r} doesn't match its shape.")
    return StoredTensor(dtype, tuple(shape), base + start, base + stop)


def _check_ranges(path: Path, tensors: Mapping[str, StoredTensor], base: int, size: int) -> None:
    """The tensors must fill the file exactly: no gaps to hide things in, no overlaps, nothing cut off."""
    position = base
    for place in sorted(tensors.values(), key=lambda place: (place.start, place.stop)):
        if place.start != position:
            raise StorageError(f"{path} is damaged: its tensors overlap or leave gaps.")
        position = place.stop
    if position != size:
        raise StorageError(f"{path} is cut off or damaged: it should have {position:,} bytes and has {size:,}.")


def _check_expected(
    path: Path, places: Mapping[str, StoredTensor], expected: Mapping[str, tuple[tuple[int, ...], Any]]
) -> None:
    if set(places) != set(expected):
        missing, extra = sorted(set(expected) - set(places)), sorted(set(places) - set(expected))
        parts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has extra {', '.join(extra)}"] * bool(extra)
        raise StorageError(f"{path} {' and '.join(parts)}: it was made for something else.")
    for name, (shape, dtype) in expected.items():
        code = _TORCH_NAMES.get(str(dtype), str(dtype))
        found = places[name]
        if found.shape != tuple(shape) or found.dtype != code:
            raise StorageError(
                f"{path} holds {name!r} as {found.dtype} {list(found.shape)}; {code} {list(shape)} was expected."
            )


def _as_tensor(path: Path, place: StoredTensor, content: np.ndarray) -> torch.Tensor:
    import torch

    if place.dtype == "BOOL" and content.size and int(content.max()) > 1:
        raise StorageError(f"{path} is damaged: a truth value in it is neither 0 nor 1.")
    names = {code: name.removeprefix("torch.") for name, code in _TORCH_NAMES.items()}
    dtype: torch.dtype = getattr(torch, names[place.dtype])
    if not content.size:
        return torch.empty(place.shape, dtype=dtype)
    if content.ctypes.data % _DTYPE_BYTES[place.dtype]:
        content = content.copy()  # other writers may leave tensors unaligned
    return torch.from_numpy(content).view(dtype).view(place.shape)


# --- digests -------------------------------------------------------------------------------------------------------


def digest_bytes(content: bytes | bytearray | memoryview) -> str:
    """sha256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def digest_json(content: Any) -> str:
    """sha256 of plain data in one fixed JSON form: equal data gives equal digests, in any key order.

    Raises:
        StorageError: `content` isn't plain, or holds a number that isn't finite.
    """
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise StorageError(f"No digest can be made of this data: {error}.") from error
    return digest_bytes(text.encode())


def digest_file(path: str | Path) -> str:
    """sha256 of a file's content, read in pieces.

    Raises:
        MissingPathError: No such file.
        StorageError: It can't be read.
    """
    path = Path(path)
    digest = hashlib.sha256()
    _existing_size(path)
    with _storage_errors(path, "read"), open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_tensors(tensors: Mapping[str, Any]) -> str:
    """sha256 over names, dtypes, shapes and contents, in the order of the sorted names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        dtype, shape, content = _raw(name, tensors[name])
        digest.update(json.dumps([name, dtype, list(shape)]).encode())
        digest.update(content.data)
    return digest.hexdigest()


# --- names from outside --------------------------------------------------------------------------------------------


def check_relative(name: str) -> str:
    """Return `name` if its text is a plain relative path with forward slashes; the file system isn't asked.

    Raises:
        StorageError: It is empty, absolute, has a drive letter, a backslash, a NUL, or a part "..".
    """
    reason = ""
    if not name or not name.strip("/. "):
        reason = "is empty"
    elif "\0" in name:
        reason = "holds a NUL character"
    elif "\\" in name:
        reason = "holds a backslash: write / between folders"
    elif name.startswith(("/", "~")) or _DRIVE.match(name):
        reason = "is absolute: give it relative to its folder"
    elif ".." in name.split("/"):
        reason = "leaves its folder through '..'"
    if reason:
        raise StorageError(f"The path {name!r} {reason}.")
    return name


def safe_join(root: str | Path, *names: str) -> Path:
    """`root` and relative names from outside (a JSON, a CSV, an archive), joined so that they can't leave `root`.

    The one function through which such names reach the file system.

    Raises:
        StorageError: A name is absolute or leaves the folder, by its text or through a link on disk.
    """
    base = Path(os.path.realpath(root))
    path = base
    for name in names:
        path = path / check_relative(name)
    if not Path(os.path.realpath(path)).is_relative_to(base):
        raise StorageError(
            f"The path {'/'.join(names)!r} leads out of {root} through a link: give the folder the link points to."
        )
    return path


def extract_archive(
    path: str | Path,
    dest: str | Path,
    *,
    max_bytes: int = 500 * 2**30,
    max_files: int = 5_000_000,
    progress: ProgressCallback | None = None,
) -> Path:
    """Unpack a zip or tar archive into a new folder, which appears whole or not at all.

    Args:
        path: The archive.
        dest: The folder to be; must not exist or be empty.
        max_bytes: Most bytes that may come out in all; counted while they come, whatever the archive claims.
        max_files: Most members.
        progress: Called as (what, files done, files in all; 0 for a tar, which doesn't say).

    Raises:
        MissingPathError: No such archive.
        StorageError: It is damaged or encrypted, holds links or special files, names that leave the folder or that
            are there twice, or more than the limits.
    """
    path = Path(path)
    _existing_size(path)
    unpack = _unpacker(path)
    with new_folder(dest) as building:
        try:
            unpack(path, _Unpacking(path, building, max_bytes, max_files, progress))
        except AdaptKitError:
            raise
        except (*_DAMAGE, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's; bz2 and gzip have no number for a damaged stream
            raise StorageError(f"{path} can't be unpacked: {error}.") from error
    return Path(dest)


# what the standard library raises on damaged archives, encrypted ones (RuntimeError) and unknown packing among it
_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError, ValueError,
    LookupError, OverflowError,
)  # fmt: skip


def _unpacker(path: Path) -> Callable[[Path, _Unpacking], None]:
    """How to unpack an archive; tar first, since a tar whose last member is a zip also looks like a zip."""
    with _storage_errors(path, "read"):
        with contextlib.suppress(*_DAMAGE):  # a gz file that is cut off early, for one
            if tarfile.is_tarfile(path):
                return _extract_tar
        if zipfile.is_zipfile(path):
            return _extract_zip
    raise StorageError(f"{path} is neither a zip nor a tar archive, or is damaged.")


@dataclass
class _Unpacking:
    """One extraction: where to, what is still allowed, and who is told."""

    archive: Path
    folder: Path
    bytes_left: int
    files_left: int
    progress: ProgressCallback | None
    done: int = 0

    def target(self, name: str, size: int) -> Path:
        self.files_left -= 1
        if self.files_left < 0 or size > self.bytes_left:
            raise StorageError(f"{self.archive} unpacks to more than the limit allows; nothing was kept.")
        return safe_join(self.folder, name)

    def copy(self, source: IO[bytes], target: Path, total: int) -> None:
        if target.exists():
            raise StorageError(f"{self.archive} holds {target.name!r} twice in one folder.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb") as file:
            while chunk := source.read(_CHUNK):
                self.bytes_left -= len(chunk)
                if self.bytes_left < 0:
                    raise StorageError(f"{self.archive} unpacks to more than the limit allows; nothing was kept.")
                file.write(chunk)
        self.done += 1
        if self.progress:
            self.progress(f"unpacking {self.archive.name}", self.done, total)


def _extract_zip(path: Path, unpacking: _Unpacking) -> None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        total = sum(not member.is_dir() for member in members)
        for member in members:
            if stat.S_ISLNK(member.external_attr >> 16):
                raise StorageError(f"{path} holds a link ({member.filename!r}), which isn't unpacked.")
            target = unpacking.target(member.filename, member.file_size)
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            with archive.open(member) as source:
                unpacking.copy(source, target, total)


def _extract_tar(path: Path, unpacking: _Unpacking) -> None:
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if member.isdir() and name in ("", "."):
                continue
            if not (member.isfile() or member.isdir()):
                raise StorageError(f"{path} holds a link or special file ({member.name!r}), which isn't unpacked.")
            target = unpacking.target(name, member.size)
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            source = archive.extractfile(member)
            if source is None:  # only for members that aren't files
                raise StorageError(f"{path} is damaged at {member.name!r}.")
            with source:
                unpacking.copy(source, target, 0)
        for _ in range(_MOST_PADDING):  # to the end of the stream, where gzip and xz keep their checksums
            if archive.fileobj is None or not archive.fileobj.read(_CHUNK):
                break


# --- places and locks ----------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Where adaptkit keeps what can be computed again: $ADAPTKIT_CACHE, or adaptkit in the user's cache folder."""
    given = os.environ.get("ADAPTKIT_CACHE")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "adaptkit"


@contextmanager
def file_lock(path: str | Path) -> Iterator[None]:
    """Hold an exclusive lock between processes and threads; waits for it.

    The system drops the lock when its holder dies, so a killed process leaves nothing to clean up. Where the file
    system knows no locks, work goes on without: writes are atomic anyway, only work may be done twice.
    """
    path = Path(path)
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with _storage_errors(path):
            _lock(handle)
        yield
    finally:
        os.close(handle)  # also gives the lock back


def try_lock(path: str | Path) -> int | None:
    """Take an exclusive lock between processes without waiting, and make the file where there is none.

    Returns:
        The file's descriptor, whose closing gives the lock back (as the holder's death does); None where another holds
        the lock. Where the file system knows no locks, everyone gets it.

    Raises:
        StorageError: The file can't be made.
    """
    path = Path(path)
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not _lock(handle, wait=False):
                    os.close(handle)
                    return None
                # a holder may delete its file before it lets go: then what was locked here is nobody's any more
                if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle
            except FileNotFoundError:  # deleted between the two looks
                pass
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)


def _lock(handle: int, wait: bool = True) -> bool:
    """Lock an open file; False where another holds it and there is no waiting."""
    try:
        import fcntl
    except ImportError:  # Windows
        import importlib

        windows: Any = importlib.import_module("msvcrt")
        try:
            windows.locking(handle, windows.LK_LOCK if wait else windows.LK_NBLCK, 1)
        except OSError:
            return wait
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
    return True


@contextmanager
def _storage_errors(path: Path, verb: str = "written") -> Iterator[None]:
    """Turn the system's errors into one sentence; our own errors pass."""
    try:
        yield
    except AdaptKitError:
        raise
    except OSError as error:
        reason = _REASONS.get(error.errno or 0) or error.strerror or str(error)
        raise StorageError(f"{path} can't be {verb}: {reason}.") from error


def _existing_size(path: Path, max_bytes: int | None = None) -> int:
    with _storage_errors(path, "read"):
        if not path.is_file():
            raise MissingPathError(f"There is no file {path}.")
        size = path.stat().st_size
    if max_bytes is not None and size > max_bytes:
        raise StorageError(f"{path} has {size:,} bytes; at most {max_bytes:,} are accepted.")
    return size


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name[:48]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_below(folder: Path) -> None:
    """Sync a folder and all in it, at once: the disk's journal takes them together, in the time of one or two."""
    found = list(folder.rglob("*"))
    files = [path for path in found if path.is_file()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_sync, files))
        list(pool.map(_sync_folder, [folder, *(path for path in found if path.is_dir())]))


def _sync_folder(path: Path) -> None:
    """Make a rename survive a power cut, where the system lets folders be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
