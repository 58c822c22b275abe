"""Checkpoints: a training that is killed goes on as if nothing had happened; what is damaged or foreign is said."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from adaptkit.errors import AdaptKitWarning, StorageError
from adaptkit.methods import methods
from adaptkit.methods.base import GradientMethod
from adaptkit.methods.prompts.promptsrc import PromptSRCConfig
from adaptkit.training.checkpoints import Checkpoints
from adaptkit.training.loop import fit_method
from tests.backbones import tiny_mllm
from tests.methods.tiny import DESCRIPTIONS, NAMES, make_task, tiny_clip
from tests.quick import short_answers

GRADIENT = tuple(name for name in methods if issubclass(methods.get(name), GradientMethod) and name != "gist")
"""All but one, which trains by this loop only on request."""

FAST = ("coop", "clap", "ape-t", "tip-adapter-f", "prograd", "mllm-soft-prompt")
"""Each with something of its own: SGD, buffers that change, the best epoch, a cache, two gradients, an MLLM."""


class Killed(Exception):
    """Stands for whatever ends a process."""


@lru_cache(maxsize=4)
def backbone_for(kind, layers=12):
    return tiny_mllm.load(kind) if kind else tiny_clip(layers=layers)


def fit(name, folder=None, kill_at=None, config=None, identity="a", **changes):
    """A method after 3 epochs of 3 steps, and the report; on request ended before step `kill_at` + 1."""
    kind = methods.get(name)
    backbone = backbone_for(tiny_mllm.kind_for(name) if kind.needs_mllm else "", 12 if config is None else 3)
    config = short_answers(config or kind.config_class())
    method = kind(backbone, NAMES, seed=3, descriptions=DESCRIPTIONS, config=config)
    settings = replace(kind.default_training, epochs=3, batch_size=3, keep_last=True, steps_per_shot=0, **changes)
    kept = None if folder is None else Checkpoints(folder, identity, every=0)

    def shown(what, done, total):
        if kill_at is not None and "epoch" in what and done >= kill_at:
            raise Killed

    task = make_task(backbone, kind.reads, shots=2)
    try:
        report = fit_method(method, task, settings, shown if kill_at is not None else None, None, kept)
    except Killed:
        report = None
    return method.adapter_state(), report


def same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture(autouse=True)
def every_step_shown(monkeypatch):
    monkeypatch.setattr("adaptkit.training.loop._PROGRESS_SECONDS", 0.0)


def test_how_many_methods_there_are():
    assert len(GRADIENT) >= 20


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in GRADIENT]
)
def test_every_method_goes_on_as_if_nothing_had_happened(name, tmp_path):
    whole, report = fit(name)
    _, nothing = fit(name, tmp_path / "kept", kill_at=5)  # in the middle of the second epoch
    assert nothing is None
    resumed, again = fit(name, tmp_path / "kept")
    same(whole, resumed)
    assert again["resumed_at"] > 0
    for key in ("losses", "accuracies", "learning_rates", "loss_terms", "steps", "epochs"):
        assert again[key] == report[key], key


@pytest.mark.parametrize("averaging", ["prompts", "reference"])
def test_averages_over_epochs_go_on(averaging, tmp_path):
    config = PromptSRCConfig(averaging=averaging, text_depth=2, image_depth=2)
    whole, _ = fit("promptsrc", config=config)
    fit("promptsrc", tmp_path / "kept", kill_at=7, config=config)
    same(whole, fit("promptsrc", tmp_path / "kept", config=config)[0])


REMEMBERING = {
    "virft reuses": ("virft", {"reuse": 2, "resample": 1, "scale_rewards": False}),
    "virft keeps nothing near": ("virft", {"reuse": 3, "beta": 0.0}),
    "dive-k refreshes": ("dive-k", {"refresh_every": 1, "reuse": 2, "rollouts": 3}),
    "dive-k by likelihood": ("dive-k", {"refresh_every": 2, "mined_from": "likelihood"}),
    "twin is rewarded": ("twin", {"mode": "grpo", "explain": False, "reuse": 2, "max_tokens": 3, "held_out": 0.5}),
    "twin is unbalanced": ("twin", {"ratio": 2.0, "balanced": False, "dropout": 0.1}),
    "prior tunes its reference": ("prior", {"reference": "self-text-tuned", "reference_epochs": 1}),
    "recaption with letters": ("recaption", {"variant": "letters", "dropout": 0.1}),
    "lora with letters": ("mllm-lora", {"variant": "letters", "dropout": 0.1, "micro_batch": 2}),
    "frozen and a teacher": ("frozen", {"align_to": "p-former", "teacher_steps": 2}),
    "magma with a prefix": ("magma", {"kind": "scaled-parallel", "prefix": "pooled"}),
    "qformer in two stages": ("qformer", {"stages": "1+2"}),
}
"""Settings under which a method has more to go on from than its parameters."""

QUICK = ("virft reuses", "dive-k refreshes", "twin is rewarded")


@pytest.mark.parametrize("kill_at", [5, pytest.param(7, marks=pytest.mark.slow)])  # within an epoch; between two
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param(*case, id=what, marks=[] if what in QUICK else pytest.mark.slow)
        for what, case in REMEMBERING.items()
    ],
)
def test_what_a_method_remembers_goes_on(name, settings, kill_at, tmp_path):
    config = methods.get(name).config_class(**settings)
    whole, report = fit(name, config=config)
    fit(name, tmp_path / "kept", kill_at, config)
    resumed, again = fit(name, tmp_path / "kept", config=config)
    same(whole, resumed)
    assert 0 < again.pop("resumed_at") < kill_at
    assert {**again, "seconds": 0} == {**report, "seconds": 0}


# --- a process that is killed -----------------------------------------------------------------------------------------

SCRIPT = """
import sys, time
from pathlib import Path
from tests.training import test_checkpoints as tests
import adaptkit.training.loop as loop
loop._PROGRESS_SECONDS = 0.0
save = loop._Run._save
def slowly(self, *given):
    save(self, *given)
    time.sleep(0.3)
