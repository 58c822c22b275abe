"""Files: whole or not at all, checked before they are believed, and never outside their folder."""

# ruff: noqa: PT012, PT031 - what happens inside the blocks, up to their error, is what is tested

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptkit import storage
from adaptkit.errors import MissingPathError, StorageError
from adaptkit.storage import (
    StoredTensor,
    atomic_path,
    cache_dir,
    check_relative,
    digest_bytes,
    digest_file,
    digest_json,
    digest_tensors,
    extract_archive,
    file_lock,
    new_folder,
    read_json,
    read_safetensors,
    read_safetensors_header,
    safe_join,
    write_json,
    write_safetensors,
)


def everything_in(folder: Path) -> list[str]:
    """Every path below a folder, also hidden ones; temporary files would show here."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Stop(BaseException):
    """Stands for Ctrl-C."""


# --- atomic_path ------------------------------------------------------------------------------------------------------


def test_the_new_content_appears_only_at_the_end(tmp_path):
    path = tmp_path / "deep" / "er" / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent  # one file system, so that the rename is atomic
        assert not path.exists()
    assert path.read_text() == "new"
    with atomic_path(str(path)) as temporary:
        temporary.write_text("newer")
        assert path.read_text() == "new"
    assert everything_in(path.parent) == ["a.txt"]
    assert path.read_text() == "newer"


@pytest.mark.parametrize("error", [ValueError("mine"), Stop(), KeyboardInterrupt()])
def test_a_failure_inside_leaves_nothing_and_keeps_the_old(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    for target in (path, tmp_path / "b.txt"):
        with pytest.raises(type(error)), atomic_path(target) as temporary:
            temporary.write_text("half")
            raise error
    assert everything_in(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(StorageError, match=r"a\.txt can't be written"), atomic_path(tmp_path / "a.txt"):
        pass
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission is denied")],
)
def test_the_systems_errors_become_a_sentence(tmp_path, number, words):
    with pytest.raises(StorageError, match=words) as caught, atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise OSError(number, os.strerror(number))
    assert "a.txt can't be written" in str(caught.value)
    assert everything_in(tmp_path) == []


def test_our_own_errors_pass_unchanged(tmp_path):
    with pytest.raises(MissingPathError, match="no images"), atomic_path(tmp_path / "a.txt"):
        raise MissingPathError("There are no images.")


def test_places_that_cannot_be_files(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="folder can't be written: it is a folder"):
        write_json(tmp_path / "folder", 1)
    with pytest.raises(StorageError, match="can't be written"):
        write_json(tmp_path / "file" / "a.json", 1)
    with pytest.raises(StorageError, match="the name is too long"):
        write_json(tmp_path / ("x" * 300), 1)
    assert everything_in(tmp_path) == ["file", "folder"]


def test_the_longest_names_can_be_written(tmp_path):
    """A temporary name has more characters than the name it stands for, and mustn't be too long for that."""
    for name in ("x" * 255, "\U0001f98a" * 63, "狐" * 85):
        assert len(name.encode()) > 250
        write_json(tmp_path / name, 1)
        with new_folder(tmp_path / f"{name[:-1]}y") as building:
            (building / "a").write_text("x")
    assert len(list(tmp_path.iterdir())) == 6


# --- new_folder -------------------------------------------------------------------------------------------------------


def test_a_folder_appears_as_a_whole(tmp_path):
    path = tmp_path / "runs" / "first"
    with new_folder(path) as building:
        (building / "sub").mkdir()
        (building / "sub" / "a.txt").write_text("a")
        assert not path.exists()
    assert everything_in(tmp_path) == ["runs", "runs/first", "runs/first/sub", "runs/first/sub/a.txt"]


@pytest.mark.parametrize("error", [ValueError("mine"), Stop()])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_fails_leaves_nothing_and_keeps_the_old(tmp_path, error, overwrite):
    old = tmp_path / "old"
    old.mkdir()
    (old / "keep").write_text("x")
    targets = [old, tmp_path / "new"] if overwrite else [tmp_path / "new"]
    for target in targets:
        with pytest.raises(type(error)), new_folder(target, overwrite=overwrite) as building:
            (building / "half").write_text("x")
            raise error
    assert everything_in(tmp_path) == ["old", "old/keep"]


