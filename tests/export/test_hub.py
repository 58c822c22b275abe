"""Adapters go to the Hub and come back the same, by name and revision; what goes wrong is one sentence."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import constants, hf_api

from adaptkit import load
from adaptkit.commands.main import main
from adaptkit.commands.serve import find_adapters
from adaptkit.data.transforms import to_pixels
from adaptkit.errors import AdapterError, ConfigError, StorageError
from adaptkit.export.hub import fetch, push
from adaptkit.serving.shelf import Shelf
from tests.cli.conftest import call, photos  # noqa: F401  # fixtures
from tests.export.hub_server import hub
from tests.serving.made import COLOURS, picture, save_adapters

REPO = "somebody/leaves"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The only Hub there is, and a cache of its own; files travel by LFS, as in a hub without xet."""
    with hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
        monkeypatch.setenv("HF_TOKEN", running.token)
        monkeypatch.setattr(hf_api.api, "endpoint", running.url)
        yield running


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_adapters(tmp_path_factory.mktemp("adapters"))


def test_there_and_back(server, folders, tmp_path):
    sent = push(folders["sure"], REPO, licence="apache-2.0", private=True)
    assert sent.url == f"{server.url}/{REPO}"
    assert sent.name == f"hf-hub:{REPO}@{sent.commit}"
    assert server.private == {REPO: True}
    assert set(server.commits[REPO][-1][1]) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    images = [picture(label, 7) for label in COLOURS]
    wanted = load(folders["sure"]).predict_proba(images)
    for name in (sent.name, f"hf-hub:{REPO}", f"hf-hub:{REPO}@main"):
        np.testing.assert_array_equal(load(name).predict_proba(images), wanted)


def test_a_revision_stays_what_it_was(server, folders):
    first = push(folders["probe"], REPO)
    second = push(folders["cache"], REPO)
    assert first.commit != second.commit
    assert load(first.name).method == "linear-probe"
    assert load(f"hf-hub:{REPO}").method == "tip-adapter"
    server.broken = True  # what was fetched is there
    before = len(server.asked)
    assert fetch(first.name).name == first.commit
    assert [path for method, path in server.asked[before:] if "/resolve/" in path] == []


