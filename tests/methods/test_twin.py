"""TWIN: its losses the long way round, what a toy problem teaches it, what it reports, other classes, bad input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.errors import BackboneError, ConfigError, DataError, UnknownNameError, UnsupportedError
from adaptkit.methods.adapter import AdaptedModel, load_adapter, save_adapter
from adaptkit.methods.mllm._tuning import NumberedInputs
from adaptkit.methods.mllm.twin import PairInputs, Twin, TwinConfig, reward
from adaptkit.storage import read_safetensors
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs
from tests.backbones import tiny_mllm as tiny
from tests.methods.test_mllm_icl import by_hand
from tests.methods.tiny import NAMES, drawn_images, make_task, query

pytest.importorskip("peft")
SHORT = {"pair_prompt": "Same {noun}?", "prompt": "What {noun}?", "dropout": 0.0}


@pytest.fixture(scope="module")
def llava():
    return tiny.load("llava")


def make(backbone, names=NAMES, **settings):
    return Twin(backbone, names, config=TwinConfig(**{**SHORT, **settings}))


def trained(method, epochs=1, lr=1e-2, **task):
    settings = replace(method.default_training, epochs=epochs, lr=lr)
    return fit_method(method, make_task(method.backbone, "images", **{"shots": 2, "val": False, **task}), settings)


def prepared(backbone, **settings):
    """A method with its pairs made, as it is in the loop before the first step, and a batch."""
    method, task = make(backbone, **settings), make_task(backbone, "images", shots=2, val=False)
    kept = {}

    def loop(method, task):
        kept["batch"] = task.train.select(torch.arange(3))
        kept["numbered"] = method._numbered
        return {}

    loop.settings = method.default_training
    method.fit(task, loop)
    method._numbered = kept["numbered"]
    return method, kept["batch"]


def gradients(method, batch):
    method.zero_grad()
    loss = sum(method.losses(batch, torch.zeros(len(batch))).values())
    torch.autograd.backward(loss)
    return loss.detach(), {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def words_by_hand(method, batch, *, end):
    """log p of [no, yes] for the pairs of a batch, [pairs, 2], one pass per word; and what is right."""
    pairs = batch[:, :-1].flatten()
    places = method._pairs.places[pairs]
    turn = Turn(method.pair_question, 2)
    with torch.no_grad():
        features = method.features(method.images[places.flatten()].float() / 255)
    row = method.mllm.prompter.ids([turn], features.counts[:2])
    answers = method.mllm.prompter.answers([turn], ["no", "yes"], end=end)
    pair = lambda i: features.select([2 * i, 2 * i + 1])  # noqa: E731
    scores = torch.cat([by_hand(method.mllm, row, pair(i), answers) for i in range(len(pairs))])
    return scores, method._pairs.same[pairs]


# --- losses -----------------------------------------------------------------------------------------------------------


def test_the_logit_loss_is_that_of_yes_over_no(llava):
    method, batch = prepared(llava)
    scores, same = words_by_hand(method, batch, end=False)
    wanted = F.binary_cross_entropy_with_logits(scores[:, 1] - scores[:, 0], same)
    loss, found = gradients(method, batch)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    assert same.tolist() == [1, 0] * 3  # balanced
    assert len(found) == 2 * 2 * 7
    assert any(grad.abs().max() > 0 for grad in found.values())


def test_the_answer_loss_is_that_of_the_right_word_and_the_end(llava):
    method, batch = prepared(llava, mode="sft")
    scores, same = words_by_hand(method, batch, end=True)
    wanted = -scores.gather(1, same.long()[:, None]).mean()
    torch.testing.assert_close(gradients(method, batch)[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["logit", "sft"])
def test_micro_batches_change_nothing(llava, mode):
    method, batch = prepared(llava, mode=mode)
    loss, whole = gradients(method, batch)
    object.__setattr__(method.config, "micro_batch", 2)
    again, parts = gradients(method, batch)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
    assert len(whole) == len(parts) == 28
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-4, atol=1e-5)


def test_batches_are_balanced_or_as_the_pairs_are():
    images = NumberedInputs(TensorInputs(torch.zeros(3, 4, 3, 8, 8), torch.zeros(4)), None, keep=True)
    couples = PairInputs(images, torch.tensor([[0, 5], [1, 6]]))
    assert couples.num_views == 3
    assert couples.select(torch.tensor([1, 0]), 2).tolist() == [[1, 6, 2], [0, 5, 2]]
    single = PairInputs(images, torch.arange(3)[:, None])
    assert single.select(torch.tensor([2])).tolist() == [[2, 0]]
    assert single.labels.tolist() == [0, 0, 0]


def grey(shots, seed):
    """Dark and light noise, half of the images each."""
    labels = torch.arange(2).repeat_interleave(shots)
    noise = 0.05 * torch.randn(2 * shots, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    return TensorInputs((0.1 + 0.8 * labels[:, None, None, None] + noise)[None], labels)


def test_a_toy_problem_is_separated(llava):
    """A model that always says no learns to tell pairs apart, also of images that it didn't see, and then classes."""
    method = make(llava, ("dark", "light"), confused=0.0, near=0.0, pairs=12)
    settings = replace(method.default_training, epochs=10, lr=1e-2)
    report = fit_method(method, FitTask(("dark", "light"), grey(4, 1), grey(2, 2)), settings)
    assert report["losses"][-1] < 0.1 < report["losses"][0]
    assert report["measured_on"] == "validation images"
    assert report["before"]["accuracy"] == 0.5
    assert report["before"]["yes_rate"] == 0
    assert report["after"] == {"accuracy": 1, "yes_rate": 0.5, "swap_consistency": 1, "majority_rate": 0.5}
    new = grey(2, 3)
    with torch.no_grad():
        assert method(new.values[0]).argmax(dim=1).tolist() == new.labels.tolist()


