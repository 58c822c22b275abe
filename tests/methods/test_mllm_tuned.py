"""Tuned MLLMs: what is supervised, losses and gradients against plain peft and transformers, adapters, bad input."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from adaptkit.backbones.load import load_backbone
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.errors import AdapterError, AdaptKitError, BackboneError, ConfigError
from adaptkit.methods.adapter import AdaptedModel, load_adapter, save_adapter
from adaptkit.methods.importing import import_reference
from adaptkit.methods.mllm._soft import question_span
from adaptkit.methods.mllm._tuning import IGNORED, NumberedInputs, answer_labels, summed
from adaptkit.methods.mllm.mllm_bitfit import MllmBitfit, MllmBitfitConfig
from adaptkit.methods.mllm.mllm_lora import MllmLora, MllmLoraConfig
from adaptkit.methods.mllm.mllm_qlora import MllmQlora
from adaptkit.methods.mllm.mllm_soft_prompt import MllmSoftPrompt, MllmSoftPromptConfig
from adaptkit.methods.mllm.mllm_zero_shot import MllmZeroShot, MllmZeroShotConfig
from adaptkit.storage import read_safetensors, write_safetensors
from adaptkit.training.loop import fit_method
from adaptkit.types import TensorInputs
from tests.backbones import tiny_mllm as tiny
from tests.backbones.test_mllm import brute_force
from tests.methods.tiny import NAMES, make_task, query

peft = pytest.importorskip("peft")
EXACT = {"dropout": 0.0}
KINDS = {
    "mllm-lora": (MllmLora, MllmLoraConfig),
    "mllm-soft-prompt": (MllmSoftPrompt, MllmSoftPromptConfig),
    "mllm-bitfit": (MllmBitfit, MllmBitfitConfig),
    "mllm-qlora": (MllmQlora, MllmLoraConfig),
}


@pytest.fixture(scope="module")
def llava():
    return tiny.load("llava")


def make(backbone, name="mllm-lora", names=NAMES, seed=0, **settings):
    kind, config = KINDS[name]
    return kind(backbone, names, config=config(**settings), seed=seed)


def shaken(method, size=0.05):
    """As if trained: nothing is at its neutral start any more."""
    numbers = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=numbers))
    return method


def ask(method, pixels):
    with torch.no_grad():
        return method(pixels)


def trained(method, epochs=3, lr=1e-2, **task):
    settings = replace(method.default_training, epochs=epochs, lr=lr)
    return fit_method(method, make_task(method.backbone, "images", **{"shots": 1, **task}), settings)


def gradients(method, pixels, labels):
    method.zero_grad()
    terms = method.losses(pixels, labels)
    torch.autograd.backward(sum(terms.values()))
    return sum(terms.values()).detach(), {name: p.grad.clone() for name, p in method.named_parameters()}


# --- what is supervised -----------------------------------------------------------------------------------------------


def test_labels_by_hand():
    """A short and a long question, padded on the left; padding is the end token, as in many tokenizers."""
    ids = torch.tensor([[2, 2, 1, 9, 9, 40, 50, 2], [1, 9, 9, 40, 41, 60, 61, 2]])
    wanted = [[IGNORED] * 6 + [50, 2], [IGNORED] * 5 + [60, 61, 2]]
    assert answer_labels(ids, [2, 3]).tolist() == wanted


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "gemma3", "paligemma", "idefics2"])
def test_supervised_tokens_are_the_name_and_the_end(kind, monkeypatch):
    backbone = tiny.load(kind)
    method = make(backbone, **EXACT)
    seen = []
    logits = method.mllm.logits
    monkeypatch.setattr(method.mllm, "logits", lambda hidden: seen.append(len(hidden)) or logits(hidden))
    method.losses(query(backbone, "images", 2), torch.tensor([0, 3]))
    answers = [method._name_answers()[label] for label in (0, 3)]
    assert seen == [sum(map(len, answers))]  # the head runs on no other token
    end = backbone.prompter.end_tokens()
    for name, answer in zip((NAMES[0], NAMES[3]), answers, strict=True):
        assert answer[-1] in end
        assert backbone.prompter.tokenizer.decode(answer[:-1]).strip() == name.replace("_", " ")


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "qwen3_vl", "smolvlm", "gemma3", "internvl"])
def test_loss_and_gradients_are_those_of_plain_peft(kind, tmp_path):
    """One step of transformers' own loss, from pixels, on the saved adapter."""
    from transformers import AutoModelForImageTextToText

    backbone = tiny.load(kind)
    method = shaken(make(backbone, **EXACT))
    pixels, labels = query(backbone, "images", 2).clamp(0, 1), torch.tensor([0, 3])
    loss, grads = gradients(method, pixels, labels)
    save_adapter(tmp_path / "out", AdaptedModel(method))
    plain = AutoModelForImageTextToText.from_pretrained(tiny.save(kind))
    plain = peft.PeftModel.from_pretrained(plain, tmp_path / "out" / "peft", is_trainable=True).eval()
    answers = [method._name_answers()[label] for label in labels]
    rows = [method.prompt_ids([Turn(method.question)], [method.placeholders]) + answer for answer in answers]
    length = max(map(len, rows))
    pad = lambda row, value: [value] * (length - len(row)) + row  # noqa: E731
    given = library_inputs(backbone, pixels, torch.tensor([pad(row, 256) for row in rows]))
    wanted = torch.tensor([pad([-100] * (len(row) - len(a)) + a, -100) for row, a in zip(rows, answers, strict=True)])
    theirs = plain(attention_mask=torch.tensor([pad([1] * len(row), 0) for row in rows]), labels=wanted, **given)
    torch.testing.assert_close(theirs.loss.detach(), loss, rtol=1e-5, atol=1e-5)
    torch.autograd.backward(theirs.loss)
    found = {n.replace(".default", "").removeprefix("base_model.model."): p.grad for n, p in plain.named_parameters()}
    assert len(grads) == 2 * 2 * 7
    for name, grad in grads.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(found[name.removeprefix("adapter.")], grad, rtol=1e-4, atol=1e-5)


