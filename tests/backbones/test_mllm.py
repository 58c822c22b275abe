"""Every family of multimodal language models, tiny and random, through the loader: images, caches, positions."""

from __future__ import annotations

import pytest
import torch

from adaptkit.backbones.load import load_backbone
from adaptkit.backbones.mllm.families import FAMILIES, FAMILY_OF_TYPE
from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.backbones.mllm.trie import Trie
from adaptkit.errors import BackboneError, DataError, MissingPathError
from tests.backbones import tiny_mllm as tiny

QUESTIONS = ("what is it?", "and what on earth is this one here?")
NAMES = ("ship", "ship wreck", "shop", "cat", "a much longer name")


@pytest.fixture(scope="module", params=tiny.KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def backbone(kind):
    return load_backbone(f"transformers:{tiny.save(kind)}")


@pytest.fixture(scope="module")
def pixels(backbone):
    return tiny.pixels(2, backbone.spec.preprocessing.image_size)


@pytest.fixture(scope="module")
def features(backbone, pixels):
    with torch.no_grad():
        return backbone.image_features(pixels, QUESTIONS[0])


@pytest.fixture(scope="module")
def rows(backbone, features):
    return [
        backbone.prompter.ids([Turn(question)], [count])
        for question, count in zip(QUESTIONS, features.counts, strict=True)
    ]


@torch.no_grad()
def last_logits(backbone, rows, features=None):
    return backbone.logits(backbone.hidden(backbone.batch(rows, features), features)[:, -1])


@torch.no_grad()
def brute_force(backbone, rows, features, answers):
    """log p of every answer after every prompt, each in a pass of its own without a cache."""
    found = torch.zeros(len(rows), len(answers))
    for i, row in enumerate(rows):
        own = None if features is None else features.select([i])
        for j, answer in enumerate(answers):
            hidden = backbone.hidden(backbone.batch([row + answer], own, [len(answer)]), own)
            log_probs = backbone.logits(hidden)[0].log_softmax(dim=-1)
            found[i, j] = sum(log_probs[len(row) + k - 1, token] for k, token in enumerate(answer))
    return found


def test_the_table_names_every_family():
    assert [family.name for family in FAMILIES] == [
        *("LLaVA", "LLaVA-NeXT", "LLaVA-OneVision", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "SmolVLM", "Idefics3"),
        *("Idefics2", "InternVL", "Gemma 3", "PaliGemma", "BLIP-2", "InstructBLIP"),
    ]
    assert len(FAMILY_OF_TYPE) == len(tiny.KINDS) == 14


def test_other_pixels_give_other_logits(backbone, features):
    """First of all: a random model that ignores its image would make every test here vacuous."""
    rows = [backbone.prompter.ids([Turn(QUESTIONS[0])], [count]) for count in features.counts]
    logits = last_logits(backbone, rows, features)
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    text = last_logits(backbone, [backbone.prompter.ids([Turn(QUESTIONS[0], 0)])])
    assert (logits[0] - text[0]).abs().max() > 1e-3


def test_it_agrees_with_the_library(backbone, pixels, features, rows):
    """Our positions, types and cached features against the model's own forward pass from pixels."""
    batch = backbone.batch(rows, features)
    made = backbone._processor(
        images=list((pixels * 255).round().to(torch.uint8)), return_tensors="pt", **backbone._image_options
    )
    given = {k: made[k] for k in ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask") if k in made}
    if backbone.spec.family in ("idefics2", "idefics3", "smolvlm"):  # one sample per image
        given = {key: value.transpose(0, 1) for key, value in given.items()}
    if backbone.family.positions == "mrope":
        given["mm_token_type_ids"] = (batch.ids == backbone.image_token).int()
    if backbone.family.token_types:
        given["token_type_ids"] = batch.types
    if backbone.family.prompted:
        words = backbone._instruction_tokenizer([QUESTIONS[0]] * 2, return_tensors="pt")
        given |= {"qformer_input_ids": words.input_ids, "qformer_attention_mask": words.attention_mask}
    with torch.no_grad():
        theirs = backbone.model(input_ids=batch.ids, attention_mask=batch.mask, **given).logits[:, -1]
    torch.testing.assert_close(last_logits(backbone, rows, features), theirs.float(), rtol=1e-4, atol=1e-4)


def test_padding_on_the_left_changes_nothing(backbone, features, rows):
    assert len(rows[0]) != len(rows[1])
    together = last_logits(backbone, rows, features)
    alone = [last_logits(backbone, [row], features.select([i])) for i, row in enumerate(rows)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_images_can_be_picked_and_repeated(backbone, features, rows):
    once = last_logits(backbone, rows, features)
    picked = [1, 0, 1, 1]
    again = last_logits(backbone, [rows[i] for i in picked], features.select(picked))
    torch.testing.assert_close(again, once[picked], rtol=1e-5, atol=1e-5)


def test_several_images_in_one_prompt(backbone, features):
    pair = [backbone.prompter.ids([Turn("same?", 2)], features.counts)]
    forth, back = (last_logits(backbone, pair, features.select(order)) for order in ([0, 1], [1, 0]))
    assert (forth - back).abs().max() > 1e-4
    joined = ImageFeatures.join([features.select([0]), features.select([1])])
    torch.testing.assert_close(last_logits(backbone, pair, joined), forth)


def test_the_tree_gives_what_single_passes_give(backbone, features, rows):
    """Names that share beginnings, and one that is the beginning of another; prompts of two lengths in one batch."""
    answers = backbone.prompter.answers([Turn(QUESTIONS[0])], NAMES)
    trie = Trie.build(answers)
    assert len(trie) < sum(map(len, answers))
    with torch.no_grad():
        scores = backbone.candidate_scores(backbone.prefix(rows, features), trie)
    torch.testing.assert_close(scores, brute_force(backbone, rows, features, answers), rtol=1e-5, atol=1e-4)


def test_text_alone(backbone):
    rows = [backbone.prompter.ids([Turn(question, 0)]) for question in QUESTIONS]
    answers = backbone.prompter.answers([Turn(QUESTIONS[0], 0)], NAMES[:3])
    with torch.no_grad():
        scores = backbone.candidate_scores(backbone.prefix(rows), Trie.build(answers))
    torch.testing.assert_close(scores, brute_force(backbone, rows, None, answers), rtol=1e-5, atol=1e-4)


def test_generation_behind_the_cache_is_greedy(backbone, features, rows):
    with torch.no_grad():
        prefix = backbone.prefix(rows, features)
    answers, ends = backbone.generate(prefix, 5), backbone.prompter.end_tokens()
    for i, row in enumerate(rows):
        grown = list(row)
        for _ in range(5):
            # what was generated belongs to the answer: PaliGemma's earlier tokens may not see it
            own = features.select([i])
            with torch.no_grad():
                hidden = backbone.hidden(backbone.batch([grown], own, [len(grown) - len(row)]), own)
            token = int(backbone.logits(hidden[0, -1]).argmax())
            if token in ends:
                break
            grown.append(token)
        assert answers[i] == grown[len(row) :]


def test_embeddings_in_place_of_ids(backbone, features, rows):
    """Soft prompts go this way; on Qwen positions would silently fall back to one axis."""
    batch = backbone.batch(rows, features)
    with torch.no_grad():
        ids = backbone.hidden(batch, features)[:, -1]
        embeds = backbone.hidden(batch, features, embeds=backbone.embed(batch.ids))[:, -1]
    torch.testing.assert_close(embeds, ids, rtol=1e-5, atol=1e-5)


def test_as_a_dual_encoder(backbone, pixels):
    with torch.no_grad():
        images = backbone.encode_image(pixels)
        one = backbone.encode_image(pixels[1:])
    texts = backbone.text_features(["a cat", "a much longer text"])
    assert images.shape == texts.shape == (2, backbone.spec.embed_dim)
    torch.testing.assert_close(one, images[1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(backbone.text_features(["a cat"]), texts[:1], rtol=1e-4, atol=1e-4)
    assert (images[0] - images[1]).abs().max() > 1e-3


def test_parts_and_targets(backbone):
    """Each target pattern finds linear layers (or parameters) of its own part and of no other."""
    import re

    names = [name for name, module in backbone.model.named_modules() if isinstance(module, torch.nn.Linear)]
    hit = {t: [n for n in names if re.fullmatch(backbone.family.lora_targets(t), n)] for t in ("language", "vision")}
    layers = backbone.model.config.get_text_config().num_hidden_layers
    assert len(hit["language"]) == layers * (6 if backbone.spec.family == "blip-2" else 7)
    assert hit["vision"]
    assert not set(hit["language"]) & set(hit["vision"])
    for target in ("language", "vision", "bridge"):
        parts = backbone.family.part(backbone.model, target)
        assert parts
        inside = [n for path, _ in parts for n, _ in backbone.model.named_parameters() if n.startswith(path)]
        assert inside
    assert not any(n.startswith(tuple(p for p, _ in backbone.family.part(backbone.model, "bridge"))) for n in
                   hit["language"])  # fmt: skip


def test_scores_have_gradients(backbone, features, rows):
    answers = backbone.prompter.answers([Turn(QUESTIONS[0])], NAMES[:3])
    batch = backbone.batch(rows, features)
    embeds = backbone.embed(batch.ids).detach().requires_grad_()
    backbone.logits(backbone.hidden(batch, features, embeds=embeds)[:, -1]).sum().backward()
    assert embeds.grad.abs().sum() > 0
    if backbone.spec.family != "llava":
        return
    weight = backbone.language.layers[0].self_attn.q_proj.weight
    weight.requires_grad_(True)
    try:
        scores = backbone.candidate_scores(backbone.prefix(rows, features), Trie.build(answers))
        scores.log_softmax(dim=1)[:, 0].sum().backward()
        assert weight.grad.abs().sum() > 0
    finally:
        weight.requires_grad_(False)
        weight.grad = None


# --- loading, on one family -------------------------------------------------------------------------------------------


def test_what_it_is():
    backbone = tiny.load("llava")
    assert backbone.is_mllm
    assert backbone.has_text
    assert (backbone.spec.family, backbone.spec.embed_dim) == ("llava", tiny.WIDTH)
    assert backbone.image_tower is None
    with pytest.raises(BackboneError, match="multimodal language model"):
        backbone.require_open("CoOp", text=True)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert load_backbone(f"transformers:{tiny.save('llava')}").spec.digest == backbone.spec.digest


def test_half_precision_and_quantisation():
    folder, full = tiny.save("llava"), tiny.load("llava")
    pixels, digests = tiny.pixels(), {full.spec.digest}
    with torch.no_grad():
        wanted = full.encode_image(pixels)
    for suffix, near in (("@bf16", 0.99), ("@int8", 0.99), ("@nf4", 0.9), ("@bf16@nf4", 0.9)):
        if suffix != "@bf16":
            pytest.importorskip("bitsandbytes")
        backbone = load_backbone(f"transformers:{folder}{suffix}")
        digests.add(backbone.spec.digest)
        assert backbone.spec.name.endswith(suffix)
        with torch.no_grad():
            features = backbone.encode_image(pixels)
        assert features.dtype == torch.float32
        assert torch.cosine_similarity(features, wanted).min() > near
    assert len(digests) == 5
    with pytest.raises(BackboneError, match="for multimodal language models"):
        load_backbone("mini@bf16")


def test_sizes_that_four_bits_do_not_take(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoConfig, AutoModelForImageTextToText

    tiny.save("llava", tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.text_config.intermediate_size = 96
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="layer of 96 inputs"):
        load_backbone(f"transformers:{tmp_path}@nf4")


def test_incomplete_files_and_missing_templates_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny.save("qwen2_vl", tmp_path / "a", template="")
    with pytest.raises(BackboneError, match="no chat template"):
        load_backbone(f"transformers:{folder}")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    backbone = load_backbone(f"transformers:{folder}")
    with pytest.raises(BackboneError, match="isn't a template for images"):
        backbone.encode_image(tiny.pixels(1, 56))
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "q_proj" in name or "qkv" in name))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match="lack 1 weights"):
        load_backbone(f"transformers:{folder}")
    with pytest.raises(MissingPathError):
        load_backbone("transformers:./nowhere")


def test_an_older_file_of_the_template(tmp_path):
    import json

    folder = tiny.save("llava", tmp_path, template="")
    plain = load_backbone(f"transformers:{folder}").prompter.render([Turn("q")])
    assert plain == "USER: <image>\nq ASSISTANT:"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": tiny.USER}))
    assert load_backbone(f"transformers:{folder}").prompter.render([Turn("q")]).startswith("<s>USER: <image>")
    (folder / "chat_template.json").write_text("{}")
    with pytest.raises(BackboneError, match="damaged"):
        load_backbone(f"transformers:{folder}")


def test_a_model_without_a_placeholder_is_refused(tmp_path):
    import json

    folder = tiny.save("blip2", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for number in (None, 900):
        config["image_token_index"] = number
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(BackboneError, match="no placeholder for images"):
            load_backbone(f"transformers:{folder}")


def test_code_of_a_repository_is_never_run(tmp_path):
    import json

    folder = tiny.save("llava", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForImageTextToText": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('code of the repository was run')")
    assert load_backbone(f"transformers:{folder}").is_mllm


def test_encoder_decoders_are_refused(tmp_path):
    import json

    folder = tiny.save("blip2", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = {"model_type": "t5", "d_model": 64, "num_layers": 1, "vocab_size": 320}
    config["use_decoder_only_language_model"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match="encoder-decoder"):
        load_backbone(f"transformers:{folder}")


def test_too_many_images_and_too_long_prompts():
    backbone = tiny.load("llava")
    with pytest.raises(DataError, match="shows 1 images, and 2 were given"):
        backbone.prompter.ids([Turn("q")], [4, 4])
    with pytest.raises(BackboneError, match=r"more than the 512 that"):
        backbone.prompter.ids([Turn("q " * 300)], [4])
    with pytest.raises(BackboneError, match="more than the 512"):
        backbone.text_features(["word " * 120])
    with pytest.raises(DataError, match="control token"):
        backbone.text_features(["an <image> of it"])


def test_scores_of_one_answer_per_prompt(backbone, features, rows):
    """Each token's, behind the shared prompts, against passes of their own; gradients too."""
    answers, place = [[70, 71, 72], [80], [90, 91]], [1, 0, 1]
    with torch.no_grad():
        prefix = backbone.prefix(rows, features)
        found = backbone.answer_scores(prefix.select(place), answers, temperature=2.0)
    wanted = []
    for i, answer in zip(place, answers, strict=True):
        own = features.select([i])
        with torch.no_grad():
            hidden = backbone.hidden(backbone.batch([rows[i] + answer], own, [len(answer)]), own)
        log_probs = (backbone.logits(hidden)[0] / 2).log_softmax(dim=-1)
        wanted += [log_probs[len(rows[i]) + k - 1, token] for k, token in enumerate(answer)]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-4)