loop._Run._save = slowly
tests.fit(sys.argv[1], Path(sys.argv[2]))
"""


@pytest.mark.parametrize("name", ["mllm-soft-prompt", pytest.param("mllm-lora", marks=pytest.mark.slow)])
def test_a_killed_process_goes_on_bit_for_bit(name, tmp_path):
    whole, _ = fit(name)
    folder = tmp_path / "kept"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, name, folder], cwd=Path(__file__).parents[2])
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None and len(checkpoints(folder)) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was still training
    resumed, report = fit(name, folder)
    assert 0 < report["resumed_at"] < report["steps"]
    same(whole, resumed)


# --- damage -----------------------------------------------------------------------------------------------------------


def checkpoints(folder):
    return sorted(path for path in folder.glob("*-*") if not path.name.startswith("."))


@pytest.fixture
def kept(tmp_path):
    """A folder with the last two checkpoints of a training that was ended after 5 steps."""
    fit("coop", tmp_path / "kept", kill_at=5)
    assert [path.name for path in checkpoints(tmp_path / "kept")] == ["000-000000003", "000-000000004"]
    return tmp_path / "kept"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut off": lambda path: truncate(path / "state.safetensors"),
    "one bit": lambda path: flip(path / "state.safetensors"),
    "no tensors": lambda path: (path / "state.safetensors").unlink(),
    "no facts": lambda path: (path / "state.json").unlink(),
    "facts cut off": lambda path: truncate(path / "state.json"),
    "hostile facts": lambda path: (path / "state.json").write_text('{"schema": 1, "steps": [[[]]]}'),
    "not a mapping": lambda path: (path / "state.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage, kept):
    damage(checkpoints(kept)[-1])
    with pytest.warns(AdaptKitWarning, match="can't be used, so training went on from an earlier one or began anew"):
        resumed, report = fit("coop", kept)
    assert report["resumed_at"] == 3
    same(fit("coop")[0], resumed)


def test_without_a_good_one_training_begins_anew(kept):
    for path in checkpoints(kept):
        truncate(path / "state.safetensors")
    with pytest.warns(AdaptKitWarning) as said:
        resumed, report = fit("coop", kept)
    assert len(said) == 2
    assert "resumed_at" not in report
    same(fit("coop")[0], resumed)


def test_a_half_written_one_is_not_seen(kept):
    shutil.copytree(checkpoints(kept)[-1], kept / ".000-000000009.1.ab.tmp")
    assert fit("coop", kept)[1]["resumed_at"] == 4


def test_another_runs_training_is_refused_unless_it_may_be_dropped(kept):
    with pytest.raises(StorageError, match=r"half-finished training with other settings or data.*--overwrite"):
        Checkpoints(kept, "b")
    with pytest.raises(StorageError, match="1 processes instead of 2"):
        Checkpoints(kept, "a", processes=2)
    assert Checkpoints(kept, "b", replace=True).begin() == (0, None)
    assert not kept.exists()


def test_a_full_disk_costs_the_checkpoint_and_not_the_training(tmp_path):
    (tmp_path / "kept").write_text("a file where the folder should be")
    with pytest.warns(AdaptKitWarning, match="no more checkpoints are written"):
        assert fit("coop", tmp_path / "kept")[1]["steps"] == 9


def test_only_plain_files_and_no_pickle(kept):
    newest = checkpoints(kept)[-1]
    assert sorted(path.name for path in newest.iterdir()) == ["state.json", "state.safetensors"]
    facts = json.loads((newest / "state.json").read_text())
    assert (facts["epoch"], facts["step"], facts["steps"]) == (1, 1, 4)


def test_global_random_states_go_on(tmp_path):
    """What else in the process draws from NumPy's and Python's numbers."""
    drawn = []

    def fit_with_draws(folder, kill_at=None):
        random.seed(1)
        np.random.seed(1)
        drawn.clear()
        fit("coop", folder, kill_at)

    fit_with_draws(tmp_path / "kept", 5)
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit("coop", tmp_path / "kept")
    assert torch.equal(torch.get_rng_state(), before)  # torch's are put back afterwards, as ever
    state = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    assert state == (random.random(), np.random.rand())