def library_inputs(backbone, pixels, ids):
    """What transformers' model takes beside the mask, for ids with expanded placeholders."""
    images = list((pixels * 255).round().to(torch.uint8))
    made = backbone._processor(images=images, return_tensors="pt", **backbone._image_options)
    given = {k: made[k] for k in ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask") if k in made}
    if backbone.spec.family in ("idefics2", "idefics3", "smolvlm"):  # one sample per image
        given = {key: value.transpose(0, 1) for key, value in given.items()}
    kinds = (ids == backbone.image_token).int()
    if backbone.family.positions == "mrope":
        given["mm_token_type_ids"] = kinds
    if backbone.family.token_types == "image":
        given["token_type_ids"] = kinds
    return {"input_ids": ids, **given}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_what_is_trained_is_what_is_scored(kind):
    """One pass over question and name gives the likelihood that the tree of names has, in every family."""
    backbone = tiny.load(kind)
    method = shaken(make(backbone, vision=True, **EXACT))
    pixels, labels = query(backbone, "images", 2), torch.tensor([3, 1])
    loss, _ = gradients(method, pixels, labels)
    tokens = sum(len(method._name_answers()[label]) for label in labels)
    scores = ask(method, pixels)[torch.arange(2), labels]
    torch.testing.assert_close(loss * tokens, -scores.sum(), rtol=1e-5, atol=1e-4)


def test_softmax_loss_is_brute_force(llava):
    method = shaken(make(llava, variant="softmax", **EXACT))
    pixels, labels = query(llava, "images", 3), torch.tensor([2, 0, 3])
    loss, _ = gradients(method, pixels, labels)
    with torch.no_grad():
        features = method.features(pixels)
    rows = [method.prompt_ids([Turn(method.question)], [count]) for count in features.counts]
    scores = brute_force(method.mllm, rows, features, method._name_answers())
    torch.testing.assert_close(loss, F.cross_entropy(scores, labels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ask(method, pixels), scores, rtol=1e-5, atol=1e-4)  # it answers by what it trains


@pytest.mark.parametrize("variant", ["sft", "softmax"])
def test_gradients_of_parts_add_up(llava, variant):
    method = shaken(make(llava, variant=variant, **EXACT))
    pixels, labels = query(llava, "images", 5), torch.tensor([0, 1, 2, 3, 1])
    whole, one = gradients(method, pixels, labels)
    method.config = replace(method.config, micro_batch=2)
    parts, other = gradients(method, pixels, labels)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)
    assert one.keys() == other.keys()
    for name, grad in one.items():
        torch.testing.assert_close(other[name], grad, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(sum(method.losses(pixels, labels).values()), whole, rtol=1e-5, atol=1e-6)


def test_summed_leaves_out_what_a_part_does_not_use():
    used, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    loss = summed(lambda rows: (rows.sum() * used).sum(), torch.arange(4).split(2), [used, idle])
    loss.backward()
    assert used.grad.tolist() == [6.0, 6.0]
    assert idle.grad.tolist() == [0.0, 0.0]


def test_gradients_are_clipped_together(llava):
    method = shaken(make(llava, clip=0.01, **EXACT))
    terms = method.losses(query(llava, "images", 2), torch.tensor([0, 1]))
    method.backward(terms, lambda loss: 8 * loss)  # as if scaled against overflow
    method.before_step(lambda loss: 8 * loss)
    norm = torch.stack([parameter.grad.norm() for parameter in method.parameters()]).norm()
    assert norm == pytest.approx(0.08, rel=1e-3)


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_family_learns_from_where_it_stood(kind):
    backbone = tiny.load(kind)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    pixels = query(backbone, "images", 2)
    plain = ask(MllmZeroShot(backbone, NAMES, config=MllmZeroShotConfig(normalisation="sum")), pixels)
    for name, settings in (("mllm-lora", {"vision": True, "bridge": True}), ("mllm-soft-prompt", {})):
        method = make(backbone, name, **settings)
        torch.testing.assert_close(ask(method, pixels), plain, rtol=1e-5, atol=1e-4)
        losses = trained(method)["losses"]
        assert losses[-1] < losses[0]
        assert (ask(method, pixels) - plain).abs().max() > 1e-3
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["mllm-lora", "mllm-bitfit"])
def test_the_untrained_model_is_exactly_the_base(llava, name):
    pixels = query(llava, "images", 3)
    plain = MllmZeroShot(llava, NAMES, config=MllmZeroShotConfig(normalisation="sum"))
    assert torch.equal(ask(make(llava, name), pixels), ask(plain, pixels))


def test_it_learns_to_tell_classes_apart(llava):
    """From chance to nearly all of other images, on a language model that is random and frozen."""
    pixels, labels = query(llava, "images", 16), torch.arange(16) % len(NAMES)
    method = make(llava)
    assert (ask(method, pixels).argmax(dim=1) == labels).float().mean() <= 0.5
    trained(method, epochs=20, shots=4)
    assert (ask(method, pixels).argmax(dim=1) == labels).float().mean() >= 0.75


def test_kinds_of_updates(llava):
    count = {kind: make(llava, kind=kind, r=4).num_trained() for kind in ("lora", "rslora", "dora")}
    # per layer: q, o 64 to 64; k, v 64 to 32; gate, up 64 to 128; down 128 to 64
    outputs = 2 * 64 + 2 * 32 + 2 * 128 + 64
    assert count["lora"] == count["rslora"] == 2 * 4 * (2 * 128 + 2 * 96 + 3 * 192)
    assert count["dora"] == count["lora"] + 2 * outputs
    one, two = (shaken(make(llava, kind=kind, r=4, alpha=8)) for kind in ("lora", "rslora"))
    three = shaken(make(llava, kind="lora", r=4, alpha=16))  # 8 / sqrt(4) = 16 / 4
    pixels = query(llava, "images", 2)
    torch.testing.assert_close(ask(two, pixels), ask(three, pixels))
    assert not torch.allclose(ask(one, pixels), ask(two, pixels))
    assert trained(make(llava, kind="dora"))["losses"][-1] < 6


def test_parts_and_their_rates(llava):
    method = make(llava, vision=True, bridge=True, vision_lr=1e-4, layers=("q_proj", "v_proj"))
    report = trained(method, epochs=1)
    parts = report["trained_by_part"]
    assert sum(parts.values()) == method.num_trained() == report["trained_parameters"]
    assert parts["language"] == 2 * 16 * (128 + 96)
    assert [group.lr for group in method.parameter_groups()] == [None, 1e-4, 1e-5]
    assert report["changed_layers"] == 2 * 2 + 2 * 6


def test_each_image_is_encoded_once(llava, monkeypatch):
    counted = []
    for settings, wanted in (({}, 4), ({"vision": True}, 4 * 3)):
        method = make(llava, **settings)
        encode = method.mllm.image_features
        monkeypatch.setattr(
            method.mllm, "image_features", lambda pixels, *a, e=encode: counted.append(len(pixels)) or e(pixels, *a)
        )
        counted.clear()
        trained(method, epochs=3)
        assert sum(counted) == wanted


def test_views_by_number():
    values = torch.arange(2 * 3).reshape(2, 3, 1, 1, 1).expand(2, 3, 3, 1, 1).float()
    numbered = NumberedInputs(TensorInputs(values, torch.arange(3)), lambda pixels: None, keep=True)
    numbers = torch.tensor([5, 0, 2, 3])
    assert numbered.pixels(numbers)[:, 0, 0, 0].tolist() == [5.0, 0.0, 2.0, 3.0]
    assert numbered.select(torch.tensor([2, 0]), 1).tolist() == [5, 3]
    assert numbered.num_views == 2


def test_letters_are_learned(llava):
    method = make(llava, variant="letters", options=3)
    assert method.config.route == "letters"
    report = trained(method, epochs=6)
    assert report["losses"][-1] < report["losses"][0]
    assert report["supervised_text"].strip().startswith("A")
    texts, answers = method._questions(query(llava, "images", 4), torch.tensor([0, 1, 2, 3]))
    letters = llava.prompter.answers([Turn("?")], ("A", "B", "C"))
    for text, answer, name in zip(texts, answers, NAMES, strict=True):
        letter = "ABC"[letters.index(answer)]
        assert f"{letter}. {name.replace('_', ' ')}" in text
        assert sum(f"\n{one}. " in text for one in "ABCD") == 3


def test_negatives_are_the_worst_confusions(llava):
    method = make(llava, variant="softmax", negatives=1, **EXACT)
    seen = []
    loss = method._softmax_loss
    method._softmax_loss = lambda inputs, labels, batch: (
        seen.extend(zip(inputs.tolist(), method._others(inputs, labels), strict=True)) or loss(inputs, labels, batch)
    )
    task = make_task(llava, "images", shots=1)
    plain = MllmZeroShot(llava, NAMES, config=MllmZeroShotConfig(normalisation="mean"))
    scores = ask(plain, task.train.select(torch.arange(4))).fill_diagonal_(-torch.inf)
    trained(method, epochs=1)
    assert len(seen) == 4
    assert dict(seen) == dict(enumerate(scores.topk(1).indices.tolist()))


def test_the_prior_follows_what_was_learned(llava):
    """Cached before training, it would belong to another model."""
    pixels = query(llava, "images", 2)
    method = make(llava, normalisation="pmi", **EXACT)
    ask(method, pixels)
    trained(method)
    fresh = make(llava, normalisation="pmi", **EXACT)
    fresh.load_adapter_state(method.adapter_state())
    assert torch.equal(ask(method, pixels), ask(fresh, pixels))


def test_calibration_after_training(llava):
    method = make(llava, normalisation="calibrated")
    trained(method, shots=2)
    assert not torch.equal(method.scale, torch.ones(len(NAMES)))


@pytest.mark.parametrize("what", ["norms", "biases", "both"])
def test_norms_and_biases(what):
    backbone = tiny.load("qwen2_vl")
    method = make(backbone, "mllm-bitfit", what=what)
    norms, biases = (2 * 2 + 1) * 64, 2 * (64 + 2 * 32)
    assert method.num_trained() == {"norms": norms, "biases": biases, "both": norms + biases}[what]
    assert trained(method)["losses"][-1] < trained(make(backbone, "mllm-bitfit", what=what), epochs=1)["losses"][0]
    more = make(backbone, "mllm-bitfit", what=what, parts=("language", "vision", "bridge"))
    assert more.num_trained() > method.num_trained()


# --- soft prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_soft_prompt_begins_as_the_question(kind):
    """Also with positions on three axes, token types, and without an image."""
    backbone = tiny.load(kind)
    method = make(backbone, "mllm-soft-prompt", normalisation="pmi")
    plain = MllmZeroShot(backbone, NAMES, config=MllmZeroShotConfig(normalisation="pmi"))
    pixels = query(backbone, "images", 2)
    row = method.prompt_ids([Turn(method.question)], [method.placeholders])
    assert sum(token < 0 for token in row) == len(method.soft) > 40  # a token per letter
    with torch.no_grad():
        ours, theirs = method.asked(method.features(pixels)), plain.asked(plain.features(pixels))
    torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours.next_position, theirs.next_position)
    torch.testing.assert_close(ask(method, pixels), ask(plain, pixels), rtol=1e-5, atol=1e-5)