def test_what_may_be_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as building:
        (building / "one").write_text("1")
    with pytest.raises(StorageError, match="exists and isn't empty"), new_folder(tmp_path / "empty"):
        raise AssertionError("never entered")
    with new_folder(tmp_path / "empty", overwrite=True) as building:
        (building / "two").write_text("2")
    (tmp_path / "file").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(StorageError, match="is a file"), new_folder(tmp_path / "file", overwrite=overwrite):
            raise AssertionError("never entered")
    assert everything_in(tmp_path) == ["empty", "empty/two", "file"]


def test_someone_else_finishes_first(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(StorageError, match="exists and isn't empty"), new_folder(path) as building:
        (building / "mine").write_text("x")
        path.mkdir()
        (path / "theirs").write_text("x")
    assert everything_in(tmp_path) == ["run", "run/theirs"]


def test_a_folder_someone_works_or_lives_in_is_not_overwritten(tmp_path, monkeypatch):
    inside, home = tmp_path / "a" / "b", tmp_path / "homes" / "me"
    for folder in (inside, home):
        folder.mkdir(parents=True)
        (folder / "keep").write_text("x")
    monkeypatch.chdir(inside)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    before = everything_in(tmp_path)
    for path in (".", "..", inside, tmp_path, "/", home, home.parent):
        with pytest.raises(StorageError, match="not overwritten"), new_folder(path, overwrite=True):
            raise AssertionError("never entered")
    assert everything_in(tmp_path) == before


def test_a_failed_swap_puts_the_old_folder_back(tmp_path, monkeypatch):
    path = tmp_path / "run"
    with new_folder(path) as building:
        (building / "old").write_text("x")
    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "full")
        rename(source, target)

    monkeypatch.setattr(storage.os, "rename", failing)
    with pytest.raises(StorageError, match="the disk is full"), new_folder(path, overwrite=True) as building:
        (building / "new").write_text("x")
    assert len(calls) == 3
    assert everything_in(tmp_path) == ["run", "run/old"]


def test_a_link_to_a_folder_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with new_folder(tmp_path / "link" / "run") as building:
        (building / "a").write_text("x")
    with new_folder(tmp_path / "link", overwrite=True) as building:
        (building / "b").write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert everything_in(tmp_path / "disk") == ["b"]


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        None,
        {"a": [1, 2.5, "größe", True, None, {}], "b": {"c": -0.0}},
        0.1 + 0.2,
        10**30,
        "\u2028 \0 \x7f \U0001f98a",
        "photo_\udcff.jpg",  # a file name that isn't UTF-8, as Python gives it
        {"\udcff": "\ud800"},
    ],
)
def test_json_reads_back_what_was_written(tmp_path, content):
    path = tmp_path / "a.json"
    write_json(path, content)
    assert read_json(path) == content
    path.read_bytes().decode("utf-8")  # other readers want UTF-8, too
    assert path.read_bytes().endswith(b"\n")
    assert everything_in(tmp_path) == ["a.json"]


def test_json_that_is_refused_when_written(tmp_path):
    endless: list = []
    endless.append(endless)
    for content in (math.nan, [math.inf], {"a": -math.inf}, {1, 2}, np.float32(1), {(1,): 2}, endless, b"x"):
        with pytest.raises(StorageError, match="can't be written as JSON"):
            write_json(tmp_path / "a.json", content)
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "isn't valid JSON"),
        (b"[1,\n2,\n}", r"isn't valid JSON \(line 3"),
        (b'"\xff"', r"isn't UTF-8 text \(byte 1\)"),
        (b"[NaN]", "it holds NaN"),
        (b"[Infinity]", "it holds Infinity"),
        (b"-Infinity", "it holds -Infinity"),
        (b"[1e999]", "it holds 1e999, which is too large"),
        (b"-1" + b"0" * 400 + b".0", "too large"),
        (b"9" * 5000, "can't be read as JSON"),
        (b"[" * 100_000, "can't be read as JSON"),
        (b"\xef\xbb\xbf{}", "BOM"),
    ],
)
def test_json_that_is_refused_when_read(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(StorageError, match=message) as caught:
        read_json(path)
    assert "a.json" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_json_that_is_missing_or_too_large(tmp_path):
    write_json(tmp_path / "a.json", "x" * 100)
    with pytest.raises(StorageError, match=r"has 103 bytes; at most 50 are accepted"):
        read_json(tmp_path / "a.json", max_bytes=50)
    for missing in (tmp_path / "b.json", tmp_path, "a\0b"):
        with pytest.raises(MissingPathError, match="There is no file"):
            read_json(missing)
    with pytest.raises(StorageError, match="can't be read: the name is too long"):
        read_json("x" * 300)


# --- safetensors: what we write ---------------------------------------------------------------------------------------

TENSORS = {
    "weights": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "brain": torch.tensor([[1.5], [-2.0]], dtype=torch.bfloat16),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "truth": torch.tensor([True, False, True]),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    "small": torch.tensor([-1], dtype=torch.int8),
    "double": torch.tensor(0.1, dtype=torch.float64),
    "none": torch.zeros(0, 3),
    "größe/1.x": torch.tensor([7], dtype=torch.int32),
}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype
        and ours[name].shape == theirs[name].shape
        and torch.equal(ours[name], theirs[name])
        for name in ours
    )


