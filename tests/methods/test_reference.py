"""Checkpoints written in the layouts of the official releases are read; anything that could run code is refused."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adaptkit.errors import AdapterError, MissingPathError, UnsupportedError
from adaptkit.methods.adapters.clip_adapter import CLIPAdapter
from adaptkit.methods.adapters.zero_shot import ZeroShot
from adaptkit.methods.caches.tip_adapter import TipAdapter
from adaptkit.methods.prompts.coop import CoOp, CoOpConfig
from adaptkit.methods.prompts.maple import MaPLe, MaPLeConfig
from adaptkit.methods.reference import read_reference_checkpoint
from tests.methods.tiny import NAMES, make_task, query, tiny_clip

BACKBONE = tiny_clip()


def dassl_file(path, state):
    """What Dassl's `save_checkpoint` writes for CoOp and MaPLe: model, optimiser and scheduler state, epoch, result."""
    trained = torch.nn.Linear(2, 2)
    optimiser = torch.optim.SGD(trained.parameters(), lr=2e-3, momentum=0.9)
    trained(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 50)
    content = {
        "state_dict": state,
        "epoch": 50,
        "optimizer": optimiser.state_dict(),
        # the warm-up schedule's state holds its successor as a whole object, and that one the optimiser
        "scheduler": {"successor": cosine, "warmup_epoch": 1, "cons_lr": 1e-5, "last_epoch": 50},
        "val_result": np.float64(71.5),
    }
    torch.save(content, path)
    return path


def test_coop_checkpoint(tmp_path):
    context = torch.randn(4, 16).half()
    state = {
        "ctx": context,
        "token_prefix": torch.randn(7, 1, 16).half(),  # of the classes it was trained on: not ours
        "token_suffix": torch.randn(7, 72, 16).half(),
    }
    path = dassl_file(tmp_path / "model.pth.tar-50", state)
    method = CoOp(BACKBONE, NAMES, config=CoOpConfig(num_context=4))
    method.load_reference_state(read_reference_checkpoint(path))
    assert torch.equal(method.context, context.float())


def maple_state(text=16, image=24, count=2, depth=3):
    state = {
        "prompt_learner.ctx": torch.randn(count, text).half(),
        "prompt_learner.proj.weight": torch.randn(image, text).half(),
        "prompt_learner.proj.bias": torch.randn(image).half(),
        "prompt_learner.token_prefix": torch.randn(9, 1, text).half(),
        "prompt_learner.token_suffix": torch.randn(9, 74, text).half(),
        "image_encoder.class_embedding": torch.randn(image),  # the whole CLIP comes along
        "logit_scale": torch.tensor(4.6),
    }
    for layer in range(depth - 1):
        state[f"prompt_learner.compound_prompts_text.{layer}"] = torch.randn(count, text)
        state[f"prompt_learner.compound_prompt_projections.{layer}.weight"] = torch.randn(image, text)
        state[f"prompt_learner.compound_prompt_projections.{layer}.bias"] = torch.randn(image)
    return state


def test_maple_checkpoint(tmp_path):
    state = maple_state()
    method = MaPLe(BACKBONE, NAMES, config=MaPLeConfig(depth=3))
    method.load_reference_state(read_reference_checkpoint(dassl_file(tmp_path / "model.pth.tar-5", state)))
    assert torch.equal(method.contexts[2], state["prompt_learner.compound_prompts_text.1"])
    assert torch.equal(method.couplings[0].bias, state["prompt_learner.proj.bias"].float())
    assert torch.equal(method.couplings[1].weight, state["prompt_learner.compound_prompt_projections.0.weight"])


def test_other_settings_than_the_checkpoints(tmp_path):
    path = dassl_file(tmp_path / "model.pth.tar-5", maple_state(depth=2))
    with pytest.raises(AdapterError, match=r"has no 'prompt_learner.compound_prompts_text.1'.*other settings"):
        MaPLe(BACKBONE, NAMES, config=MaPLeConfig(depth=3)).load_reference_state(read_reference_checkpoint(path))
    with pytest.raises(AdapterError, match=r"shape \(2, 16\), \(1, 16\) was expected"):
        MaPLe(BACKBONE, NAMES, config=MaPLeConfig(1, 2)).load_reference_state(read_reference_checkpoint(path))


def test_clip_adapter_checkpoint_as_safetensors(tmp_path):
    state = {"adapter.fc.0.weight": torch.randn(4, 16), "adapter.fc.2.weight": torch.randn(16, 4)}
    save_file(state, tmp_path / "adapter.safetensors")
    method = CLIPAdapter(BACKBONE, NAMES)
    method.load_reference_state(read_reference_checkpoint(tmp_path / "adapter.safetensors"))
    assert torch.equal(method.up.weight, state["adapter.fc.2.weight"])
    assert float(method.ratio) == pytest.approx(0.2)


def test_tip_adapter_files(tmp_path):
    fitted = TipAdapter(BACKBONE, NAMES)
    fitted.fit(make_task(BACKBONE, "image_features", val=False))
    torch.save(fitted.keys.T, tmp_path / "keys_4shots.pt")
    torch.save(torch.nn.functional.one_hot(fitted.key_labels).half(), tmp_path / "values_4shots.pt")
    state = read_reference_checkpoint(tmp_path / "keys_4shots.pt", tmp_path / "values_4shots.pt")
    assert set(state) == {"keys", "values"}
    method = TipAdapter(BACKBONE, NAMES)
    method.load_reference_state(state)
    with torch.no_grad():
        features = query(BACKBONE, "image_features")
        assert torch.equal(method(features), fitted(features))


def test_files_that_could_run_code_are_refused(tmp_path):
    torch.save({"state_dict": {"ctx": torch.zeros(1)}, "args": argparse.Namespace(x=1)}, tmp_path / "unsafe.pth")
    with pytest.raises(AdapterError, match=r"an object of type argparse.Namespace, which could run code"):
        read_reference_checkpoint(tmp_path / "unsafe.pth")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("name", ["damaged.pt", "damaged.safetensors"])
def test_damaged_files(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterError):
        read_reference_checkpoint(tmp_path / name)


def test_what_is_not_a_checkpoint(tmp_path):
    with pytest.raises(MissingPathError, match="There is no checkpoint"):
        read_reference_checkpoint(tmp_path / "absent.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(AdapterError, match="holds a list"):
        read_reference_checkpoint(tmp_path / "list.pt")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "empty.pt")
    with pytest.raises(AdapterError, match="no tensors by name"):
        read_reference_checkpoint(tmp_path / "empty.pt")
    torch.save(torch.zeros(2), tmp_path / "keys_1shots.pt")
    torch.save(torch.zeros(2), tmp_path / "keys_2shots.pt")
    with pytest.raises(AdapterError, match="'keys', which another of the files holds too"):
        read_reference_checkpoint(tmp_path / "keys_1shots.pt", tmp_path / "keys_2shots.pt")


def test_methods_without_checkpoints_say_so():
    method = ZeroShot(BACKBONE, NAMES)
    with pytest.raises(UnsupportedError, match="zero-shot has no reference checkpoints to read"):
        method.load_reference_state({})
