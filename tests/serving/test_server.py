"""A real server in a process of its own: it stops in good order, and holds what it promises on the wire."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import uvicorn

from adaptkit.errors import ConfigError
from adaptkit.serving.app import create_app
from adaptkit.serving.limits import Limits
from adaptkit.serving.server import bind, is_local, serve, url
from benchmarks.serving.processes import served
from tests.serving.made import encoded, files, picture

TOKEN = "a-token-of-some-length"
CLIENTS = 8
IMAGES = 48


def ask(client: httpx.Client, address: str) -> int:
    picked = files(*[encoded(picture("oak", seed, side=64)) for seed in range(IMAGES)])
    return client.post(f"{address}/predict?adapter=probe", files=picked, timeout=120).status_code


def test_a_graceful_stop_answers_what_has_begun(folders):
    """Requests are in flight on many connections when the signal comes; all are answered, then the server ends."""
    slow = ("--batch-size", 1, "--max-images", IMAGES, "--max-waiting", CLIENTS * IMAGES, "--timeout", 120)
    with served(folders["probe"], *slow) as (process, facts), httpx.Client() as client:
        address = facts["url"]
        with ThreadPoolExecutor(CLIENTS) as pool:
            waiting = [pool.submit(ask, client, address) for _ in range(CLIENTS)]
            begun, until = 0.0, time.monotonic() + 60
            while begun < CLIENTS * IMAGES and time.monotonic() < until:
                lines = client.get(f"{address}/metrics", timeout=60).text.splitlines()
                numbers = dict(line.rsplit(" ", 1) for line in lines)
                done = numbers.get('adaptkit_images_total{adapter="probe"}', 0)
                begun = float(numbers["adaptkit_images_inside"]) + float(done)
            in_flight = sum(not future.done() for future in waiting)
            process.send_signal(signal.SIGTERM)
            outcomes = [future.result(120) for future in waiting]
        assert begun >= CLIENTS * IMAGES
        assert in_flight >= 1
        assert outcomes == [200] * CLIENTS
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        with pytest.raises(httpx.ConnectError):
            client.get(f"{address}/health")


def test_on_the_wire(folders, tmp_path):
    """The token from a file, bodies that are too large or never come, and connections that break off."""
    (tmp_path / "token").write_text(TOKEN + "\n")
    with served(folders["probe"], "--token-file", tmp_path / "token", "--timeout", "2", "--max-body", "1") as (
        process,
        facts,
    ):
        assert facts["token"] is True
        assert facts["local"] is True
        host, port = facts["url"].removeprefix("http://").split(":")
        assert host == "127.0.0.1"
        good = {"Authorization": f"Bearer {TOKEN}"}
        image = files(encoded(picture("oak")))
        post = f"{facts['url']}/predict"
        assert httpx.post(post, files=image).status_code == 401
        assert httpx.post(post, files=image, headers=good).status_code == 200
        large = httpx.post(post, files=files(b"\0" * 3_000_000), headers=good)  # sent whole, then answered
        assert large.status_code == 413

        def slowly():
            yield b"{"
            time.sleep(3)
            yield b"}"

        late = httpx.post(post, content=slowly(), headers=good | {"content-type": "application/json"})
        assert late.status_code == 408
        assert "within 2 seconds" in late.json()["error"]
        about = f"Authorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
        endings = ("Content-Length: 100\r\n\r\n{", "\r\n", "Transfer-Encoding: chunked\r\n\r\nzz\r\n")
        for name, ending in itertools.product((f"{host}:{port}", "a"), endings):
            head = f"POST /predict HTTP/1.1\r\nHost: {name}\r\n{about}"
            with socket.create_connection((host, int(port))) as cut:
                cut.sendall((head + ending).encode())
        for junk in (b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9.9\r\n\r\n", b"A" * 200_000):
            with socket.create_connection((host, int(port))) as bad:
                bad.settimeout(10)
                bad.sendall(junk)
        asking = http.client.HTTPConnection(host, int(port), timeout=20)
        for _ in range(3):  # one connection, kept
            asking.request("GET", "/adapters", headers=good)
            answer = asking.getresponse()
            assert (answer.status, answer.getheader("server")) == (200, None)
            answer.read()
        asking.close()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "Traceback" not in errors, errors
        assert TOKEN not in errors


def answer_of(address: tuple[str, int], sent: bytes) -> bytes:
    with socket.create_connection(address) as asking:
        asking.settimeout(20)
        asking.sendall(sent)
        return asking.recv(65536)


def test_heads_that_never_end_and_names_of_others(folders):
    """Connections that trickle are closed in time, at later requests too; only localhost's names are served."""
    with served(folders["probe"], "--timeout", "1", "--allow-host", "Birds.example") as (process, facts):
        host, port = facts["url"].removeprefix("http://").split(":")
        address = (host, int(port))
        whole = f"GET /health HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode()
        ended = 0
        for first in (b"", whole):
            with socket.create_connection(address) as slow:
                slow.settimeout(20)
                if first:
                    slow.sendall(first)
                    assert slow.recv(65536).startswith(b"HTTP/1.1 200")
                began = time.monotonic()
                with contextlib.suppress(ConnectionError):  # a write may be the first to notice
                    for letter in b"GET /health HTTP/1.1\r\nX-A: " + b"a" * 1000:
                        slow.sendall(bytes([letter]))
                        time.sleep(0.2)
                        slow.settimeout(0.01)
                        with contextlib.suppress(TimeoutError):
                            if slow.recv(100) == b"":
                                break
                assert time.monotonic() - began < 15
                ended += 1
        assert ended == 2
        assert answer_of(address, whole).startswith(b"HTTP/1.1 200")
        for name, status in (
            (f"localhost:{port}", b"200"),
            ("birds.example", b"200"),
            ("evil.example", b"421"),
            (f"evil.example:{port}", b"421"),
            ("127.0.0.1.evil.example", b"421"),
            ("", b"421"),
        ):
            sent = f"GET /health HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()
            assert answer_of(address, sent).split()[1] == status, name
        foreign = whole.replace(b"\r\n\r\n", b"\r\nSec-Fetch-Site: cross-site\r\n\r\n")
        assert answer_of(address, foreign).split()[1] == b"403"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (0, "")


def test_a_signal_that_comes_before_it_listens_is_heard(shelf, monkeypatch):
    said, before, run = [], signal.getsignal(signal.SIGTERM), uvicorn.Server.run

    def late(server, sockets=None):
        os.kill(os.getpid(), signal.SIGTERM)
        return run(server, sockets)

    monkeypatch.setattr(uvicorn.Server, "run", late)
    bound = bind("127.0.0.1", 0)
    serve(create_app(shelf), bound, Limits(), lambda: said.append("ready"))
    assert said == ["ready"]
    assert bound.fileno() == -1
    assert signal.getsignal(signal.SIGTERM) is before


def test_binding():
    with bind("127.0.0.1", 0) as one:
        assert is_local(one)
        assert url(one) == f"http://127.0.0.1:{one.getsockname()[1]}"
        one.listen()
        with pytest.raises(ConfigError, match="choose another --port"):
            bind("127.0.0.1", one.getsockname()[1])
    with bind("0.0.0.0", 0) as everywhere:
        assert not is_local(everywhere)
    for wrong in ("no.such.host.invalid", "8.8.8.8", "a b"):
        with pytest.raises(ConfigError):
            bind(wrong, 0)
