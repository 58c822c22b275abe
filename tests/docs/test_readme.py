"""What the README shows runs: its Python, and every verb and option of its command lines."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from adaptkit.commands.main import main
from adaptkit.data.catalogue import CATALOGUE
from tests.cli.test_describe import save_model
from tests.data.test_legacy import datum, save  # noqa: F401  # a fixture among them
from tests.data.trees import grow

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(
    set(
        re.findall(
            r"`(adaptkit (?:describe|run|compare|predict|export|push|import|explain|list|data|doctor|sweep)[^`]*)`",
            README,
        )
    )
)


@pytest.fixture
def photos(tmp_path, monkeypatch, datum):  # noqa: F811
    """In the current folder: my_photos/ with two classes of eight images, new/ with two, output/ with a checkpoint,
    data/ with a tiny EuroSAT, and a legacy cache of it."""
    numbers = np.random.default_rng(0)
    for label, colour in (("beech", (40, 160, 60)), ("oak", (200, 60, 40))):
        folder = tmp_path / "my_photos" / label
        folder.mkdir(parents=True)
        for index in range(8):
            noisy = np.clip(np.array(colour) + numbers.integers(-30, 30, (40, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"{index}.jpg")
    (tmp_path / "new").mkdir()
    Image.open(tmp_path / "my_photos/oak/0.jpg").save(tmp_path / "new/1.jpg")
    Image.open(tmp_path / "my_photos/beech/1.jpg").save(tmp_path / "new/2.jpg")
    Image.open(tmp_path / "my_photos/oak/3.jpg").save(tmp_path / "photo.png")
    (tmp_path / "output/prompt_learner").mkdir(parents=True)  # what CoOp's release leaves behind
    torch.save({"state_dict": {"ctx": torch.zeros(4, 128)}}, tmp_path / "output/prompt_learner/model.pth.tar-50")
    save_model(tmp_path / "llm", "causal", positions=1024)
    (tmp_path / "classnames.txt").write_text("beech\noak\n")
    grow(tmp_path / "data", CATALOGUE["eurosat"])
    listed = json.loads((tmp_path / "data/eurosat/split_zhou_EuroSAT.json").read_text())["train"]
    save(tmp_path / "shot_1-seed_1.pkl", {"train": [datum(f"/somewhere/{path}", label) for path, label, _ in listed]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAPTKIT_CACHE", str(tmp_path / "cache"))


def test_python_blocks(photos, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        exec(
            compile(
                block.replace("ViT-B-16/openai", "mini").replace("tip-adapter", "linear-probe"), "README.md", "exec"
            ),
            {},
        )
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "['oak' 'beech']"
    assert printed[-1] == "oak"


def test_command_lines(photos):
    assert len(COMMANDS) >= 9
    order = {
        "describe": -1,
        "run": 0,
        "compare": 1,
        "predict": 2,
        "export": 2,
        "push": 2,
        "import": 3,
        "explain": 4,
        "list": 5,
        "data": 6,
        "doctor": 7,
        "sweep": 8,
    }
    for line in sorted(COMMANDS, key=lambda text: order[text.split()[1]]):
        words = [word.replace("ViT-B-16/openai", "mini") for word in shlex.split(line)[1:]]
        outcome = CliRunner().invoke(main, words)
        assert outcome.exit_code == 0, f"{line}: {outcome.output}"


def fenced_lines():
    return [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]


def test_fenced_command_lines_are_understood():
    lines = fenced_lines()
    assert len(lines) >= 3
    for line in lines:
        program, verb, *words = shlex.split(line)
        assert program == "adaptkit"
        command = main.get_command(click.Context(main), verb)
        given = command.make_context(verb, words).params
        method = given["method"] if verb == "run" else "mllm-zero-shot"
        assert f"`{method}`" in README


@pytest.mark.slow
def test_fenced_command_lines_run(photos):
    for line in fenced_lines():
        outcome = CliRunner().invoke(main, shlex.split(line)[1:])
        assert outcome.exit_code == 0, f"{line}: {outcome.output}"


def test_the_makefile_runs_what_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert (ROOT / re.findall(r"predict \S+ (\S+?\.png)", makefile)[0]).is_file()
    for target in ("run", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, re.M)