# --- rewards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tagged", "word"),
    [
        ("They match. <answer>yes</answer>", True, "yes"),
        ("<answer> No! </answer>", True, "no"),
        ("<answer>no</answer> wait: <answer>Yes.</answer>", True, "yes"),
        ("<answer>yes", True, "yes"),
        ("yes", True, None),
        ("", True, None),
        ("<answer></answer>", True, None),
        ("<answer>yes and no</answer>", True, None),
        ("<answer>yes</answer><answer>maybe</answer>", True, None),
        ("Yes.", False, "yes"),
        ("no", False, "no"),
        ("yes, they do", False, None),
        ("<answer>yes</answer>", False, None),
        ("", False, None),
    ],
)
def test_the_reward_table(text, tagged, word):
    assert [reward(text, wanted, tagged=tagged) for wanted in ("yes", "no")] == [word == "yes", word == "no"]


GRPO = {"mode": "grpo", "rollouts": 3, "max_tokens": 4}


def test_questions_are_the_pairs(llava):
    method, _ = prepared(llava, **GRPO)
    numbers = method._image_numbers(torch.tensor([2, 5]), torch.zeros(2, dtype=torch.int64))
    assert numbers.tolist() == method._pairs.places[[2, 5]].flatten().tolist()
    asked = method.questions(numbers, method._pairs.same[[2, 5]])
    assert [question.images for question in asked] == [(0, 1), (2, 3)]
    assert [question.truth for question in asked] == ["yes" if same else "no" for same in method._pairs.same[[2, 5]]]
    text = method.mllm.prompter.render(asked[0].turns)
    assert "Same object? First explain" in text
    assert text.count("<image>") == 2
    row = method.pair_rows(method.features(tiny.pixels(2)))[0]
    assert method.mllm.prompter.tokenizer.decode(row).endswith("ASSISTANT:<answer>")


def test_grpo_learns_from_what_it_wrote(llava, monkeypatch):
    """Rewarded for what a random model does now and then, it does it more."""
    monkeypatch.setattr(Twin, "rewards", lambda self, text, question: {"accuracy": float("e" in text)})
    method = make(llava, explain=False, micro_batch=4, **{**GRPO, "rollouts": 8, "max_tokens": 3})
    report = trained(method, epochs=4, lr=2e-2)
    assert report["mode"] == "grpo"
    assert len(report["reward_accuracy"]) == 4
    assert report["reward_accuracy"][-1] > report["reward_accuracy"][0] + 0.2
    with torch.no_grad():
        assert torch.isfinite(method(query(llava, "images", 1))).all()
    with pytest.raises(BackboneError, match="two images with its answer"):
        make(llava, mode="grpo")  # max_tokens is 1024


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_report(llava):
    method = make(llava, ratio=1.5)
    report = trained(method)
    assert report["pairs"] == {"same": 4, "near": 3, "confused": 3}
    assert report["measured_on"] == "training pairs"
    assert report["measured_pairs"] == 10
    assert set(report["before"]) == {"accuracy", "yes_rate", "swap_consistency", "majority_rate"}
    assert report["before"]["majority_rate"] == 0.6
    assert report["mode"] == "logit"
    assert report["prompt"] == "Same object?"
    assert trained(make(llava), val=True)["measured_on"] == "validation images"
    held = trained(make(llava, held_out=0.5), shots=4, val=True)
    assert held["measured_on"] == "held-out shots"
    assert held["pairs"]["same"] == 4
    with torch.no_grad():
        method(query(llava, "images", 1))
    facts = method.answer_facts()
    assert facts["pair_answers"] == 8 * 2
    assert 0 <= facts["yes_rate"] <= 1
    assert 0 <= facts["swap_consistency"] <= 1
    assert method.answer_facts() == {}


