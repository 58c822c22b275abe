"""Names from outside never lead out of their folder, whatever they are made of."""

# ruff: noqa: PT017 - some of what is drawn is accepted, some is refused, and both are looked at

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adaptkit.errors import StorageError
from adaptkit.storage import check_relative, extract_archive, safe_join

parts = st.sampled_from(["..", ".", "", "a", "b c", "in", "out", "up", "~", "C:", "\\", "\0", "...", " ", "ü", "..a"])
separators = st.sampled_from(["/", "/", "/", "\\", "//"])


@st.composite
def names(draw) -> str:
    """Names built of what has climbed out of folders before, and any text at all."""
    if draw(st.booleans()):
        return draw(st.text(max_size=10))
    pieces = draw(st.lists(parts, max_size=6))
    return "".join(piece + draw(separators) for piece in pieces)[: draw(st.integers(0, 30))]


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """A folder with links: "in" stays inside, "out" and "up" lead out of it."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(os.path.realpath(name))
        folder = base / "root"
        (folder / "a").mkdir(parents=True)
        (base / "secret").mkdir()
        (folder / "in").symlink_to(folder / "a")
        (folder / "out").symlink_to(base / "secret")
        (folder / "up").symlink_to("..")
        yield folder


@settings(deadline=None, max_examples=500)
@given(given_names=st.lists(names(), min_size=1, max_size=3))
@example(given_names=["up/root-twin"])
@example(given_names=["in/../../secret"])
@example(given_names=["a", "../.."])
@example(given_names=["/"])
def test_safe_join_never_leaves_the_folder(root, given_names):
    try:
        path = safe_join(root, *given_names)
    except StorageError as error:
        assert str(error).startswith("The path ")
        return
    assert Path(os.path.realpath(path)).is_relative_to(root)
    assert Path(os.path.normpath(path)).is_relative_to(root)
    for name in given_names:
        assert check_relative(name) is name
        assert not name.startswith(("/", "~"))
        assert ".." not in Path(name).parts
        assert "\0" not in name


@settings(deadline=None, max_examples=300)
@given(
    name=st.lists(st.text("abcü.-_ ", min_size=1, max_size=6).filter(lambda s: s.strip(". ")), min_size=1, max_size=4)
)
def test_plain_names_are_always_accepted(root, name):
    joined = "/".join(name)
    if joined.startswith("~") or joined.split("/")[0] in ("in", "out", "up"):
        return
    assert safe_join(root, joined) == root / joined


@settings(deadline=None, max_examples=60)
@given(members=st.lists(names(), min_size=1, max_size=3), kind=st.sampled_from(["zip", "tar"]))
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_never_write_outside_their_folder(members, kind):
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        try:
            if kind == "zip":
                with zipfile.ZipFile(base / "archive", "w") as archive:
                    for member in members:
                        archive.writestr(member, "x")
            else:
                with tarfile.open(base / "archive", "w") as tar:
                    for member in members:
                        info = tarfile.TarInfo(member)
                        info.size = 1
                        tar.addfile(info, io.BytesIO(b"x"))
        except (UnicodeError, ValueError, IndexError):
            return  # the archive can't even be made
        try:
            extract_archive(base / "archive", base / "nest" / "out")
            assert (base / "nest" / "out").is_dir()
            files = [path for path in (base / "nest" / "out").rglob("*") if path.is_file()]
            assert len(files) <= len(members)
        except StorageError:
            assert not (base / "nest" / "out").exists()
        assert sorted(path.name for path in base.iterdir()) in (["archive"], ["archive", "nest"])
        assert [path.name for path in (base / "nest").glob("*")] in ([], ["out"])
