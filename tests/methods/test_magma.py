"""MAGMA: identity at zero, counts, OPT and GPT decoders, a frozen language model, memorising, prefix, on disk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adaptkit.errors import ConfigError, UnsupportedError
from adaptkit.export.merge import merge_adapter
from adaptkit.methods.adapter import AdaptedModel, load_adapter, save_adapter
from adaptkit.methods.mllm._bottlenecks import SPREAD, Bottleneck, add_bottlenecks, blocks_of, sub_layer
from adaptkit.methods.mllm._tuning import twin_of
from adaptkit.methods.mllm.magma import Magma, MagmaConfig
from adaptkit.methods.mllm.mllm_zero_shot import MllmZeroShot, MllmZeroShotConfig
from adaptkit.training.loop import fit_method
from tests.backbones import tiny_mllm as tiny
from tests.methods.tiny import NAMES, ask, make_task, query, trained

KINDS = ("sequential", "parallel", "scaled_parallel")
PLACES = ({"mlp": 4, "attention": 0}, {"mlp": 0, "attention": 8}, {"mlp": 8, "attention": 8})
LANGUAGES = {"llava": "Llama", "llava_next": "Mistral", "qwen2_vl": "Qwen2VL", "gemma3": "Gemma3", "blip2": "OPT"}


@pytest.fixture(scope="module")
def llava():
    return tiny.load("llava")


def make(backbone, seed=0, **settings):
    return Magma(backbone, NAMES, config=MagmaConfig(**settings), seed=seed)


def numbers(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", LANGUAGES)
def test_zero_up_projections_change_nothing(kind):
    """All kinds and places, on five families of language models; other weights change the logits."""
    backbone = tiny.load(kind)
    assert LANGUAGES[kind] in type(blocks_of(backbone.language)[0]).__name__
    pixels = query(backbone, "images", 2)
    plain = ask(MllmZeroShot(backbone, NAMES, config=MllmZeroShotConfig(normalisation="sum")), pixels)
    tried = 0
    for adapter in KINDS:
        for place in PLACES:
            method = make(backbone, kind=adapter, **place)
            assert method._adapters == 2 * sum(factor > 0 for factor in place.values())
            with torch.no_grad():
                for name, parameter in method.named_parameters():
                    if name.endswith((".up", ".up_bias")):
                        parameter.zero_()
            assert torch.equal(ask(method, pixels), plain)
            with torch.no_grad():
                for name, parameter in method.named_parameters():
                    if name.endswith(".up"):
                        parameter.normal_(0, 0.3, generator=numbers(1))
                    if name.endswith(".down"):
                        parameter.normal_(0, 0.3, generator=numbers(2))
            assert (ask(method, pixels) - plain).abs().max() > 1e-3
            tried += 1
    assert tried == 9


def gpt(kind):
    """A decoder of transformers' own, without any image."""
    import transformers as t

    common = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 64}
    if kind == "gpt2":
        return t.GPT2Model(t.GPT2Config(**common)).eval()
    if kind == "gptj":
        return t.GPTJModel(t.GPTJConfig(**common, rotary_dim=4)).eval()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    if kind == "neox":
        return t.GPTNeoXModel(t.GPTNeoXConfig(**sizes, intermediate_size=64)).eval()
    return t.OPTModel(t.OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64)).eval()


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "neox", "opt"])
@pytest.mark.parametrize("adapter", KINDS)
def test_decoders_that_are_not_llama(kind, adapter):
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = gpt(kind)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        plain = model(ids).last_hidden_state
        count = add_bottlenecks(model, 32, adapter, {"mlp": 4, "attention": 4}, False, numbers())
        assert count == 4
        assert not torch.equal(model(ids).last_hidden_state, plain)  # the first weights are small, not zero
        for name, parameter in model.named_parameters():
            if name.endswith((".up", ".up_bias")):
                parameter.zero_()
        assert torch.equal(model(ids).last_hidden_state, plain)