def test_tensors_round_trip_and_the_library_agrees(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, TENSORS, {"made by": "a test"})
    assert same(read_safetensors(path), TENSORS)
    assert same(read_safetensors(path, mapped=True), TENSORS)
    assert same(load_file(path), TENSORS)
    places, metadata = read_safetensors_header(path)
    assert metadata == {"made by": "a test"}
    assert places["weights"].dtype == "F32"
    assert places["weights"].shape == (2, 3)
    assert places["weights"].stop - places["weights"].start == 24
    for place in places.values():
        assert place.start % {"F32": 4, "I64": 8, "F64": 8, "I32": 4, "F16": 2, "BF16": 2}.get(place.dtype, 1) == 0
    assert len(places) == 10

    save_file(TENSORS, tmp_path / "b.safetensors")  # and the other way round
    assert same(read_safetensors(tmp_path / "b.safetensors"), TENSORS)
    assert same(read_safetensors(tmp_path / "b.safetensors", mapped=True), TENSORS)


def test_arrays_views_and_byte_orders(tmp_path):
    path = tmp_path / "a.safetensors"
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_safetensors(
        path,
        {
            "turned": grid.T,
            "big": grid.astype(">f4"),
            "part": torch.from_numpy(grid)[:, 1::2],
            "zero": np.array(2.5),
            "trained": torch.ones(2, requires_grad=True),
            "empty": np.zeros((2, 0), np.int16),
        },
    )
    read = read_safetensors(path)
    assert read["turned"].tolist() == grid.T.tolist()
    assert read["big"].tolist() == grid.tolist()
    assert read["part"].tolist() == grid[:, 1::2].tolist()
    assert (read["zero"].shape, float(read["zero"])) == ((), 2.5)
    assert not read["trained"].requires_grad
    assert read["empty"].shape == (2, 0)
    assert read["empty"].dtype == torch.int16


def test_no_tensors_and_many(tmp_path):
    write_safetensors(tmp_path / "none", {})
    assert read_safetensors(tmp_path / "none") == {}
    assert read_safetensors(tmp_path / "none", mapped=True) == {}
    many = {f"t{index}": torch.tensor([index], dtype=torch.int16) for index in range(300)}
    write_safetensors(tmp_path / "many", many)
    assert same(read_safetensors(tmp_path / "many"), many)


def test_reading_gives_tensors_of_their_own(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, TENSORS)
    before = path.read_bytes()
    for mapped in (False, True):
        tensors = read_safetensors(path, mapped=mapped)
        tensors["weights"].fill_(9)
        tensors["brain"].fill_(9)
    assert path.read_bytes() == before
    assert same(read_safetensors(path, mapped=True), TENSORS)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a": torch.zeros(1, dtype=torch.complex64)}, None, "dtype torch.complex64"),
        ({"a": torch.zeros(1).to(torch.float8_e4m3fn)}, None, "dtype torch.float8_e4m3fn"),
        ({"a": np.array(["x"])}, None, "dtype <U1"),
        ({"a": np.array([None])}, None, "dtype object"),
        ({"a": [1.0]}, None, "is a list, not a tensor"),
        ({"__metadata__": torch.zeros(1)}, None, "'__metadata__', which the format keeps for itself"),
        ({"a": torch.zeros(1)}, {"epoch": 5}, "must be texts by name"),
    ],
)
def test_tensors_that_cannot_be_written(tmp_path, tensors, metadata, message):
    with pytest.raises(StorageError, match=message):
        write_safetensors(tmp_path / "a", tensors, metadata)
    assert everything_in(tmp_path) == []


