"""`adaptkit serve`: what it finds, what it refuses before it starts, and how it takes a token."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from adaptkit.commands import serve
from adaptkit.errors import ConfigError

TOKEN = "a-token-of-some-length"


@pytest.fixture
def runs(call, photos, tmp_path) -> Path:
    """Two finished runs in one folder."""
    for method in ("zero-shot", "linear-probe"):
        outcome = call("run", photos, "--method", method, "--shots", 4, "--out", tmp_path / "runs" / method)
        assert outcome.exit_code == 0, outcome.output
    return tmp_path / "runs"


def test_what_is_found(runs, tmp_path):
    both = {name: runs / name / "adapter" for name in ("linear-probe", "zero-shot")}
    assert serve.find_adapters([str(runs)]) == both
    assert serve.find_adapters([str(runs / "zero-shot"), str(runs / "linear-probe/adapter")]) == both
    assert serve.find_adapters([f"birds={runs / 'zero-shot'}"]) == {"birds": runs / "zero-shot/adapter"}
    (runs / "best").symlink_to("zero-shot")  # as `compare` leaves it
    for best in ("best", "best/adapter"):
        assert serve.find_adapters([str(runs / best)]) == {"best": runs / "best/adapter"}
    assert list(serve.find_adapters([str(runs)])) == ["best", "linear-probe", "zero-shot"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as refused:
        serve.find_adapters([str(tmp_path / "empty"), str(runs / "nope"), f"two={runs}", str(runs), str(runs)])
    for part in ("empty is no adapter folder", "nope is no adapter folder", "can name only one", "both called"):
        assert part in str(refused.value)


def test_the_server_gets_what_was_asked_for(call, runs, monkeypatch):
    """All but the serving itself."""
    from adaptkit.serving import server

    calls = []
    monkeypatch.setattr(server, "serve", lambda app, bound, limits, ready: (calls.append(limits), ready()))
    outcome = call("serve", runs, "--port", 0, "--max-images", 3, "--timeout", 7, "--max-body", 2)
    assert outcome.exit_code == 0, outcome.output
    assert "Serving linear-probe, zero-shot on http://127.0.0.1:" in outcome.output
    assert "Only this machine can reach it" in outcome.output
    assert (calls[0].images, calls[0].seconds, calls[0].body_bytes) == (3, 7, 2 * 2**20)
    outcome = call("serve", runs / "zero-shot", "--port", 0, "--host", "0.0.0.0")
    assert "warning: every machine that reaches it can ask it" in outcome.output
    monkeypatch.setenv(serve.TOKEN_VARIABLE, TOKEN)
    outcome = call("serve", runs / "zero-shot", "--port", 0, "--host", "0.0.0.0")
    assert "with the token" in outcome.output
    assert TOKEN not in outcome.output
    assert len(calls) == 3


def test_refusals(refused, call, runs, photos, tmp_path, monkeypatch):
    assert "Missing argument" in refused("serve")
    assert "is no adapter folder" in refused("serve", photos)
    assert "No such option" in refused("serve", runs, "--token", TOKEN)  # it would show in the list of processes
    assert "isn't an address of this machine" in refused("serve", runs, "--host", "no.such.host.invalid")
    assert "may wait" in refused("serve", runs, "--max-images", 300)
    assert "Did you mean 'mini'" in refused("serve", runs, "--backbone", "minni", "--port", 0)
    outcome = call("run", photos, "--method", "transclip", "--shots", 4, "--out", tmp_path / "trans")
    assert outcome.exit_code == 0, outcome.output
    message = refused("serve", tmp_path / "trans", runs, "--port", 0).replace("\n", " ")
    assert "trans: transclip can't be folded" in message


def test_a_missing_extra_is_one_sentence(refused, runs, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else find(name))
    assert "Serving needs fastapi: pip install 'adaptkit[serve]'." in refused("serve", runs)


def test_tokens(tmp_path):
    path = tmp_path / "token"
    path.write_text(f"  {TOKEN}\n")
    assert serve.read_token(path, {}) == TOKEN
    assert serve.read_token(path, {serve.TOKEN_VARIABLE: "another-token-of-some-length"}) == TOKEN
    assert serve.read_token(None, {serve.TOKEN_VARIABLE: TOKEN}) == TOKEN
    assert serve.read_token(None, {}) is None
    refusals = 0
    for content in (b"", b"short", b"\n\n", b"two words of some length", b"\xff" * 20, b"a" * 20 + b"\0"):
        path.write_bytes(content)
        with pytest.raises(ConfigError) as refused:
            serve.read_token(path, {})
        assert "token" in str(refused.value)
        assert "short" not in str(refused.value)
        refusals += 1
    with pytest.raises(ConfigError, match="can't be read"):
        serve.read_token(tmp_path / "none", {})
    with pytest.raises(ConfigError, match=r"\$ADAPTKIT_SERVE_TOKEN"):
        serve.read_token(None, {serve.TOKEN_VARIABLE: ""})
    assert refusals == 6
