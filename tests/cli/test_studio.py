"""The verb `studio`: what it refuses, and the real server: started, used, killed, started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import parse_qs, urlsplit

import pytest

pytest.importorskip("uvicorn", reason="uvicorn isn't installed (the studio extra brings it)")

from tests.studio.conftest import write_folder


def test_wrong_use_is_said_in_one_sentence(refused, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.txt").write_text("x")
    assert "isn't empty" in refused("studio", tmp_path / "full", "--no-browser", "--port", 0)
    assert "There is no folder" in refused("studio", tmp_path / "new", "--images", tmp_path / "none", "--port", 0)
    assert "nonsense" in refused("studio", tmp_path / "new", "--backbone", "nonsense", "--port", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "can't be used" in refused("studio", tmp_path / "new", "--port", taken.getsockname()[1])
    assert "Invalid value" in refused("studio", tmp_path / "new", "--port", 99999)
    assert not (tmp_path / "new").exists()  # nothing of it left a project behind


def test_help_has_an_example(call):
    shown = call("studio", "--help")
    assert shown.exit_code == 0
    assert "adaptkit studio birds" in shown.output


class Running:
    """A studio in a process of its own."""

    def __init__(self, *words: object) -> None:
        code = "from adaptkit.commands.main import main; main()"
        command = [sys.executable, "-c", code, "studio", *map(str, words), "--no-browser", "--json", "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
        assert self.process.stdout is not None
        lines = ""
        for line in self.process.stdout:
            lines += line
            if line.startswith("}"):
                break
        self.url = json.loads(lines)["url"]
        parts = urlsplit(self.url)
        self.base, self.token = f"http://{parts.netloc}", parse_qs(parts.query)["token"][0]

    def ask(self, path: str, body: object = None, token: str | None = None) -> dict:
        headers = {"x-studio-token": self.token if token is None else token, "content-type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.base + path, data, headers), timeout=30) as answer:
            return json.load(answer)

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(20)


def test_killed_and_started_again_it_stands_where_it_was(tmp_path):
    photos = write_folder(tmp_path / "photos", 2)
    first = Running(tmp_path / "work", "--images", photos)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        first.ask("/api/state", token="wrong")
    first.ask("/api/classes", {"names": ["yellow"]})
    while first.ask("/api/progress")["progress"]:
        time.sleep(0.1)
    images = first.ask("/api/state")["images"]
    assert len(images) == 6
    before = first.ask("/api/label", {"images": [images[0]["id"]], "label": None})
    first.end(signal.SIGKILL)
    second = Running(tmp_path / "work")
    try:
        state = second.ask("/api/state")
        assert {key: state[key] for key in ("classes", "images", "undo")} == {
            key: before[key] for key in ("classes", "images", "undo")
        }
        assert second.token != first.token
    finally:
        assert second.end(signal.SIGINT) == 0
