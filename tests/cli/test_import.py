"""`adaptkit import`: an official checkpoint gives the predictions it gave; the rest is refused in a line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from adaptkit.storage import read_safetensors

NAMES = "beech,oak,pine,yew"


@pytest.fixture
def trained(call, photos, tmp_path):
    """The folder of a CoOp run, and its context in the layout of CoOp's release: output/prompt_learner/…"""

    def make(*extra: object):
        words = ("--shots", 2, "--set", "training.epochs=2", "--set", "training.views=0", *extra)
        outcome = call("run", photos, "--method", "coop", *words, "--out", tmp_path / "run")
        assert outcome.exit_code == 0, outcome.output
        context = read_safetensors(tmp_path / "run/adapter/adapter_model.safetensors")["context"]
        part = tmp_path / "output" / "prompt_learner"
        part.mkdir(parents=True)
        state = {"ctx": context, "token_prefix": torch.ones(4, 1, 128), "token_suffix": torch.ones(4, 72, 128)}
        torch.save({"state_dict": state, "epoch": 50}, part / "model.pth.tar-50")
        torch.save({"state_dict": {**state, "ctx": context * 0}, "epoch": 9}, part / "model.pth.tar-9")
        (part / "checkpoint").write_text("model.pth.tar-50\n")
        return tmp_path / "run", tmp_path / "output"

    return make


def imported(call, *words: object) -> dict:
    outcome = call("import", *words, "--json")
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stderr == ""
    return json.loads(outcome.stdout)


def predictions(call, *words: object) -> list[dict]:
    outcome = call("predict", *words, "--top", 4, "--json")
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout)["predictions"]


@pytest.mark.parametrize("specific", ["false", "true"])
def test_the_same_predictions_come_back(call, photos, tmp_path, trained, specific):
    run, output = trained("--set", f"class_specific={specific}", "--set", "context_init=", "--set", "num_context=3")
    found = imported(call, output, "--method", "coop", "--classes", NAMES, "--out", tmp_path / "new")
    assert found["files"] == [str(output / "prompt_learner/model.pth.tar-50")]
    assert found["settings"]["num_context"] == 3
    assert found["settings"]["class_specific"] == (specific == "true")
    assert (found["taken"], found["ignored"]) == (["ctx"], 2)
    assert predictions(call, tmp_path / "new", photos) == predictions(call, run, photos)
    config = json.loads((tmp_path / "new/adapter_config.json").read_text())
    assert config["class_names"] == NAMES.split(",")
    assert config["facts"]["imported_from"].startswith("model.pth.tar-50 (sha256 ")


def test_the_table_says_what_was_taken(call, tmp_path, trained):
    _, output = trained()
    (tmp_path / "classnames.txt").write_text("n00000001 beech\nn00000002 red oak\nn00000003 pine\n")
    words = ("--method", "coop", "--classes", tmp_path / "classnames.txt", "--out", tmp_path / "new")
    outcome = call("import", output / "prompt_learner", *words)
    assert outcome.exit_code == 0, outcome.output
    for says in ("model.pth.tar-50", "beech, red oak, pine", "2 of 3 entries", "token_prefix"):
        assert says in outcome.stdout.replace("\n", "")
    assert "trained on 4 classes, and 3 class names were given" in outcome.stderr
    assert "predict with: adaptkit predict" in outcome.stderr
    assert call("import", output, *words).exit_code == 2  # --out is there
    assert call("import", output, *words, "--overwrite", "--set", "class_position=front").exit_code == 0
    assert json.loads((tmp_path / "new/adapter_config.json").read_text())["config"]["class_position"] == "front"


def test_each_mistake_is_one_sentence(call, tmp_path, trained):
    _, output = trained("--set", "class_specific=true", "--set", "context_init=", "--set", "num_context=3")
    out = tmp_path / "new"
    torch.save({"state_dict": {"of_nobody": torch.zeros(2)}}, tmp_path / "foreign.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    attempts = {
        (output, "--method", "coop", "--classes", "a,b,c"): "each of 4 classes, but 3 class names",
        (output, "--method", "cop", "--classes", NAMES): "Did you mean 'coop'",
        (output, "--method", "coop", "--classes", "digtis"): "Did you mean 'digits'",
        (output, "--method", "coop", "--classes", "absent.txt"): "There is no file absent.txt",
        (output, "--method", "coop", "--classes", "a,b,b,c"): "twice",
        (output, "--method", "coop", "--classes", NAMES, "--set", "num_contxt=2"): "did you mean 'num_context'",
        (output, "--method", "coop", "--classes", NAMES, "--template", "no place"): "places for the class name",
        (output, "--method", "coop", "--classes", NAMES, "--backbone", "mni"): "mni",
        (output, "--method", "clip-adapter", "--classes", NAMES): "its names fit coop",
        (output, "--method", "vpt", "--classes", NAMES): "coop",
        (tmp_path / "absent", "--method", "coop", "--classes", NAMES): "There is no checkpoint",
        (tmp_path / "text.pth", "--method", "coop", "--classes", NAMES): "text.pth",
        (tmp_path / "foreign.pth", "--method", "coop", "--classes", NAMES): "no other method",
        (tmp_path / "run", "--method", "coop", "--classes", NAMES): "holds no model.pth.tar-EPOCH",
    }
    for words, says in attempts.items():
        outcome = call("import", *words, "--out", out, "--json")
        assert outcome.exit_code == 2, words
        assert isinstance(outcome.exception, SystemExit), words
        assert outcome.stdout == "", words
        assert outcome.stderr.startswith("Error: "), words
        assert outcome.stderr.count("\n") == 1, outcome.stderr
        assert says in outcome.stderr, outcome.stderr
    assert not out.exists()


@pytest.mark.parametrize("verb", ["import", "explain"])
def test_help_loads_nothing_heavy(verb):
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom adaptkit.commands.main import main\n"
        f"result = CliRunner().invoke(main, [{verb!r}, '--help'])\nassert result.exit_code == 0, result.output\n"
        "print([name for name in ('torch', 'numpy', 'rich', 'PIL', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_help_says_that_class_names_are_not_in_the_files(call):
    shown = " ".join(call("import", "--help").output.split())
    assert "which the files don't hold" in shown