def test_what_is_expected_must_be_there_exactly(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.zeros(2, 3), "b": torch.zeros(1, dtype=torch.int64)})
    expected = {"a": ((2, 3), torch.float32), "b": ((1,), "I64")}
    assert set(read_safetensors(path, expected=expected)) == {"a", "b"}
    wrong = [
        ({"a": ((2, 3), torch.float32)}, "has extra b: it was made for something else"),
        ({**expected, "c": ((1,), "F32")}, "lacks c"),
        ({"a": ((2, 3), "F32"), "c": ((1,), "F32")}, "lacks c and has extra b"),
        ({**expected, "a": ((3, 2), "F32")}, r"holds 'a' as F32 \[2, 3\]; F32 \[3, 2\] was expected"),
        ({**expected, "a": ((2, 3), torch.float64)}, r"F64 \[2, 3\] was expected"),
    ]
    for other, message in wrong:
        with pytest.raises(StorageError, match=message):
            read_safetensors(path, expected=other)
    assert len(wrong) == 5


# --- safetensors: what others write -----------------------------------------------------------------------------------


def raw_file(path: Path, header: object, body: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


FOUR = b"\0" * 4

ATTACKS = {
    "huge header length": (b"{}", b"", 2**63),
    "header length of everything": (b"{}", b"", 2**64 - 1),
    "header longer than the file": (b"{}", b"", 3),
    "header of no length": (b"", b"", 0),
    "header that isn't JSON": (b"{]", b"", None),
    "header that isn't UTF-8": (b'{"\xff": 1}', b"", None),
    "header that is a list": ([], b"", None),
    "header that is a number": (b"12", b"", None),
    "deeply nested header": (b"[" * 100_000, b"", None),
    "number too long to convert": (b'{"a": ' + b"9" * 5000 + b"}", b"", None),
    "entry that is a text": ({"a": "F32"}, b"", None),
    "entry that is null": ({"a": None}, b"", None),
    "entry that is a list": ({"a": []}, b"", None),
    "entry without a shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR, None),
    "entry without offsets": ({"a": {"dtype": "F32", "shape": [1]}}, FOUR, None),
    "entry without a dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, FOUR, None),
    "unknown dtype": ({"a": entry("F8_E4M3", offsets=(0, 1))}, b"\0", None),
    "dtype that is a list": ({"a": entry(["F32"])}, FOUR, None),
    "shape that is a text": ({"a": entry(shape="1")}, FOUR, None),
    "shape that is a number": ({"a": entry(shape=1)}, FOUR, None),
    "shape with a float": ({"a": entry(shape=[1.0])}, FOUR, None),
    "shape with a truth value": ({"a": entry(shape=[True])}, FOUR, None),
    "negative shape": ({"a": entry(shape=[-1, -1])}, FOUR, None),
    "too many dimensions": ({"a": entry(shape=[1] * 65)}, FOUR, None),
    "claimed size far beyond the file": ({"a": entry(shape=[2**40], offsets=(0, 2**42))}, FOUR, None),
    "claimed size beyond 64 bits": ({"a": entry(shape=[2**62, 2**62], offsets=(0, 4))}, FOUR, None),
    "sizes that overflow to the right number": ({"a": entry(shape=[2**32, 2**32], offsets=(0, 0))}, b"", None),
    "no bytes, but sizes that overflow": ({"a": entry(shape=[0, 2**61, 2**61], offsets=(0, 0))}, b"", None),
    "no bytes, sizes that overflow too": ({"a": entry(shape=[2**61, 2**61, 0], offsets=(0, 0))}, b"", None),
    "shape smaller than its bytes": ({"a": entry(offsets=(0, 8))}, FOUR * 2, None),
    "offsets the wrong way round": ({"a": entry(offsets=(4, 0))}, FOUR, None),
    "negative offsets": ({"a": entry(offsets=(-4, 0))}, FOUR, None),
    "offsets of floats": ({"a": entry(offsets=(0.0, 4.0))}, FOUR, None),
    "offsets of three": ({"a": entry(offsets=(0, 4, 8))}, FOUR, None),
    "offsets that are a text": ({"a": entry(offsets="04")}, FOUR, None),
    "overlapping tensors": ({"a": entry(), "b": entry()}, FOUR, None),
    "tensors that overlap in part": ({"a": entry(), "b": entry("F16", offsets=(2, 4))}, FOUR, None),
    "gap before": ({"a": entry(offsets=(4, 8))}, FOUR * 2, None),
    "gap between": ({"a": entry(), "b": entry(offsets=(8, 12))}, FOUR * 3, None),
    "bytes behind the last tensor": ({"a": entry()}, FOUR * 2, None),
    "no tensors, but bytes": ({}, FOUR, None),
    "file that is cut off": ({"a": entry()}, b"\0\0\0", None),
    "the same tensor twice": (b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), FOUR, None),
    "the same key twice in an entry": (
        b'{"a": {"dtype": "F32", "shape": [1], "shape": [1], "data_offsets": [0, 4]}}',
        FOUR,
        None,
    ),
    "metadata twice": (b'{"__metadata__": {}, "__metadata__": {}}', b"", None),
    "metadata that is a list": ({"__metadata__": []}, b"", None),
    "metadata that is null": ({"__metadata__": None}, b"", None),
    "metadata with numbers": ({"__metadata__": {"a": 1}}, b"", None),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_damaged_and_hostile_tensor_files_are_refused(tmp_path, attack):
    header, body, length = ATTACKS[attack]
    path = raw_file(tmp_path / "bad.safetensors", header, body, length)
    for read in (read_safetensors_header, read_safetensors, lambda path: read_safetensors(path, mapped=True)):
        with pytest.raises(StorageError, match=r"bad\.safetensors"):
            read(path)


def test_a_good_file_passes_the_same_checks(tmp_path):
    """So that the attacks above fail for their own reason."""
    header = {
        "__metadata__": {"a": "b"},
        "b": entry(offsets=(4, 8)),
        "a": entry(),
        "none": entry(shape=[0], offsets=(4, 4)),
    }
    path = raw_file(tmp_path / "good", header, struct.pack("<ff", 1.0, 2.0))
    assert {name: tensor.tolist() for name, tensor in read_safetensors(path).items()} == {
        "a": [1.0],
        "b": [2.0],
        "none": [],
    }
    base = 8 + len(json.dumps(header))
    assert read_safetensors_header(path)[0]["b"] == StoredTensor("F32", (1,), base + 4, base + 8)


def test_a_cut_anywhere_is_noticed(tmp_path):
    write_safetensors(tmp_path / "whole", {"a": torch.arange(5), "b": torch.ones(3)})
    whole, path = (tmp_path / "whole").read_bytes(), tmp_path / "cut"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(StorageError, match="cut"):
            read_safetensors(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(StorageError, match="cut off or damaged"):
        read_safetensors(path)
    assert len(whole) > 100


def test_unaligned_tensors_are_read_and_truth_values_checked(tmp_path):
    header = {"t": entry("BOOL", [1], [0, 1]), "a": entry("F32", [2], [1, 9]), "h": entry("BF16", [1], [9, 11])}
    body = b"\1" + struct.pack("<ff", 1.5, -2.0) + b"\x80\x3f"
    path = raw_file(tmp_path / "a", header, body)
    for mapped in (False, True):
        read = read_safetensors(path, mapped=mapped)
        assert (read["t"].tolist(), read["a"].tolist(), read["h"].tolist()) == ([True], [1.5, -2.0], [1.0])
    raw_file(path, header, b"\2" + body[1:])
    with pytest.raises(StorageError, match="neither 0 nor 1"):
        read_safetensors(path)


def test_tensor_files_that_are_missing_or_too_large(tmp_path):
    write_safetensors(tmp_path / "a", {"a": torch.zeros(100)})
    with pytest.raises(StorageError, match="at most 100 are accepted"):
        read_safetensors(tmp_path / "a", max_bytes=100)
    for missing in (tmp_path / "b", tmp_path):
        with pytest.raises(MissingPathError):
            read_safetensors(missing)


# --- digests ----------------------------------------------------------------------------------------------------------


def test_digests(tmp_path):
    content = os.urandom(3 * 2**20 + 7)  # more than the pieces it is read in
    (tmp_path / "a").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    assert digest_file(tmp_path / "a") == digest_bytes(content) == digest_bytes(memoryview(content)) == expected
    with pytest.raises(MissingPathError):
        digest_file(tmp_path / "b")
    with pytest.raises(MissingPathError):
        digest_file(tmp_path)


def test_digests_of_plain_data():
    assert digest_json({"a": 1, "b": [1, 2]}) == digest_json({"b": (1, 2), "a": 1})
    different = [{}, [], "", None, 0, False, "0", [0], [[0]], {"a": 0}, {"a": [0]}, "größe", "\udcff", 0.5]
    assert len({digest_json(content) for content in different}) == len(different) == 14
    assert digest_json({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()  # kept: digests are in people's results
    for bad in (math.nan, {1, 2}, {1: 2, "a": 3}, np.float32(1)):
        with pytest.raises(StorageError, match="No digest"):
            digest_json(bad)


def test_digests_of_tensors_tell_everything_apart():
    a = torch.arange(6, dtype=torch.float32)
    variants = [
        {"a": a},
        {"b": a},
        {"a": a.reshape(2, 3)},
        {"a": a.reshape(3, 2)},
        {"a": a.to(torch.float64)},
        {"a": a.view(torch.int32)},  # the same bytes
        {"a": a, "b": a},
        {"a": a[:3], "b": a[3:]},
        {"a": a[:2], "b": a[2:]},
        {"a": -a},
        {},
    ]
    assert len({digest_tensors(tensors) for tensors in variants}) == len(variants) == 11
    b = torch.ones(2)
    assert digest_tensors({"a": a, "b": b}) == digest_tensors({"b": b, "a": a})
    assert digest_tensors({"a": a}) == digest_tensors({"a": a.numpy()})
    assert digest_tensors({"a": a.reshape(2, 3).T.contiguous()}) == digest_tensors({"a": a.reshape(2, 3).T})


# --- names from outside -----------------------------------------------------------------------------------------------

CLIMBING = [
    "", ".", "./", "/", "//", "..", "../a", "a/../../b", "a/..", "/etc/passwd", "//server/share", "~", "~/a", "~root/a",
    "C:/a", "c:a", "\\a", "a\\..\\b", "a\0b", "./../a", "a/./../b",
]  # fmt: skip


@pytest.mark.parametrize("name", CLIMBING)
def test_names_that_leave_or_could_leave_their_folder(tmp_path, name):
    with pytest.raises(StorageError, match="The path"):
        check_relative(name)
    with pytest.raises(StorageError, match="The path"):
        safe_join(tmp_path, name)
    with pytest.raises(StorageError, match="The path"):
        safe_join(tmp_path, "a", name)


@pytest.mark.parametrize(
    "name", ["a", "a/b.jpg", "./a", "a//b", "a/./b", "..a", "a..", "...a/b", " a", "größe/ü.png", "a b/c~1"]
)
def test_names_that_stay(tmp_path, name):
    assert check_relative(name) == name
    assert safe_join(tmp_path, name) == tmp_path.resolve() / name
    assert safe_join(str(tmp_path), "x", name) == tmp_path.resolve() / "x" / name


def test_links_are_followed_before_a_name_is_believed(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "real").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_text("x")
    (root / "inner").symlink_to(root / "real")
    (root / "outer").symlink_to(outside)
    (root / "up").symlink_to("..")
    (root / "file").symlink_to(outside / "secret")
    (root / "twin").symlink_to(tmp_path / "root-twin")  # begins with the root's name, and is not in it
    (tmp_path / "link").symlink_to(root)
    assert safe_join(root, "inner", "a") == root.resolve() / "inner" / "a"
    assert safe_join(tmp_path / "link", "real/a") == root.resolve() / "real" / "a"  # the root itself may be a link
    assert safe_join(root) == root.resolve()
    for name in ("outer", "outer/secret", "outer/not/there", "up/outside/secret", "file", "inner/../outer", "twin/a"):
        with pytest.raises(StorageError):
            safe_join(root, name)


# --- archives ---------------------------------------------------------------------------------------------------------


def make_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return path


def make_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


MEMBERS = {"a.txt": b"a", "sub/deep/b.bin": os.urandom(2 * 2**20 + 3), "sub/empty": b""}
UNPACKED = ["a.txt", "sub", "sub/deep", "sub/deep/b.bin", "sub/empty"]


def refused(archive: Path, message: str, folder: Path, **limits: int) -> None:
    """Extraction fails with a sentence that names the archive or its member, and leaves nothing."""
    before = everything_in(folder)
    with pytest.raises(StorageError, match=message):
        extract_archive(archive, folder / "out", **limits)
    assert everything_in(folder) == before


@pytest.mark.parametrize("kind", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
def test_archives_are_unpacked(tmp_path, kind):
    told = []
    make = make_zip if kind == "zip" else make_tar
    extra = [] if kind == "zip" else [kind]
    archive = make(tmp_path / "archive", MEMBERS, *extra)
    out = extract_archive(archive, tmp_path / "new" / "out", progress=lambda *arguments: told.append(arguments))
    assert out == tmp_path / "new" / "out"
    assert everything_in(out) == UNPACKED
    for name, content in MEMBERS.items():
        assert (out / name).read_bytes() == content
    total = 3 if kind == "zip" else 0
    assert told == [("unpacking archive", done, total) for done in (1, 2, 3)]
    refused(archive, "exists and isn't empty", tmp_path / "new")


def test_folders_in_archives(tmp_path):
    told = []
    folder = special(tarfile.DIRTYPE)
    make_tar(tmp_path / "t", {"./": special(tarfile.DIRTYPE), "./full": folder, "./full/a": b"a", "./void": folder})
    make_zip(tmp_path / "z", {"full/": b"", "full/a": b"a", "void/": b""})
    for name in ("t", "z"):
        extract_archive(tmp_path / name, tmp_path / f"{name}-out", progress=lambda *arguments: told.append(arguments))
        assert everything_in(tmp_path / f"{name}-out") == ["full", "full/a", "void"]
    assert told == [("unpacking t", 1, 0), ("unpacking z", 1, 1)]  # counts files, so that a bar gets to its end


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path):
    inner = make_zip(tmp_path / "inner.zip", {"inside.txt": b"x"}).read_bytes()
    archive = make_tar(tmp_path / "archive.tar", {"photos/a.txt": b"a", "photos/inner.zip": inner}, "w")
    assert zipfile.is_zipfile(archive)  # what misled us
    out = extract_archive(archive, tmp_path / "out")
    assert everything_in(out) == ["photos", "photos/a.txt", "photos/inner.zip"]


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "~/evil", "..\\evil", "C:/evil", "a/.."])
def test_names_that_climb_out_of_an_archive(tmp_path, name):
    for archive in (
        make_zip(tmp_path / "z", {"ok": b"x", name: b"evil"}),
        make_tar(tmp_path / "t", {"ok": b"x", name: b"evil"}),
    ):
        refused(archive, "The path", tmp_path)
    folder = special(tarfile.DIRTYPE)
    refused(make_tar(tmp_path / "d", {"ok": b"x", name: folder}), "The path", tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_links_and_special_files_of_a_tar(tmp_path, kind):
    for target in ("a.txt", "../../secret", "/etc/passwd"):
        archive = make_tar(tmp_path / "t", {"a.txt": b"a", "link": special(kind, target), "link/b": b"b"})
        refused(archive, "link or special file .'link'", tmp_path)


def test_links_of_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        link = zipfile.ZipInfo("link")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc")
        archive.writestr("link/passwd", "x")
    refused(tmp_path / "z", "holds a link .'link'", tmp_path)


def test_the_same_name_twice_in_an_archive(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.writestr("a", "1")
        archive.writestr("a", "2")
    refused(tmp_path / "z", "holds 'a' twice", tmp_path)
    refused(make_tar(tmp_path / "t", {"d/a": b"1", "d/./a": b"2"}), "holds 'a' twice", tmp_path)
    refused(make_zip(tmp_path / "z2", {"a/b": b"1", "a": b"2"}), "holds 'a' twice", tmp_path)
    refused(make_zip(tmp_path / "z3", {"a": b"1", "a/b": b"2"}), "can't be written", tmp_path)


def test_bombs_are_stopped(tmp_path):
    zeros = b"\0" * (8 * 2**20)
    packed = [make_zip(tmp_path / "z", {"a": zeros}), make_tar(tmp_path / "t", {"a": zeros})]
    for archive in packed:
        assert archive.stat().st_size < 100_000
        refused(archive, "unpacks to more than the limit", tmp_path, max_bytes=2**20)
        extract_archive(archive, tmp_path / f"{archive.name}-out", max_bytes=len(zeros))
    halves = {str(index): zeros[: 2**20] for index in range(4)}
    for archive in (make_zip(tmp_path / "z2", halves), make_tar(tmp_path / "t2", halves)):
        refused(archive, "unpacks to more than the limit", tmp_path, max_bytes=3 * 2**20)
    many = {f"{index}/": b"" for index in range(50)}
    folders = {f"{index}": special(tarfile.DIRTYPE) for index in range(50)}
    for archive in (make_zip(tmp_path / "z3", many), make_tar(tmp_path / "t3", folders)):
        refused(archive, "unpacks to more than the limit", tmp_path, max_files=49)


def test_a_zip_that_lies_about_its_size(tmp_path):
    archive = make_zip(tmp_path / "z", {"a": b"\0" * (4 * 2**20)})
    content = bytearray(archive.read_bytes())
    size = struct.pack("<I", 4 * 2**20)
    assert content.count(size) == 2  # in front of the data and in the directory
    archive.write_bytes(content.replace(size, struct.pack("<I", 10)))
    refused(archive, "can't be unpacked|more than the limit", tmp_path, max_bytes=2**20)


def test_a_tar_that_claims_more_than_it_has(tmp_path):
    info = tarfile.TarInfo("a")
    info.size = 2**40
    (tmp_path / "t").write_bytes(info.tobuf() + b"x" * 512)
    refused(tmp_path / "t", "more than the limit", tmp_path)
    refused(tmp_path / "t", "can't be unpacked: unexpected end", tmp_path, max_bytes=2**41)


def test_damaged_archives(tmp_path):
    """A flipped byte in the middle, and cuts at many places, of every kind of archive."""
    content = {"a": os.urandom(60_000)}
    tried = 0
    for kind in ("w:gz", "w:bz2", "w:xz", 0, 8, 12, 14):
        make = make_tar if isinstance(kind, str) else make_zip
        whole = make(tmp_path / "whole", content, kind).read_bytes()
        flipped = bytearray(whole)
        flipped[30_000] ^= 255
        for damaged in (flipped, *(whole[:length] for length in (0, 3, 20, 60, 300, 5_000, 59_000))):
            (tmp_path / "bad").write_bytes(damaged)
            refused(tmp_path / "bad", "bad can't be unpacked|bad is neither a zip nor a tar archive", tmp_path)
            tried += 1
    assert tried == 56


def test_what_is_no_archive_or_encrypted_or_missing(tmp_path):
    (tmp_path / "text").write_text("hello " * 1000)
    refused(tmp_path / "text", "neither a zip nor a tar", tmp_path)
    with pytest.raises(MissingPathError, match="There is no"):
        extract_archive(tmp_path / "missing", tmp_path / "out")
    with pytest.raises(MissingPathError, match="There is no"):
        extract_archive(tmp_path, tmp_path / "out")
    locked = bytearray(make_zip(tmp_path / "locked", {"a": b"secret"}).read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        locked[locked.index(signature) + offset] |= 1  # the bit that says "encrypted"
    (tmp_path / "locked").write_bytes(locked)
    refused(tmp_path / "locked", "encrypted", tmp_path)


def test_a_progress_callback_that_stops_leaves_nothing(tmp_path):
    archive = make_zip(tmp_path / "z", MEMBERS)

    def stop(what, done, total):
        raise Stop

    with pytest.raises(Stop):
        extract_archive(archive, tmp_path / "out", progress=stop)
    assert everything_in(tmp_path) == ["z"]


# --- locks and places -------------------------------------------------------------------------------------------------


def test_only_one_thread_holds_a_lock(tmp_path):
    path, inside, most = tmp_path / "deep" / "a.lock", [], []

    def work():
        for _ in range(5):
            with file_lock(path):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert most == [1] * 20


def test_a_lock_is_given_back_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match="mine"), file_lock(tmp_path / "a.lock"):
            raise ValueError("mine")
    with file_lock(tmp_path / "a.lock"), file_lock(tmp_path / "b.lock"):
        pass


@pytest.mark.skipif(os.name == "nt", reason="kills a process the POSIX way")
def test_a_killed_process_gives_its_lock_back(tmp_path):
    code = (
        "import sys, time\nfrom adaptkit.storage import file_lock\n"
        f"with file_lock({str(tmp_path / 'a.lock')!r}):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        got = threading.Event()

        def take():
            with file_lock(tmp_path / "a.lock"):
                got.set()

        waiting = threading.Thread(target=take, daemon=True)
        waiting.start()
        assert not got.wait(0.2)
        other.kill()
        assert got.wait(10)
        waiting.join(timeout=10)


def test_locks_that_cannot_be_had(tmp_path, monkeypatch):
    with pytest.raises(StorageError, match="it is a folder"), file_lock(tmp_path):
        raise AssertionError("never entered")
    fcntl = pytest.importorskip("fcntl")

    def broken(number):
        def flock(handle, operation):
            raise OSError(number, os.strerror(number))

        return flock

    monkeypatch.setattr(fcntl, "flock", broken(errno.ENOLCK))  # some network file systems: work goes on
    with file_lock(tmp_path / "a.lock"):
        pass
    monkeypatch.setattr(fcntl, "flock", broken(errno.EIO))
    with pytest.raises(StorageError, match=r"a\.lock"), file_lock(tmp_path / "a.lock"):
        raise AssertionError("never entered")


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ADAPTKIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if os.name != "nt":
        assert cache_dir() == tmp_path / "home" / ".cache" / "adaptkit"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_dir() == tmp_path / "xdg" / "adaptkit"
    monkeypatch.setenv("ADAPTKIT_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.setenv("ADAPTKIT_CACHE", "~/mine")
    assert cache_dir() == Path("~/mine").expanduser()
    monkeypatch.setenv("ADAPTKIT_CACHE", "")  # set to nothing is not set
    assert cache_dir().name == "adaptkit"
