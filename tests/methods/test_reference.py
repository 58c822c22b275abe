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
from adaptkit.methods.prompts.cocoop import CoCoOp, CoCoOpConfig
from adaptkit.methods.prompts.coop import CoOp, CoOpConfig
from adaptkit.methods.prompts.ivlp import IVLP, IVLPConfig
from adaptkit.methods.prompts.kgcoop import KgCoOp, KgCoOpConfig
from adaptkit.methods.prompts.maple import MaPLe, MaPLeConfig
from adaptkit.methods.prompts.prograd import ProGrad, ProGradConfig
from adaptkit.methods.prompts.promptsrc import PromptSRC, PromptSRCConfig
from adaptkit.methods.prompts.vpt import VPT, VPTConfig
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


@pytest.mark.parametrize("count", [4, 6])
@pytest.mark.parametrize("kind", [CoOp, KgCoOp, ProGrad])
@pytest.mark.parametrize("part", ["", "prompt_learner."])
def test_context_checkpoints_show_their_size(tmp_path, kind, count, part):
    state = {
        f"{part}ctx": torch.randn(count, 16).half(),
        f"{part}token_prefix": torch.randn(7, 1, 16).half(),
        f"{part}token_suffix": torch.randn(7, 76 - count, 16).half(),
    }
    found = read_reference_checkpoint(dassl_file(tmp_path / "model.pth.tar-100", state))
    method = kind(BACKBONE, NAMES, config=kind.config_class(**kind.reference_settings(found)))
    method.load_reference_state(found)
    assert torch.equal(method.context, state[f"{part}ctx"].float())
    assert torch.isfinite(method(query(BACKBONE, "image_features"))).all()


def test_class_specific_contexts_show_themselves():
    state = {"ctx": torch.randn(len(NAMES), 3, 16)}
    settings = CoOp.reference_settings(state)
    assert settings == {"num_context": 3, "context_init": "", "class_specific": True}
    method = CoOp(BACKBONE, NAMES, config=CoOpConfig(**settings))
    method.load_reference_state(state)
    assert torch.equal(method.context, state["ctx"])
    for kind in (KgCoOp, ProGrad, CoCoOp, CoOp):
        assert kind.reference_settings({"adapter.fc.0.weight": torch.zeros(2, 2)}) == {}


def test_prograds_words_behind_the_context_come_from_the_template():
    """A checkpoint holds none: "a type of pet, a photo of a" is nine tokens, of which the context takes eight."""
    state = {"ctx": torch.randn(8, 16)}
    settings = ProGrad.reference_settings(state)
    method = ProGrad(BACKBONE, NAMES, templates=["a photo of a {}, a type of pet."], config=ProGradConfig(**settings))
    method.load_reference_state(state)
    assert method._rows.symbols[0, 9] == BACKBONE.word_pieces("a")[0]


def test_cocoop_checkpoint(tmp_path):
    own = {
        "ctx": torch.randn(4, 16),
        "meta_net.linear1.weight": torch.randn(1, 16),
        "meta_net.linear1.bias": torch.randn(1),
        "meta_net.linear2.weight": torch.randn(16, 1),
        "meta_net.linear2.bias": torch.randn(16),
    }
    buffers = {"token_prefix": torch.randn(7, 1, 16), "token_suffix": torch.randn(7, 72, 16)}
    state = {f"prompt_learner.{name}": value.half() for name, value in (own | buffers).items()}
    found = read_reference_checkpoint(dassl_file(tmp_path / "model.pth.tar-10", state))
    assert CoCoOp.reference_settings(found) == {"num_context": 4, "context_init": ""}
    for config in (CoCoOpConfig(), CoCoOpConfig(**CoCoOp.reference_settings(found))):
        method = CoCoOp(BACKBONE, NAMES, config=config)
        method.load_reference_state(found)
        assert torch.equal(method.context, own["ctx"].half().float())
        assert len(method.adapter_state()) == len(own)
        for name in set(own) - {"ctx"}:
            assert torch.equal(method.adapter_state()[name], own[name].half().float())
    with pytest.raises(AdapterError, match=r"has no 'prompt_learner.meta_net.linear1.weight'"):
        method.load_reference_state({"ctx": own["ctx"]})
    with pytest.raises(AdapterError, match=r"'context' has shape \(4, 16\), \(3, 16\) was expected"):
        KgCoOp(BACKBONE, NAMES, config=KgCoOpConfig(num_context=3)).load_reference_state({"ctx": own["ctx"]})


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


def deep_state(text, image, text_layers, image_layers):
    """What MaPLe's and PromptSRC's releases keep of deep prompts, among a whole CLIP in half precision."""
    state = {
        "image_encoder.class_embedding": torch.randn(24).half(),
        "image_encoder.transformer.resblocks.1.attn.in_proj_weight": torch.randn(72, 24).half(),
        "logit_scale": torch.tensor(4.6),
    }
    if text_layers:
        state["prompt_learner.ctx"] = torch.randn(text, 16).half()
        state["prompt_learner.token_prefix"] = torch.randn(9, 1, 16).half()
        state["prompt_learner.token_suffix"] = torch.randn(9, 76 - text, 16).half()
    if image_layers:
        state["image_encoder.VPT"] = torch.randn(image, 24)
    for tower, width, count, layers in (("text", 16, text, text_layers), ("image", 24, image, image_layers)):
        for layer in range(1, layers):
            state[f"{tower}_encoder.transformer.resblocks.{layer}.VPT_shallow"] = torch.randn(count, width)
    return state


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [(VPT, (0, 5, 0, 3)), (IVLP, (2, 3, 3, 2)), (IVLP, (4, 0, 2, 0)), (PromptSRC, (4, 4, 3, 3))],
)
def test_deep_prompts_checkpoint(tmp_path, kind, sizes):
    state = deep_state(*sizes)
    if kind is PromptSRC:  # its frozen image encoder comes along inside the prompt learner
        state["prompt_learner.ZS_image_encoder.class_embedding"] = torch.randn(24).half()
    found = read_reference_checkpoint(dassl_file(tmp_path / "model.pth.tar-5", state))
    method = kind(BACKBONE, NAMES, config=kind.config_class(**kind.reference_settings(found)))
    method.load_reference_state(found)
    own = method.adapter_state()
    assert len(own) == sizes[2] + sizes[3]
    for key, value in own.items():
        assert torch.equal(value, state[method.reference_key(key)].float()), key
    assert torch.isfinite(method(query(BACKBONE, "images"))).all()


def test_deep_prompts_of_other_settings_than_the_checkpoints():
    with pytest.raises(AdapterError, match=r"has no 'image_encoder.transformer.resblocks.2.VPT_shallow'.*'prompts.2'"):
        VPT(BACKBONE, NAMES, config=VPTConfig(5, 3)).load_reference_state(deep_state(0, 5, 0, 2))
    with pytest.raises(AdapterError, match=r"'text_prompts.0' has shape \(4, 16\), \(2, 16\) was expected"):
        IVLP(BACKBONE, NAMES, config=IVLPConfig(2, 2, 3, 3)).load_reference_state(deep_state(4, 2, 3, 3))


def test_a_reference_average_needs_no_weights_of_a_checkpoint():
    state = deep_state(2, 2, 3, 3)
    settings = {**PromptSRC.reference_settings(state), "averaging": "reference"}
    method = PromptSRC(BACKBONE, NAMES, config=PromptSRCConfig(**settings))
    method.load_reference_state(state)
    assert torch.equal(method.image_prompts[0], state["image_encoder.VPT"])
    assert method.image_tower() is BACKBONE.image  # which epochs were averaged isn't in the file


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