def test_more_and_fewer_vectors(llava):
    own = len(make(llava, "mllm-soft-prompt").soft)
    for count in (3, own + 5):
        method = make(llava, "mllm-soft-prompt", tokens=count)
        assert len(method.soft) == count
        assert trained(method)["losses"][-1] < trained(make(llava, "mllm-soft-prompt", tokens=count), 1)["losses"][0]
    with pytest.raises(AdaptKitError, match="more than the 512"):
        make(llava, "mllm-soft-prompt", tokens=600)


def test_the_span_is_the_question(llava):
    ids, start, end = question_span(llava.prompter, Turn("Which one?"), [4])
    assert llava.prompter.tokenizer.decode(ids[start:end]).strip() == "Which one?"


# --- four bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_four_bits_beside_the_full_backbone(kind):
    """Losses and gradients are those of the dequantised model; Qwen's layers have biases."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit

    backbone = tiny.load(kind)
    method = shaken(make(backbone, "mllm-qlora", **EXACT))
    pixels, labels = query(backbone, "images", 2), torch.tensor([0, 3])
    loss, grads = gradients(method, pixels, labels)
    full = make(backbone, **EXACT)
    full.load_adapter_state(method.adapter_state())
    kept = {}
    for name, module in method.mllm.model.named_modules():
        if name.endswith(".base_layer"):
            layer = full.mllm.model.get_submodule(name)
            kept[name] = layer.weight
            rounded = dequantize_4bit(module.weight.data, module.weight.quant_state)
            layer.weight = torch.nn.Parameter(rounded.reshape(layer.weight.shape), requires_grad=False)
    assert len(kept) == 2 * 7
    theirs, wanted = gradients(full, pixels, labels)
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-5)
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(loss, gradients(make(backbone, **EXACT), pixels, labels)[0], atol=1e-3)


def test_four_bits_of_the_backbone_itself():
    pytest.importorskip("bitsandbytes")
    quantised, full = load_backbone(f"transformers:{tiny.save('llava')}@nf4"), tiny.load("llava")
    pixels = query(full, "images", 2)
    one, two = shaken(make(quantised, "mllm-qlora")), shaken(make(full, "mllm-qlora"))
    assert torch.equal(ask(one, pixels), ask(two, pixels))
    assert trained(one)["losses"][-1] < 6
    with pytest.raises(ConfigError, match="quantised"):
        make(quantised, kind="dora")
    with pytest.raises(ConfigError, match="quantised"):
        make(full, "mllm-qlora", kind="dora")


# --- adapters on disk -------------------------------------------------------------------------------------------------


def peft_logits(kind, folder, backbone, pixels, question):
    """Next-token logits of transformers' model with peft's own loader, through a backbone around it."""
    loaded = load_backbone(f"transformers:{tiny.save(kind)}")
    loaded.model = peft.PeftModel.from_pretrained(loaded.model, folder).get_base_model()
    with torch.no_grad():
        features = loaded.image_features(pixels, question)
        rows = [loaded.prompter.ids([Turn(question)], [count]) for count in features.counts]
        return loaded.logits(loaded.hidden(loaded.batch(rows, features), features)[:, -1])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llava", {}),
        ("llava", {"kind": "dora"}),
        ("llava", {"kind": "rslora", "r": 4, "layers": ("q_proj",)}),
        ("qwen2_5_vl", {"vision": True}),
        ("smolvlm", {"bridge": True}),
        ("gemma3", {"bridge": True, "vision": True}),
        ("blip2", {"vision": True}),
    ],
)
def test_plain_peft_reads_what_was_saved(kind, settings, tmp_path):
    backbone = tiny.load(kind)
    method = shaken(make(backbone, **settings))
    save_adapter(tmp_path / "out", AdaptedModel(method))
    pixels = query(backbone, "images", 2).clamp(0, 1)
    theirs = peft_logits(kind, tmp_path / "out" / "peft", backbone, pixels, method.question)
    with torch.no_grad():
        ours = method.mllm.logits(method.asked(method.features(pixels)).hidden)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    again = load_adapter(tmp_path / "out", backbone)
    assert torch.equal(ask(again.method, pixels), ask(method, pixels))
    config = json.loads((tmp_path / "out" / "peft" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == len([key for key in method.adapter_state() if "lora_A" in key])


def test_bare_query_tokens_have_no_place_in_peft(tmp_path):
    method = make(tiny.load("blip2"), bridge=True)
    save_adapter(tmp_path / "out", AdaptedModel(method))
    assert not (tmp_path / "out" / "peft").exists()


OLD = {
    "llava": (r"model.language_model.", "language_model.model."),
    "llava_next": (r"model.language_model.", "language_model.model."),
    "internvl": (r"model.language_model.", "language_model.model."),
    "paligemma": (r"model.language_model.", "language_model.model."),
    "gemma3": (r"model.language_model.", "language_model.model."),
    "qwen2_vl": (r"model.language_model.", "model."),
    "qwen2_5_vl": (r"model.language_model.", "model."),
}


@pytest.mark.parametrize("kind", OLD)
@pytest.mark.parametrize("vision", [False, True])
def test_adapters_of_older_transformers(kind, vision, tmp_path):
    """Keys renamed to what releases before 5 wrote; plain peft places none of Qwen's and only warns."""
    backbone = tiny.load(kind)
    method = shaken(make(backbone, vision=vision))
    save_adapter(tmp_path / "out", AdaptedModel(method))
    new, old = (f"base_model.model.{part}" for part in OLD[kind])
    state = read_safetensors(tmp_path / "out" / "peft" / "adapter_model.safetensors")
    older = {
        key.replace(new, old, 1) if key.startswith(new) else key.replace("model.model.", "model.", 1): value
        for key, value in state.items()
    }
    assert not set(older) & set(state)
    imported = import_reference("mllm-lora", older, backbone, NAMES).model.method
    assert (imported.config.r, imported.config.vision) == (16, vision)
    pixels = query(backbone, "images", 2)
    assert torch.equal(ask(imported, pixels), ask(method, pixels))