def test_only_an_adapter_s_files_are_fetched(server, folders):
    push(folders["probe"], REPO)
    files = server.commits[REPO][-1][1]
    files |= {"evil.py": b"raise SystemExit", "pytorch_model.bin": b"\x80\x04.", "deep/adapter_config.json": b"{}"}
    folder = fetch(f"hf-hub:{REPO}")
    assert sorted(path.name for path in folder.rglob("*")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_card_of_a_run(server, call, photos, tmp_path):  # noqa: F811
    outcome = call("run", photos, "--method", "linear-probe", "--shots", 4, "--out", tmp_path / "out")
    assert outcome.exit_code == 0, outcome.output
    before = (tmp_path / "out/adapter/adapter_config.json").read_bytes()
    outcome = call("push", tmp_path / "out", REPO, "--licence", "mit", "--json")
    assert outcome.exit_code == 0, outcome.output
    sent = json.loads(outcome.stdout)
    files = server.commits[REPO][-1][1]
    card = files["README.md"].decode()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "mit"
    assert header["library_name"] == "adaptkit"
    result = json.loads((tmp_path / "out/result.json").read_text())
    (part,) = result["parts"]
    for fact in (
        f"| all | 4 | {part['correct']} | {part['total']} |",
        result["key"]["split_digest"],
        result["few_shot_digest"],
        "4 per class",
        "95 % interval",
        "digest `",
        "hardware: cpu",
        "data: not known",
        "`mini` is a test bed",
    ):
        assert fact in card, fact
    everything = b"".join(files[name] for name in ("README.md", "adapter_config.json"))
    assert str(tmp_path).encode() not in everything  # where the photos lie is nobody's matter
    assert (tmp_path / "out/adapter/adapter_config.json").read_bytes() == before
    outcome = call("predict", sent["name"], photos / "oak/0.png", "--json")
    assert outcome.exit_code == 0, outcome.output
    outcome = call("push", tmp_path / "out", REPO, "--dry-run")
    assert outcome.exit_code == 0
    assert "license" not in outcome.stdout
    assert outcome.stdout == card.replace("license: mit\n", "").replace("adapter: mit", "adapter: not stated")
    assert len(server.commits[REPO]) == 1


def test_names_on_the_hub_are_taken_by_every_verb(server, folders, call, photos, tmp_path):  # noqa: F811
    """By `predict`, `export` and `serve`; by commit, by branch, and in a server's NAME=ADAPTER."""
    sent = push(folders["sure"], REPO)
    image = photos / "oak/0.png"
    wanted = json.loads(call("predict", folders["sure"], image, "--coverage", 0.9, "--json").stdout)["predictions"]
    asked = 0
    for name in (sent.name, f"hf-hub:{REPO}", f"hf-hub:{REPO}@main"):
        outcome = call("predict", name, image, "--coverage", 0.9, "--json")
        assert outcome.exit_code == 0, outcome.output
        assert json.loads(outcome.stdout)["predictions"] == wanted
        assert "36 held-out images" in outcome.stderr
        asked += 1
    assert asked == 3
    outcome = call("export", sent.name, "--format", "torch", "--coverage", 0.9, "--out", tmp_path / "out", "--json")
    assert outcome.exit_code == 0, outcome.output
    report = json.loads(outcome.stdout)["parity"]
    assert report["models"]["model.pt2"]["same_sets"] == 1
    assert "36 held-out images" in report["sets"]["warning"]
    push(folders["cache"], "somebody/numbers")
    found = find_adapters([sent.name, "numbers=hf-hub:somebody/numbers@main"])
    assert list(found) == ["leaves", "numbers"]
    shelf = Shelf(found)
    pixels = to_pixels(picture("oak", 7), shelf.backbone.spec.preprocessing)
    (answer,) = shelf.answer(pixels[None], [("leaves", "numbers")])
    assert {name: len(row) for name, row in answer.items()} == {"leaves": 3, "numbers": 3}
    with pytest.raises(AdapterError, match="no such repository"):
        find_adapters(["hf-hub:somebody/nothing"])
    for words in (("predict", "hf-hub:somebody/nothing", image), ("export", "hf-hub:a/b/c", "--out", tmp_path / "x")):
        outcome = call(*words)
        assert (outcome.exit_code, outcome.stdout) == (2, "")
        assert "Traceback" not in outcome.output


def test_nothing_else_of_this_machine_is_sent(server, folders, tmp_path):
    """Neither other files of the folder, nor links out of it, nor where a backbone lies."""
    folder = tmp_path / "mine"
    shutil.copytree(folders["probe"], folder)
    for name in ("credentials.json", "faces.safetensors", "notes.txt", "peft/adapter_config.json", "peft/secret.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "linked").mkdir()
    (folder / "linked" / "adapter_config.json").symlink_to(folder / "credentials.json")
    config = json.loads((folder / "adapter_config.json").read_text())
    told = 0
    for name, shown in (
        ("local-dir:/home/me/models/birds@int8", "local-dir:birds@int8"),
        (f"transformers:{tmp_path}", f"transformers:{tmp_path.name}"),
        ("transformers:~/models/clip", "transformers:clip"),
        ("transformers:openai/clip-vit-base-patch16", "transformers:openai/clip-vit-base-patch16"),
        ("ViT-B-16/openai", "ViT-B-16/openai"),
    ):
        config["backbone"]["name"] = name
        (folder / "adapter_config.json").write_text(json.dumps(config))
        push(folder, REPO)
        files = server.commits[REPO][-1][1]
        assert set(files) == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "peft/adapter_config.json",
        }
        assert json.loads(files["adapter_config.json"])["backbone"]["name"] == shown
        assert str(tmp_path).encode() not in files["README.md"] + files["adapter_config.json"]
        assert b"/home" not in files["README.md"]
        told += 1
    assert told == 5
    push(folders["cache"], REPO)  # nothing of the adapter before is left beside it
    assert set(server.commits[REPO][-1][1]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_refusals(server, folders, tmp_path, monkeypatch):
    for repo in ("leaves", "a/b/c", "../x", "user/na me", ""):
        with pytest.raises(ConfigError, match="write user/name"):
            push(folders["probe"], repo)
        with pytest.raises(ConfigError, match="write user/name"):
            fetch(f"hf-hub:{repo}")
    with pytest.raises(ConfigError, match="names no revision"):
        fetch(f"hf-hub:{REPO}@")
    with pytest.raises(AdapterError, match="no such repository"):
        fetch(f"hf-hub:{REPO}")
    push(folders["probe"], REPO)
    with pytest.raises(AdapterError, match="no such revision"):
        fetch(f"hf-hub:{REPO}@nope")
    with pytest.raises(AdapterError, match="not an adapter folder"):
        push(tmp_path, REPO)
    server.commits["somebody/model"] = [("f" * 40, {"model.safetensors": b"x"})]
    with pytest.raises(AdapterError, match="not an adapter folder"):
        load("hf-hub:somebody/model")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConfigError, match="hf auth login"):
        push(folders["probe"], "somebody/else")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="can't be reached"):
        fetch("hf-hub:somebody/new")
    outcome = CliRunner().invoke(main, ["push", str(folders["probe"]), "no name", "--dry-run"])
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    outcome = CliRunner().invoke(main, ["predict", "hf-hub:somebody/new", "a.png"])
    assert outcome.exit_code == 2, outcome.output
