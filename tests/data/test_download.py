"""Downloads from a real server on this machine: whole, resumed, refused; archives unpacked beside what is there."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from adaptkit.data.download import fetch, unpack_into, verify
from adaptkit.errors import StorageError

CONTENT = bytes(range(256)) * 4096  # 1 MiB
MD5, SHA256 = hashlib.md5(CONTENT).hexdigest(), hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Files by path, and what was asked for. `cut` ends that many first answers half-way."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/data.bin": CONTENT}
        self.asked: list[tuple[str, str]] = []
        self.ranges, self.cut = True, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *words: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        span = request.headers.get("Range", "")
        path = request.path.partition("?")[0]
        self.asked.append((path, span))
        content = self.files.get(path)
        if content is None:
            return request.send_error(404)
        start = int(span.removeprefix("bytes=").rstrip("-")) if span and self.ranges else 0
        if start >= len(content):
            return request.send_error(416)
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        if self.cut:
            self.cut -= 1
            request.wfile.write(content[start : start + (len(content) - start) // 2])
            return request.wfile.flush()
        request.wfile.write(content[start:])
        return None


@pytest.fixture
def server() -> Iterator[Server]:
    serving = Server()
    yield serving
    serving.http.shutdown()
    serving.http.server_close()


def test_fetch_and_verify(server, tmp_path):
    steps = []
    path = fetch(
        f"{server.url}/data.bin?download=1", tmp_path / "new/data.bin", md5=MD5, sha256=SHA256,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert steps[-1] == ("downloading data.bin (MiB)", 1, 1)
    fetch(f"{server.url}/data.bin", path, md5=MD5)
    assert len(server.asked) == 1  # what is there is only verified


def test_a_cut_connection_is_gone_on_with(server, tmp_path):
    server.cut = 2
    assert fetch(f"{server.url}/data.bin", tmp_path / "data.bin", sha256=SHA256).read_bytes() == CONTENT
    assert [span for _, span in server.asked] == ["", "bytes=524288-", "bytes=786432-"]


def test_an_earlier_part_is_gone_on_with(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:1000])
    fetch(f"{server.url}/data.bin", tmp_path / "data.bin", sha256=SHA256)
    assert server.asked == [("/data.bin", "bytes=1000-")]
    (tmp_path / "whole.part").write_bytes(CONTENT)
    fetch(f"{server.url}/data.bin", tmp_path / "whole", sha256=SHA256)
    assert (tmp_path / "whole").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.ranges = False
    (tmp_path / "data.bin.part").write_bytes(b"something else")
    assert fetch(f"{server.url}/data.bin", tmp_path / "data.bin", sha256=SHA256).read_bytes() == CONTENT


def test_too_many_cuts_keep_what_came(server, tmp_path):
    server.cut = 10
    with pytest.raises(StorageError, match=r"connection ended after .* run the command again to go on"):
        fetch(f"{server.url}/data.bin", tmp_path / "data.bin")
    assert (tmp_path / "data.bin.part").stat().st_size > 800_000
    assert not (tmp_path / "data.bin").exists()


def test_a_wrong_checksum_removes_the_file(server, tmp_path):
    for wrong in ({"md5": "0" * 32}, {"sha256": "0" * 64}):
        with pytest.raises(StorageError, match=r"data\.bin has the .*0000 was expected"):
            fetch(f"{server.url}/data.bin", tmp_path / "data.bin", **wrong)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").write_bytes(b"damaged")
    with pytest.raises(StorageError, match="there has the md5"):
        verify(tmp_path / "there", md5=MD5)
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.org/x", "/etc/passwd", ""])
def test_other_addresses_are_refused(url, tmp_path):
    with pytest.raises(StorageError, match="isn't an http or https address"):
        fetch(url, tmp_path / "x")


def test_a_missing_file_and_a_missing_server(server, tmp_path):
    with pytest.raises(StorageError, match="answers 404"):
        fetch(f"{server.url}/nothing", tmp_path / "x")
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(StorageError, match=r"can't be fetched: .*refused"):
        fetch(f"{server.url}/data.bin", tmp_path / "x")


def test_no_room(server, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(StorageError, match="no room for 1,048,576 more bytes"):
        fetch(f"{server.url}/data.bin", tmp_path / "x")


# --- archives ------------------------------------------------------------------------------------------------------


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(members: dict[str, bytes | tarfile.TarInfo], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name) if isinstance(content, bytes) else content
            info.name = name
            if isinstance(content, bytes):
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return buffer.getvalue()


def link(target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo("link")
    info.type, info.linkname = kind, target
    return info


def saved(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_unpacking_keeps_what_is_there(tmp_path):
    archive = saved(tmp_path / "x.zip", zipped({"a/1": b"new", "a/2": b"two", "b/1": b"three"}))
    saved(tmp_path / "root/a/1", b"mine")
    unpack_into(archive, tmp_path / "root")
    assert files_in(tmp_path / "root") == {"a/1": b"mine", "a/2": b"two", "b/1": b"three"}
    assert {path.name for path in tmp_path.iterdir()} == {"root", "x.zip"}


def test_an_archive_in_an_archive(tmp_path):
    inner = tarred({"101_ObjectCategories/ant/1.jpg": b"ant"})
    outer = zipped({"caltech-101/101_ObjectCategories.tar.gz": inner, "__MACOSX/x": b"", "caltech-101/y.tar": b""})
    archive = saved(tmp_path / "x.zip", outer)
    unpack_into(archive, tmp_path / "root", inner="caltech-101/101_ObjectCategories.tar.gz")
    assert files_in(tmp_path / "root") == {"101_ObjectCategories/ant/1.jpg": b"ant"}


HOSTILE = {
    "climbs out": tarred({"../out": b"x"}),
    "climbs out later": tarred({"a/../../out": b"x"}),
    "is absolute": tarred({"/tmp/adaptkit-out": b"x"}),
    "links out": tarred({"a": link("/etc"), "a/x": b"x"}),
    "links to a file": tarred({"a": link("../../secret")}),
    "hard link": tarred({"a": link("/etc/passwd", tarfile.LNKTYPE)}),
    "device": tarred({"a": link("", tarfile.CHRTYPE)}),
    "pipe": tarred({"a": link("", tarfile.FIFOTYPE)}),
    "zip climbs out": zipped({"../out": b"x"}),
    "zip is absolute": zipped({"/tmp/adaptkit-out": b"x"}),
    "zip with backslashes": zipped({"..\\out": b"x", "C:\\out": b"x"}),
    "cut off": tarred({"a": CONTENT})[:500],
    "no archive": b"<html>Quota exceeded</html>",
    "empty": b"",
}


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_hostile_archives_leave_nothing(kind, tmp_path):
    archive = saved(tmp_path / "in/x.archive", HOSTILE[kind])
    with pytest.raises(StorageError):
        unpack_into(archive, tmp_path / "root")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["x.archive"]
    assert not Path("/tmp/adaptkit-out").exists()
    with pytest.raises(StorageError):  # the same inside a good archive
        unpack_into(saved(tmp_path / "in/y.zip", zipped({"x": HOSTILE[kind]})), tmp_path / "root", inner="x")
    assert not (tmp_path / "root").exists()
    assert not (tmp_path / "out").exists()
