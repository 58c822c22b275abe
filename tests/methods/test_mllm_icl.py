"""In-context examples, CIRCLE and pairs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.errors import AdapterError, BackboneError, ConfigError, UnsupportedError
from adaptkit.methods.mllm.mllm_icl import MllmIcl, MllmIclConfig, _balanced, _reordered, _together
from adaptkit.methods.mllm.mllm_zero_shot import MllmZeroShot
from adaptkit.types import FitTask, TensorInputs
from tests.backbones import tiny_mllm as tiny

NAMES = ("ship", "cat", "hot_dog")
SHORT = {"prompt": "What {noun}?", "pair_prompt": "Same {noun}?"}


@pytest.fixture(scope="module")
def backbone():
    return tiny.load("llava")


def shots(side=tiny.SIDE, each=2):
    pixels = (tiny.pixels(3 * each, side, seed=5) * 255).round() / 255
    return FitTask(NAMES, TensorInputs(pixels[None], torch.arange(3).repeat(each)))


def fitted(backbone, task=None, **settings):
    method = MllmIcl(backbone, NAMES, config=MllmIclConfig(**{"examples": 2, **SHORT, **settings}))
    report = method.fit(task or shots(backbone.spec.preprocessing.image_size))
    return method, report


def ask(method, pixels):
    with torch.no_grad():
        return method(pixels)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "gemma3", "smolvlm", "blip2"])
def test_scores_are_those_of_the_written_conversation(kind):
    backbone = tiny.load(kind)
    side = backbone.spec.preprocessing.image_size
    method, _ = fitted(backbone, normalisation="sum")
    query = tiny.pixels(1, side, seed=9)
    ours = ask(method, query)
    with torch.no_grad():
        wanted = method.features(query)
        chosen = method._chosen(wanted, method.targets.tolist(), None)
        features = ImageFeatures.join([method.shots().select(chosen), wanted])
    assert len(chosen) == 2
    shown = [name.replace("_", " ") for name in NAMES]
    turns = [Turn("What object?", 1, shown[int(method.targets[i])]) for i in chosen] + [Turn("What object?")]
    answers = backbone.prompter.answers([Turn("What object?")], shown)
    row = backbone.prompter.ids(turns, features.counts)
    with torch.no_grad():
        long_way = by_hand(backbone, row, features, answers)
    torch.testing.assert_close(ours, long_way, rtol=1e-5, atol=1e-4)


def by_hand(backbone, row, features, answers):
    found = []
    for answer in answers:
        hidden = backbone.hidden(backbone.batch([row + answer], features, [len(answer)]), features)
        log_probs = backbone.logits(hidden)[0].log_softmax(dim=-1)
        found.append(sum(log_probs[len(row) + k - 1, token] for k, token in enumerate(answer)))
    return torch.stack(found)[None]


def test_examples_change_the_answer_and_the_nearest_comes_last(backbone):
    method, _ = fitted(backbone)
    plain = MllmZeroShot(backbone, NAMES, config=replace(MllmZeroShot.config_class(), prompt=SHORT["prompt"]))
    query = tiny.pixels(2)
    assert (ask(method, query) - ask(plain, query)).abs().max() > 1e-3
    own = method.images[4:5].float() / 255
    with torch.no_grad():
        assert method._chosen(method.features(own), method.targets.tolist(), None)[-1] == 4
        assert 4 not in method._chosen(method.features(own), method.targets.tolist(), 4)


def test_orders_are_averaged(backbone):
    query = tiny.pixels(2)
    one, two = fitted(backbone)[0], fitted(backbone, orders=2)[0]
    assert not torch.equal(ask(one, query), ask(two, query))
    assert sorted(_reordered([5, 6, 7], 1)) == [5, 6, 7]


def test_balanced_examples():
    labels = [0] * 5 + [1] * 2 + [2] * 2
    picked = _balanced(list(range(9)), labels, 6)
    assert torch.bincount(torch.tensor([labels[index] for index in picked])).tolist() == [2, 2, 2]
    assert picked == _balanced(list(range(9)), labels, 6)


def test_circle_ends_and_looks_at_no_label(backbone):
    task = shots()
    method, report = fitted(backbone, task, labels="circle", rounds=3)
    assert 1 <= report["circle_rounds"] <= 3
    assert isinstance(report["circle_stable"], bool)
    mixed = FitTask(NAMES, TensorInputs(task.train.values, task.train.labels.flip(0)))
    other, _ = fitted(backbone, mixed, labels="circle", rounds=3)
    assert torch.equal(method.targets, other.targets)
    assert task.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    _, report = fitted(backbone, labels="circle", rounds=1)
    assert report["circle_rounds"] == 1


def test_pairs_do_not_depend_on_their_order(backbone, monkeypatch):
    method, _ = fitted(backbone, route="pairwise")
    with torch.no_grad():
        query, support = method.features(tiny.pixels(1)), method.features(tiny.pixels(1, seed=7))
        monkeypatch.setattr(method, "_shots_memo", support)
        forth = method._same(query, [0])
        monkeypatch.setattr(method, "_shots_memo", query)
        back = method._same(support, [0])
    torch.testing.assert_close(forth, back, rtol=1e-4, atol=1e-4)


def test_pairs_by_mean_and_by_the_best(backbone):
    query = tiny.pixels(2)
    mean, best = fitted(backbone, route="pairwise")[0], fitted(backbone, route="pairwise", reduce="max")[0]
    assert (ask(best, query) >= ask(mean, query) - 1e-5).all()
    short = ask(fitted(backbone, route="pairwise", shortlist=1)[0], query)
    assert ((short > -500).sum(dim=1) == 1).all()


def test_pairs_have_nothing_to_compare_new_classes_with(backbone):
    method, _ = fitted(backbone, route="pairwise")
    query = tiny.pixels(2)
    method.set_classes(["bird", "cow"])
    assert method.uses_fallback
    plain = MllmZeroShot(backbone, ("bird", "cow"), config=replace(MllmZeroShot.config_class(), prompt="What {noun}?"))
    # the pair's question stands in front of the images' features only on InstructBLIP
    torch.testing.assert_close(ask(method, query), ask(plain, query))
    with pytest.raises(UnsupportedError, match="different scales"):
        method.set_classes(["bird", "cat"])


def test_yes_and_no_the_long_way_round(backbone):
    method, _ = fitted(backbone, route="pairwise", both_orders=False)
    with torch.no_grad():
        query = method.features(tiny.pixels(1))
        ours = method._same(query, [0])
        features = ImageFeatures.join([query, method.shots().select([0])])
    turn = Turn(method.pair_question, 2)
    answers = backbone.prompter.answers([turn], ["yes", "no"], end=False)
    row = backbone.prompter.ids([turn], features.counts)
    with torch.no_grad():
        yes, no = by_hand(backbone, row, features, answers)[0]
    torch.testing.assert_close(ours[0], yes - no, rtol=1e-4, atol=1e-4)


def test_state_of_another_backbone_is_refused(backbone):
    method, _ = fitted(backbone)
    state = {key: value.clone() for key, value in method.adapter_state().items()}
    other = MllmIcl(backbone, NAMES, config=method.config)
    other.load_adapter_state(state)
    assert torch.equal(ask(other, tiny.pixels(1)), ask(method, tiny.pixels(1)))
    with pytest.raises(AdapterError, match="another backbone"):
        other.load_adapter_state({**state, "images": state["images"][..., :14]})
    with pytest.raises(AdapterError, match="labels outside"):
        other.load_adapter_state({**state, "targets": state["targets"] + 7})
    with pytest.raises(AdapterError, match="lacks 'targets'"):
        other.load_adapter_state({"images": state["images"]})


def test_too_many_examples_are_refused_before_any_work(backbone):
    with pytest.raises(BackboneError, match="setting 'examples'"):
        MllmIcl(backbone, NAMES, config=MllmIclConfig(examples=50))
    with pytest.raises(ConfigError, match="examples is 0"):
        MllmIclConfig(examples=0)


@pytest.mark.parametrize("selection", ["balanced", "nearest"])
def test_shared_examples_change_no_number(backbone, monkeypatch, selection):
    """Queries with the same examples share one pass over them, and get the logits that they get alone."""
    from adaptkit.backbones.mllm import model

    method, _ = fitted(backbone, selection=selection, orders=2)
    pixels = tiny.pixels(5)
    together, alone = ask(method, pixels), torch.cat([ask(method, one[None]) for one in pixels])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(model, "SHARED_SHARE", 2.0)
    torch.testing.assert_close(together, ask(method, pixels), rtol=1e-5, atol=1e-5)


def test_questions_with_the_same_examples_are_asked_together():
    assert _together([[1, 2], [2, 1], [1, 2], [3, 4], [2, 1], [5, 6]]) == [[0, 2], [1, 4], [3, 5]]
    assert _together([[], []]) == [[0, 1]]
    assert _together([]) == []
