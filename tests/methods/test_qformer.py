"""Q-Former tuning: losses against loops, masks, negatives, levels, equality with the library, memorising, swapping."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.errors import ConfigError, UnsupportedError
from adaptkit.methods.adapter import AdaptedModel, load_adapter, save_adapter
from adaptkit.methods.mllm._querying import (
    contrast_loss,
    hard_negatives,
    nearest_query,
    run_layers,
    sees,
    swap_language,
)
from adaptkit.methods.mllm.mllm_zero_shot import MllmZeroShot, MllmZeroShotConfig
from adaptkit.methods.mllm.qformer import QFormer, QFormerConfig
from adaptkit.training.loop import fit_method
from tests.backbones import tiny_mllm as tiny
from tests.methods.tiny import NAMES, make_task, query

KINDS = ("blip2", "instructblip")
LABELS = torch.tensor([0, 3, 1, 0])


@pytest.fixture(scope="module", params=KINDS)
def backbone(request):
    return tiny.load(request.param)


@pytest.fixture(scope="module")
def blip():
    return tiny.load("blip2")


def make(backbone, seed=0, **settings):
    return QFormer(backbone, NAMES, config=QFormerConfig(**settings), seed=seed)


def trained(method, epochs=4, lr=1e-2, **task):
    settings = replace(method.default_training, epochs=epochs, lr=lr, min_lr=0.0)
    return fit_method(method, make_task(method.backbone, "images", **{"shots": 1, **task}), settings)


def ask(method, pixels):
    with torch.no_grad():
        return method(pixels)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- losses, masks, negatives -----------------------------------------------------------------------------------------


def test_contrast_is_a_loop():
    """The nearest of the queries, both directions, smoothed; pairs of one class share their targets."""
    images, texts = F.normalize(numbers(4, 3, 8), dim=2), F.normalize(numbers(4, 8, seed=1), dim=1)
    similarity = nearest_query(images, texts) / 0.07
    for i in range(4):
        for j in range(4):
            assert similarity[i, j] == pytest.approx(float(max(images[i] @ texts[j])) / 0.07, rel=1e-5)
    for labels in (torch.arange(4), LABELS):
        total = 0.0
        for i in range(4):
            same = [j for j in range(4) if labels[j] == labels[i]]
            for scores in (similarity[i], similarity[:, i]):
                log_probs = scores.log_softmax(dim=0)
                for j in range(4):
                    target = 0.1 / 4 + (0.9 / len(same) if j in same else 0.0)
                    total -= target * float(log_probs[j]) / 4
        assert contrast_loss(similarity, labels).item() == pytest.approx(total / 2, rel=1e-5)
    plain = F.cross_entropy(similarity, torch.arange(4), label_smoothing=0.1)
    other = F.cross_entropy(similarity.T, torch.arange(4), label_smoothing=0.1)
    torch.testing.assert_close(contrast_loss(similarity, torch.arange(4)), (plain + other) / 2)


def test_negatives_are_never_the_diagonal_nor_of_the_same_class():
    similarity, drawn = 50 * torch.eye(4), []
    torch.manual_seed(0)
    for _ in range(60):
        found = hard_negatives(similarity, LABELS)
        assert (LABELS[found] != LABELS).all()
        alone = hard_negatives(similarity, torch.zeros(4, dtype=torch.int64))
        assert (alone != torch.arange(4)).all()
        drawn += found.tolist()
    assert set(drawn) == {0, 1, 2, 3}
    near = torch.zeros(4, 4)
    near[0, 2] = 50.0
    assert all(int(hard_negatives(near, torch.arange(4))[0]) == 2 for _ in range(20))


def test_masks_of_the_three_modes():
    assert sees("apart", 2, 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert sees("together", 2, 2).int().tolist() == [[1] * 4] * 4
    wanted = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert sees("decoding", 2, 3).int().tolist() == wanted


def test_masks_hold_inside_the_layers(backbone):
    """Apart, no side moves the other; decoding, texts see queries and no later text; together, both move."""
    method = make(backbone, stages="1+2")
    former, images = method.mllm.model.qformer, numbers(1, 5, 64)
    states = numbers(1, 3 + 4, 64, seed=1)

    def moved(mode, place):
        """Which positions another vector at `place` moves."""
        other = states.clone()
        other[:, place] += numbers(64, seed=2)
        with torch.no_grad():
            one, two = (run_layers(former, s, sees(mode, 3, 4)[None], images, 3) for s in (states, other))
        return [(a - b).abs().max() > 1e-6 for a, b in zip(one[0], two[0], strict=True)]

    assert moved("apart", 0) == [True] * 3 + [False] * 4
    assert moved("apart", 5) == [False] * 3 + [True] * 4
    assert moved("together", 5) == [True] * 7
    assert moved("decoding", 0) == [True] * 7
    assert moved("decoding", 5) == [False] * 5 + [True] * 2


# --- parts ------------------------------------------------------------------------------------------------------------


def test_it_begins_as_the_library_model(backbone):
    pixels = query(backbone, "images", 3)
    plain = MllmZeroShot(backbone, NAMES, config=MllmZeroShotConfig(normalisation="sum"))
    for level in "abcd":
        method = make(backbone, level=level, answers="names", stages="1+2")
        torch.testing.assert_close(ask(method, pixels), ask(plain, pixels), rtol=1e-5, atol=1e-4)


def test_what_the_levels_train(blip):
    base = 3 * 64 + 64 * 64 + 64
    assert make(blip).num_trained() == base
    layer = 3 * (64 + 64)  # query, key and value of one attention, per rank
    assert make(blip, level="b", r=4).num_trained() == base + 2 * 2 * 4 * layer
    whole = sum(p.numel() for p in blip.model.qformer.parameters())
    assert make(blip, level="c").num_trained() == base + whole
    language = 2 * 4 * (64 + 64) * 2 * 2 + 2 * 4 * (64 + 128) * 2  # q, k, v, out; fc1, fc2; two blocks; rank 4
    assert make(blip, level="d", r=4).num_trained() == base + whole + language
    first = {name for name, _ in make(blip).named_parameters()}
    assert first == {f"adapter.{n}" for n in ("query_tokens", "language_projection.weight", "language_projection.bias")}


@pytest.mark.parametrize("level", ["a", "b", "c", "d"])
@pytest.mark.parametrize("stages", ["1", "2", "1+2"])
def test_every_level_and_stage_learns(backbone, level, stages):
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    answer = "itc" if stages == "1" else "lm"
    method = make(backbone, level=level, r=4, stages=stages, answer=answer)
    report = trained(method)
    losses = report["losses"]
    half = len(losses) // 2
    assert losses[half - 1] < losses[0]
    assert losses[-1] < losses[half]
    assert (report["level"], report["stages"]) == (level, stages)
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


def test_gradients_of_stage_1(backbone):
    method = make(backbone, stages="1", answer="itc", level="c")
    images = torch.stack(method.shown(query(backbone, "images", 4)).tokens)
    captions = method.candidate_texts([NAMES[label] for label in LABELS])
    torch.manual_seed(0)
    terms = method.first_stage(images, captions, LABELS)
    assert set(terms) == {"contrast", "matching", "generation"}
    torch.autograd.backward(sum(terms.values()))
    assert all(p.grad is not None and p.grad.any() for p in method.stage_1.parameters())
    assert method.queries.grad.any()
    torch.manual_seed(0)
    off = make(backbone, stages="1", answer="itc", level="c", generation=False)
    assert set(off.first_stage(images, captions, LABELS)) == {"contrast", "matching"}
    assert set(off.first_stage(images[:1], captions[:1], LABELS[:1])) == {"contrast"}  # nothing to mix it up with


def test_the_two_stages_follow_each_other(blip):
    method = make(blip, stages="1+2")
    seen, first, second = [], method.first_stage, method.answer_loss
    method.first_stage = lambda *given: seen.append("1") or first(*given)
    method.answer_loss = lambda *given: seen.append("2") or second(*given)
    trained(method, epochs=5)
    assert seen == ["1", "1", "1", "2", "2"] or seen == ["1", "1", "2", "2", "2"]


def test_texts_of_stage_1_do_not_depend_on_their_neighbours(backbone):
    method = make(backbone, stages="1", answer="itm")
    rows = method._text_rows(["a cat", "a much longer sentence"])
    images = torch.stack(method.shown(query(backbone, "images", 2)).tokens)
    with torch.no_grad():
        together, alone = method.encode_texts(rows), method.encode_texts(rows[:1])
        pairs, pair = method.matching(images, rows), method.matching(images[:1], rows[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pairs[:1], pair, rtol=1e-5, atol=1e-6)


def test_the_instruction_enters_instructblips_queries():
    backbone = tiny.load("instructblip")
    images = numbers(2, 5, 64)
    with torch.no_grad():
        one, two = (make(backbone, prompt=p).asked_queries(images) for p in ("Which animal?", "What colour is it?"))
        free, other = (
            make(backbone, prompt=p, text_condition=False).asked_queries(images) for p in ("Which animal?", "Colour?")
        )
    assert (one - two).abs().max() > 1e-3
    assert (one - free).abs().max() > 1e-3
    assert torch.equal(free, other)


# --- learning ---------------------------------------------------------------------------------------------------------


def test_four_captions_are_memorised(blip):
    method = make(blip, level="d", r=16)
    task = make_task(blip, "images", shots=1)
    fit_method(method, task, replace(method.default_training, epochs=60, lr=1e-2, weight_decay=0.0))
    pixels = task.train.select(torch.arange(4))
    with torch.no_grad():
        said = method.mllm.generate(method.asked(method.features(pixels)), 40)
    assert [blip.prompter.text(ids) for ids in said] == method.candidate_texts(NAMES)


@pytest.mark.parametrize("answer", ["itc", "itm"])
def test_stage_1_answers_by_what_it_learned(backbone, answer):
    method = make(backbone, level="c", stages="1", answer=answer, generation=False)
    task = make_task(backbone, "images", shots=2)
    fit_method(method, task, replace(method.default_training, epochs=40, lr=3e-3))
    assert ask(method, task.train.select(torch.arange(8))).argmax(dim=1).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_on_disk(backbone, tmp_path):
    method = make(backbone, level="b", r=4, stages="1+2", answer="itc")
    trained(method)
    save_adapter(tmp_path / "out", AdaptedModel(method))
    pixels = query(backbone, "images", 3)
    assert torch.equal(ask(load_adapter(tmp_path / "out", backbone).method, pixels), ask(method, pixels))


def test_another_language_model_behind_the_same_q_former(blip):
    import transformers as t

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        language = t.LlamaForCausalLM(t.LlamaConfig(**{**tiny._text("llama"), "hidden_size": 32})).eval()
    before = {key: value.clone() for key, value in blip.model.state_dict().items()}
    swapped = swap_language(blip.model, language, torch.Generator().manual_seed(0))
    for part in ("qformer", "vision_model"):
        one, two = (dict(getattr(m, part).named_parameters()) for m in (blip.model, swapped))
        assert one.keys() == two.keys()
        assert all(one[name] is two[name] for name in one)
    assert swapped.query_tokens is blip.model.query_tokens
    assert swapped.language_projection.weight.shape == (32, 64)
    assert swapped.config.text_config.model_type == "llama"
    ids = torch.tensor([[*[swapped.config.image_token_id] * 3, 5, 6]])
    logits = [swapped(input_ids=ids, pixel_values=numbers(1, 3, 28, 28, seed=s)).logits for s in (0, 1)]
    assert logits[0].shape == (1, 5, tiny.VOCABULARY)
    assert not torch.equal(logits[0][:, -1], logits[1][:, -1])
    assert all(torch.equal(before[key], value) for key, value in blip.model.state_dict().items())


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in tiny.KINDS if "blip" not in kind])
def test_families_without_a_q_former(kind):
    with pytest.raises(UnsupportedError, match="has none: choose a BLIP-2 or InstructBLIP backbone"):
        make(tiny.load(kind))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": 0}, "r is 0"),
        ({"answer": "itc"}, "choose stages=1 or"),
        ({"stages": "1"}, "choose answer=itc"),
        ({"align": -1.0}, "align is -1.0"),
    ],
)
def test_settings_that_cannot_be_used(settings, says):
    with pytest.raises(ConfigError, match=says):
        QFormerConfig(**settings)


def test_no_first_stage_to_ask(blip):
    with pytest.raises(ConfigError, match="no first stage"):
        make(blip).encode_texts([[1, 2]])


def test_other_ways_of_asking(blip):
    method = make(blip, answers="names", route="letters")
    assert torch.isfinite(ask(method, query(blip, "images", 2))).all()
    assert method.prompt_ids([Turn(method.question)], [3]).count(blip.image_token) == 3