def test_adapters_that_would_leave_the_base_model(llava, tmp_path):
    method = shaken(make(llava))
    save_adapter(tmp_path / "out", AdaptedModel(method))
    with pytest.raises(AdapterError, match="load the backbone it was trained on"):
        load_adapter(tmp_path / "out", tiny.load("smolvlm"))
    file = tmp_path / "out" / "adapter_model.safetensors"
    state = read_safetensors(file)
    write_safetensors(file, {key.replace("self_attn", "attention"): value for key, value in state.items()})
    with pytest.raises(AdapterError, match="made with other settings"):
        load_adapter(tmp_path / "out", llava)
    plain = read_safetensors(tmp_path / "out" / "peft" / "adapter_model.safetensors")
    renamed = {key.replace("language_model", "decoder"): value for key, value in plain.items()}
    with pytest.raises(AdapterError, match="no place in"):
        import_reference("mllm-lora", renamed, llava, NAMES)
    with pytest.raises(AdapterError, match="no place in"):
        import_reference("mllm-lora", {**plain, "base_model.model.lm_head.lora_B.weight": torch.ones(2)}, llava, NAMES)
    silent = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in plain.items()}
    with pytest.raises(AdapterError, match="changes nothing"):
        import_reference("mllm-lora", silent, llava, NAMES)
    with pytest.raises(AdapterError):
        import_reference("mllm-lora", {"weight": torch.ones(2)}, llava, NAMES)