def test_what_an_adapter_reads():
    """The sequential kind reads a sub-layer's output, the parallel ones its input, by a plain computation."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        states = torch.randn(2, 5, 32)
        for kind in KINDS:
            model = gpt("opt")
            block = blocks_of(model)[0]
            first, last = sub_layer(block, "mlp")
            assert (first, last) == (block.fc1, block.fc2)
            add_bottlenecks(model, 32, kind, {"mlp": 2}, True, numbers())
            adapter = block.mlp_adapter
            with torch.no_grad():
                adapter.up.normal_()
                if adapter.scale is not None:
                    adapter.scale.fill_(3.0)
                plain = torch.nn.functional.linear(block.fc1(states).relu(), block.fc2.weight, block.fc2.bias)
                read = plain if kind == "sequential" else states
                hidden = adapter.norm(read) @ adapter.down.T + adapter.down_bias
                factor = 3.0 if kind == "scaled_parallel" else 1.0
                wanted = plain + factor * (hidden.relu() @ adapter.up.T + adapter.up_bias)
                torch.testing.assert_close(last(first(states).relu()), wanted)


def test_how_many_numbers_an_adapter_has():
    def formula(width, factor):
        return 2 * width**2 // factor + width // factor + width

    assert formula(4096, 4) == 8_393_728
    assert formula(4096, 4) * 28 == 235_024_384
    assert formula(4096, 8) == 4_198_912
    for kind in KINDS:
        for norm in (False, True):
            own = sum(p.numel() for p in Bottleneck(64, 16, kind, norm, numbers()).parameters())
            assert own == formula(64, 4) + (kind == "scaled_parallel") + 2 * 64 * norm
    adapter = Bottleneck(64, 16, "sequential", False, numbers())
    assert max(float(p.abs().max()) for p in adapter.parameters()) <= 2.001 * SPREAD
    assert 0.5 * SPREAD < adapter.down.std() < 1.5 * SPREAD


@pytest.mark.parametrize(
    ("prefix", "more"), [("own", 0), ("pooled", 64 * 128 + 128 + 128), ("grid", 64 * 64 + 64 + 128)]
)
def test_how_much_it_trains(llava, prefix, more):
    method = make(llava, prefix=prefix, mlp=4, attention=8)
    mlp, attention = (2 * 64**2 // f + 64 // f + 64 for f in (4, 8))
    assert method.num_trained() == 2 * (mlp + attention) + (more if prefix != "pooled" else 64 * 128 + 128 + 2 * 64)
    assert method.placeholders == {"own": 4, "pooled": 2, "grid": 5}[prefix]


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl", "smolvlm", "internvl", "paligemma", "instructblip"])
@pytest.mark.parametrize("prefix", ["own", "grid"])
def test_only_what_is_meant_gets_gradients(kind, prefix):
    """The language model's and the encoder's own weights are asserted to be as they were, not assumed."""
    backbone = tiny.load(kind)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    method = make(backbone, prefix=prefix)
    torch.autograd.backward(method.losses(query(backbone, "images", 2), torch.tensor([0, 3]))["answer"])
    reached = {name for name, p in method.mllm.model.named_parameters() if p.grad is not None}
    assert reached
    assert all("mlp_adapter" in name for name in reached)
    assert all(p.grad is not None and p.grad.any() for p in method.parameters())
    report = trained(make(backbone, prefix=prefix))
    assert report["losses"][-1] < report["losses"][0]
    assert report["adapters"] == 2
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert not any(name.endswith("_adapter") for name, _ in backbone.model.named_modules())


def test_the_vision_encoder_learns_at_the_papers_rate(llava):
    method = make(llava, prefix="pooled", phi="lora", phi_r=2)
    others, vision = method.parameter_groups()
    assert (others.lr, vision.lr) == (None, 2e-6)
    assert method.default_training.lr == 8e-4
    assert len(others.parameters) + len(vision.parameters) == len(list(method.parameters()))


def test_dropout_is_for_training_alone(llava):
    method = make(llava, prefix="pooled")
    pixels = query(llava, "images", 2)
    assert torch.equal(ask(method, pixels), ask(method, pixels))
    method.train()
    assert not torch.equal(torch.stack(method.features(pixels).tokens), torch.stack(method.features(pixels).tokens))
    method.eval()


def test_captions_of_four_images_are_memorised(llava):
    method = make(llava, prefix="grid", answers="captions", prompt="", kind="parallel", attention=4, mlp=1)
    task = make_task(llava, "images", shots=1)
    fit_method(method, task, replace(method.default_training, epochs=90, lr=1e-2))
    pixels = task.train.select(torch.arange(4))
    with torch.no_grad():
        said = [llava.prompter.text(ids) for ids in method.mllm.generate(method.asked(method.features(pixels)), 40)]
    assert said == method.candidate_texts(NAMES)
    assert ask(method, pixels).argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_on_disk(llava, tmp_path):
    method = make(llava, prefix="pooled", kind="scaled_parallel")
    trained(method)
    save_adapter(tmp_path / "out", AdaptedModel(method))
    file = tmp_path / "out" / "adapter_model.safetensors"
    assert file.stat().st_size < 4 * method.num_trained() + 8192
    pixels = query(llava, "images", 3)
    assert torch.equal(ask(load_adapter(tmp_path / "out", llava).method, pixels), ask(method, pixels))
    with pytest.raises(UnsupportedError):
        merge_adapter(AdaptedModel(method), tmp_path / "merged")
    with pytest.raises(UnsupportedError, match="folded or merged: its adapters aren't linear"):
        method.fold()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mlp": 0}, "there are no adapters"),
        ({"mlp": -1, "attention": -2}, "mlp is -1, but must be at least 0; attention is -2"),
        ({"tokens": 0}, "tokens is 0"),
        ({"answers": "captions", "variant": "letters"}, "aren't letters"),
    ],
)
def test_settings_that_cannot_be_used(settings, says):
    with pytest.raises(ConfigError, match=says):
        MagmaConfig(**settings)


def test_decoders_it_does_not_know(llava):
    import transformers as t

    config = t.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=50)
    with pytest.raises(UnsupportedError, match="BloomModel has none"):
        blocks_of(t.BloomModel(config))
    assert len(blocks_of(twin_of(llava).language)) == 2