def test_one_shot_is_paired_with_another_view_of_itself(llava):
    method = make(llava)
    seen = []
    shown = method.training_features
    method.training_features = lambda numbers: seen.extend(numbers.tolist()) or shown(numbers)
    report = trained(method, shots=1, views=3)
    assert report["pairs"]["same"] == 4
    alone = [pair for pair in zip(seen[::2], seen[1::2], strict=True) if pair[0] % 4 == pair[1] % 4]
    assert len(alone) == 4
    assert all(first >= 4 > second for first, second in alone)  # a drawn view beside the plain one


def test_related_classes_need_parents(llava):
    parents = dict(zip(NAMES, ("animal", "animal", "place", "place"), strict=True))
    report = trained(make(llava, related=1.0, near=0.0, confused=0.0, taxonomy=parents))
    assert report["pairs"] == {"same": 4, "related": 4}
    with pytest.raises(UnknownNameError, match="Did you mean 'tabby cta'"):
        make(llava, related=0.5, confused=0.0, taxonomy={"tabby cta": "animal"})


# --- other classes, other instances -----------------------------------------------------------------------------------


def test_other_classes_by_shots_of_theirs(llava):
    method = make(llava)
    trained(method)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    shots = drawn_images(labels, 1, 5, 28)[0]
    other = method.for_classes(("a", "b", "c"), shots, labels)
    assert not other.uses_fallback
    inputs = query(llava, "images", 2)
    with torch.no_grad():
        logits = other(inputs)
        # the same as if it had been fitted on them with these very weights
        pixels = (shots * 255).round().clamp(0, 255) / 255
        pair = method.margins(method.features(torch.stack([inputs[0], pixels[0]])))
        back = method.margins(method.features(torch.stack([pixels[0], inputs[0]])))
        pair3 = method.margins(method.features(torch.stack([inputs[0], pixels[3]])))
        back3 = method.margins(method.features(torch.stack([pixels[3], inputs[0]])))
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits[0, 0], (pair + back + pair3 + back3)[0] / 4, rtol=1e-4, atol=1e-4)
    assert len(method.images) == 8
    for wrong, message in ((labels + 1, "label 3"), (labels.clamp(max=1), "'c' has no shots"), (labels[:4], "6 shots")):
        with pytest.raises(DataError, match=message):
            method.for_classes(("a", "b", "c"), shots, wrong)


def test_other_classes_without_shots_are_the_untrained_models(llava):
    method = make(llava)
    trained(method)
    method.set_classes(("bird", "cow"))
    assert method.uses_fallback
    with pytest.raises(UnsupportedError, match="different scales"):
        method.set_classes(("bird", NAMES[0]))


def test_an_adapter_comes_back_with_its_peft_folder(llava, tmp_path):
    method = make(llava)
    trained(method)
    save_adapter(tmp_path / "a", AdaptedModel(method))
    again = load_adapter(tmp_path / "a", llava).method
    inputs = query(llava, "images", 2)
    with torch.no_grad():
        assert torch.equal(again(inputs), method(inputs))
    held = read_safetensors(tmp_path / "a" / "peft" / "adapter_model.safetensors")
    assert len(held) == 28
    assert any(value.any() for name, value in held.items() if "lora_B" in name)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"near": 0.8, "confused": 0.5}, "add up to 1.3"),
        ({"mode": "grpo", "dropout": 0.1}, "0 with mode grpo"),
        ({"rollouts": 1}, "rollouts is 1"),
        ({"near": -0.1}, "near is -0.1"),
        ({"ratio": 0.0}, "ratio is 0.0"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"related": 0.5, "near": 0.0}, "taxonomy is {}, but must be the parent"),
        ({"held_out": 0.9}, "held_out is 0.9"),
        ({"r": 0}, "r is 0"),
        ({"pairs": -1}, "pairs is -1"),
        ({"shortlist": -1}, "shortlist is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        TwinConfig(**settings)


def test_tasks_that_give_no_pairs(llava):
    one = FitTask(NAMES[:1], TensorInputs(torch.rand(1, 3, 3, 28, 28), torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(DataError, match="at least two classes"):
        fit_method(make(llava, NAMES[:1]), one)
    with pytest.raises(DataError, match="choose a ratio nearer to 1"):
        trained(make(llava, ratio=500.0))
    with pytest.raises(DataError, match="control token"):
        make(llava, pair_prompt="Same <image>?")
    with pytest.raises(ConfigError, match="no other field"):
        make(llava, pair_prompt="Same {thing}?")