# --- settings that cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "settings", "says"),
    [
        (MllmLoraConfig, {"r": 0}, "r is 0, but must be at least 1"),
        (MllmLoraConfig, {"dropout": 1.0, "alpha": 0}, "alpha is 0, but must be above 0; dropout"),
        (MllmLoraConfig, {"layers": ("q_prj",)}, "known: q_proj"),
        (MllmLoraConfig, {"language": False}, "both off"),
        (
            MllmLoraConfig,
            {"negatives": -1, "micro_batch": -2},
            "negatives is -1, but must be at least 0; micro_batch is -2",
        ),
        (MllmLoraConfig, {"options": 1}, "from 2 to 26"),
        (MllmSoftPromptConfig, {"variant": "letters"}, "takes the place of the question"),
        (MllmSoftPromptConfig, {"route": "letters"}, "takes the place of the question"),
        (MllmSoftPromptConfig, {"tokens": -1}, "tokens is -1"),
        (MllmBitfitConfig, {"parts": ()}, "nothing would be trained"),
    ],
)
def test_settings_that_cannot_be_used(config, settings, says):
    with pytest.raises(ConfigError, match=says):
        config(**settings)


def test_models_without_what_is_asked_for(llava):
    with pytest.raises(ConfigError, match="no biases to train"):
        make(llava, "mllm-bitfit", what="biases")
    with pytest.raises(ConfigError, match="no layer named 'fc1'"):
        make(llava, layers=("q_proj", "fc1"))
    with pytest.raises(ConfigError, match=r"r is 40, but .*k_proj .* has width 32"):
        make(llava, r=40)
    with pytest.raises(BackboneError, match="more than the 512"):
        make(llava, prompt="what " * 120)
