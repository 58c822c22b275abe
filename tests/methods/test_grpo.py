"""Learning by rewards: the objective by hand, drawing, and a method that is rewarded for one letter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.backbones.mllm.sampling import Sampling
from adaptkit.errors import BackboneError, ConfigError
from adaptkit.methods.mllm import _grpo
from adaptkit.methods.mllm._grpo import (
    GrpoConfig,
    GrpoMethod,
    Question,
    group_advantages,
    numbers_for,
    roll,
    token_losses,
    token_weights,
)
from adaptkit.methods.mllm._lowrank import add_low_rank
from adaptkit.methods.mllm.mllm_zero_shot import MllmZeroShot, MllmZeroShotConfig
from adaptkit.training.loop import fit_method
from tests.backbones import tiny_mllm as tiny
from tests.methods.tiny import NAMES, make_task, query

pytest.importorskip("peft")


@dataclass(frozen=True)
class LetterConfig(GrpoConfig, MllmZeroShotConfig):
    max_tokens: int = 1

    def __post_init__(self) -> None:
        GrpoConfig.__post_init__(self)
        MllmZeroShotConfig.__post_init__(self)


class LetterMethod(GrpoMethod, MllmZeroShot):
    """Is asked one question per image and rewarded for the letter that stands first in its class's name."""

    name = "letter"
    config_class = LetterConfig
    config: LetterConfig

    def tune(self, twin):
        add_low_rank(twin, twin.family.lora_targets("language"), self.generator, r=4, lora_alpha=8)

    def shown(self, pixels):
        return self.features(pixels)

    def questions(self, inputs, labels):
        return [Question((Turn("Which?"),), (i,), NAMES[label][0]) for i, label in enumerate(labels.tolist())]

    def rewards(self, text, question):
        return {"letter": float(text == question.truth)}


@pytest.fixture(scope="module")
def llava():
    return tiny.load("llava")


def make(backbone, **settings):
    return LetterMethod(backbone, NAMES, config=LetterConfig(**settings))


def shaken(method, size=0.05):
    numbers = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=numbers))
    return method


def gradients(method, pixels, labels, seed=0):
    method.zero_grad()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        loss = sum(method.losses(pixels, labels).values())
    torch.autograd.backward(loss)
    return loss.detach(), {name: p.grad.clone() for name, p in method.named_parameters()}


# --- the objective ----------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    std = (4 * 0.25 / 3) ** 0.5  # of a sample
    wanted = torch.tensor([0.5, -0.5, -0.5, 0.5])
    torch.testing.assert_close(group_advantages(rewards)[0], wanted / (std + 1e-4))
    torch.testing.assert_close(group_advantages(rewards, scaled=False)[0], wanted)
    assert not group_advantages(rewards)[1:].any()  # equal rewards teach nothing


def test_token_weights_by_hand():
    assert token_weights([1, 3], "token-mean").tolist() == [0.25] * 4
    torch.testing.assert_close(token_weights([1, 3], "sequence-mean"), torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6]))


def test_token_losses_by_hand():
    policy, old = torch.tensor([0.5, 0.5, -0.5, -0.5]).log1p(), torch.zeros(4)  # ratios 1.5 and 0.5
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    losses, distance = token_losses(policy, old, None, advantages, eps=0.2, beta=0.3)
    torch.testing.assert_close(losses, -torch.tensor([1.2, -1.5, 0.5, -0.8]))
    assert not distance.any()
    reference = policy + torch.tensor([0.0, 1.0, -1.0, 2.0])
    with_kl, distance = token_losses(policy, old, reference, advantages, eps=0.2, beta=0.3)
    e = torch.e
    torch.testing.assert_close(distance, torch.tensor([0.0, e - 2, 1 / e, e**2 - 3]))
    torch.testing.assert_close(with_kl, losses + 0.3 * distance)


# --- drawing ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(llava):
    features = llava.image_features(tiny.pixels(2))
    rows = [llava.prompter.ids([Turn(text)], [features.counts[0]]) for text in ("Which?", "What is it called?")]
    with torch.no_grad():
        return rows, features, llava.prefix(rows, features)


def test_an_answer_does_not_depend_on_what_it_is_drawn_with(llava, asked):
    rows, features, prefix = asked
    sampling = Sampling(1.0, 0.95, 1.1)
    together = roll(llava, prefix, 3, 6, sampling, [numbers_for("a"), numbers_for("b")], rows)
    with torch.no_grad():
        alone = llava.prefix(rows[1:], features.select([1]))
    assert roll(llava, alone, 3, 6, sampling, [numbers_for("b")], rows[1:])[0] == together[1]
    assert len({tuple(answer) for group in together for answer in group}) > 1
    again = roll(llava, prefix, 3, 6, sampling, [numbers_for("a"), numbers_for("c")], rows)
    assert again[0] == together[0]
    assert again[1] != together[1]


def test_an_answer_ends_with_its_first_ending_token(llava, asked, monkeypatch):
    """What is generated behind it while others still run isn't part of it, also where padding is the same token."""
    _, _, prefix = asked
    end = llava.prompter.end_tokens()[0]
    tokens = iter([[10, 11], [end, 12], [end, 13], [14, end]])

    def logits(hidden):
        return torch.nn.functional.one_hot(torch.tensor(next(tokens)), tiny.VOCABULARY).float()

    monkeypatch.setattr(llava, "logits", logits)
    assert llava.generate(prefix, 3, keep_end=True) == [[10, end], [11, 12, 13]]
    tokens = iter([[10, 11], [end, 12], [end, 13], [14, end]])
    assert llava.generate(prefix, 4) == [[10], [11, 12, 13]]


# --- a method ---------------------------------------------------------------------------------------------------------


def letter_shares(method, pixels):
    """p of each class's letter as the first token after the question, [images, classes]."""
    with torch.no_grad():
        prefix = method.prefix(method.features(pixels), [[Turn("Which?")]] * len(pixels))
        ids = [method.mllm.prompter.tokenizer(name[0], add_special_tokens=False).input_ids[0] for name in NAMES]
        return method.mllm.logits(prefix.hidden).softmax(dim=1)[:, ids]


def test_one_update_raises_what_is_rewarded_and_lowers_the_others(llava, monkeypatch):
    """Of four letters drawn once each, the right one becomes likelier for every image, and no other does."""
    letters = [llava.prompter.tokenizer(name[0], add_special_tokens=False).input_ids for name in NAMES]
    monkeypatch.setattr(_grpo, "roll", lambda mllm, prefix, *given: [letters] * len(prefix))
    method, task = make(llava, beta=0.0), make_task(llava, "images", shots=1)
    pixels = task.train.select(torch.arange(len(NAMES)))
    before = letter_shares(method, pixels)
    fit_method(method, task, replace(method.default_training, epochs=2, batch_size=4, lr=1e-3))
    moved, own = letter_shares(method, pixels) / before, torch.eye(len(NAMES), dtype=torch.bool)
    assert (moved[own] > 1.001).all()
    assert (moved[~own].reshape(len(NAMES), -1).mean(dim=1) < 0.999).all()


def test_training_by_drawn_answers(llava):
    method = make(llava, rollouts=32)
    method.rewards = lambda text, question: {"letter": float(text.isascii() and text.isalpha())}
    task = make_task(llava, "images", shots=1)
    report = fit_method(method, task, replace(method.default_training, epochs=12, batch_size=4, lr=1e-2))
    rewards = report["reward_letter"]
    assert rewards[-1] > 0.5 + rewards[0]
    assert len(report["equal_groups"]) == len(report["kl"]) == len(report["losses"]) == 12
    assert report["kl"][0] == pytest.approx(0, abs=1e-6)  # at step 0 it is the untrained model
    assert report["kl"][-1] > 1e-3


def test_the_reference_is_the_backbone(llava, monkeypatch):
    """With the updates off a twin is the base; the reference pass gives the base's numbers, also when trained."""
    method = shaken(make(llava))
    pixels, labels = query(llava, "images", 2), torch.tensor([0, 1])
    plain, seen, loss = make(llava), [], method._loss
    monkeypatch.setattr(method, "_loss", lambda prefix, drawn, more: seen.extend(drawn) or loss(prefix, drawn, more))
    method.losses(pixels, labels)
    assert len(seen) == 2
    for place, one in enumerate(seen):
        prefix = plain._prefix(plain.mllm, pixels, [replace(one.question, images=(place,))])
        with torch.no_grad():
            wanted = plain._scores(plain.mllm, prefix, [one])[0]
        torch.testing.assert_close(one.reference, wanted, rtol=1e-5, atol=1e-5)


def test_beta_0_makes_no_reference_pass(llava, monkeypatch):
    pixels, labels = query(llava, "images", 2), torch.tensor([0, 1])
    made = [(make(llava, beta=0.0), 0), (make(llava, beta=0.1), 1)]
    passes, prefix = [], llava.prefix
    monkeypatch.setattr(llava, "prefix", lambda *given: passes.append(1) or prefix(*given))
    for method, wanted in made:
        passes.clear()
        method.losses(pixels, labels)
        assert len(passes) == wanted


def test_two_images_keep_their_questions(llava):
    """A batch the other way round gives the same gradient: answers, images and questions belong together."""
    method = shaken(make(llava, rollouts=3, max_tokens=4))
    pixels, labels = query(llava, "images", 2), torch.tensor([0, 1])
    wanted = [
        method._prefix(method.mllm, pixels[[i]], method.questions(pixels[[i]], labels[[i]])).hidden for i in (0, 1)
    ]
    found = method._prefix(method.mllm, pixels, method.questions(pixels, labels)).hidden
    turned = method._prefix(method.mllm, pixels.flip(0), method.questions(pixels.flip(0), labels.flip(0))).hidden
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned, found.flip(0), rtol=1e-4, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-2


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean"])
def test_parts_of_a_batch_add_up(llava, aggregation):
    pixels, labels = query(llava, "images", 5), torch.tensor([0, 1, 2, 3, 0])
    settings = {"aggregation": aggregation, "rollouts": 3, "max_tokens": 4}
    method = shaken(make(llava, **settings))
    method.rewards = lambda text, question: {"length": float(len(text))}
    whole, one = gradients(method, pixels, labels)
    method.config = replace(method.config, micro_batch=2)
    parts, other = gradients(method, pixels, labels)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)
    assert len(one) == 28
    for name, grad in one.items():
        torch.testing.assert_close(other[name], grad, rtol=1e-3, atol=1e-5)


def test_the_loss_is_that_of_whole_rows(llava):
    """Against one plain pass over each question with each answer, no cache, no sharing."""
    method = shaken(make(llava, rollouts=3, max_tokens=5, beta=0.5))
    method.rewards = lambda text, question: {"length": float(len(text))}
    pixels, labels = query(llava, "images", 2), torch.tensor([0, 1])
    seen, loss = [], method._loss
    method._loss = lambda prefix, drawn, weights: seen.extend(drawn) or loss(prefix, drawn, weights)
    found, grads = gradients(method, pixels, labels)
    method.zero_grad()
    features, total = method.features(pixels), 0.0
    for place, one in enumerate(seen):
        prompt = method.prompt_ids(one.question.turns, [features.counts[place]])
        for answer, advantage in zip(one.answers, one.advantages, strict=True):
            own = features.select([place])
            scores = []
            for mllm in (method.mllm, llava):
                hidden = mllm.hidden(mllm.batch([prompt + answer], own, [len(answer)]), own)
                log_probs = mllm.logits(hidden[0, len(prompt) - 1 : -1]).log_softmax(dim=1)
                scores.append(log_probs[torch.arange(len(answer)), answer])
            policy, reference = scores[0], scores[1].detach()
            ratio = (policy - policy.detach()).exp()
            kl = (reference - policy).exp() - (reference - policy) - 1
            total = total - (ratio * advantage - 0.5 * kl).mean() / 6
    torch.autograd.backward(total)
    torch.testing.assert_close(found, total.detach(), rtol=1e-4, atol=1e-5)
    assert len(grads) == 28
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-4)


def test_reused_answers_are_clipped(llava):
    """The second visit trains on the first one's answers, with a ratio that isn't 1 any more."""
    method, drawn = make(llava, reuse=2, rollouts=4), []
    roll_ = method._roll
    method._roll = lambda *given: drawn.append(1) or roll_(*given)
    task = make_task(llava, "images", shots=1)
    report = fit_method(method, task, replace(method.default_training, epochs=4, batch_size=4, lr=1e-2))
    assert len(drawn) == 2
    assert report["equal_groups"][1] is None  # nothing new was drawn in the second epoch
    assert report["equal_groups"][2] is not None


def test_groups_rewarded_alike_are_drawn_again(llava):
    method = make(llava, resample=3)
    worth = iter([0.0] * 4 + [1.0] * 4 + [0.0, 1.0, 1.0, 1.0] + [5.0] * 100)
    method.rewards = lambda text, question: {"next": next(worth)}
    method.losses(query(llava, "images", 1), torch.tensor([0]))
    assert method._tally.means()["equal_groups"] == 0
    assert method._tally.means()["reward_next"] == 0.75
    method.rewards = lambda text, question: {"none": 0.0}  # a refusal is worth nothing, and teaches nothing
    loss, grads = gradients(method, query(llava, "images", 1), torch.tensor([0]))
    assert loss == pytest.approx(0, abs=1e-6)
    assert len(grads) == 28
    assert all(grad.abs().max() < 1e-5 for grad in grads.values())


def test_settings_that_cannot_be_used():
    wrong = {"rollouts": 1, "rollout_temperature": 0, "max_tokens": 0, "beta": -1, "reuse": 0, "eps": 1, "resample": -1}
    with pytest.raises(ConfigError) as found:
        LetterConfig(**wrong, micro_batch=-1, clip=-1)
    assert all(name in str(found.value) for name in (*wrong, "micro_batch", "clip"))


def test_an_answer_must_fit_behind_its_question(llava):
    method = make(llava, max_tokens=tiny.CONTEXT)
    with pytest.raises(BackboneError, match="longest answer"):
        method.losses(query(llava, "images", 1), torch.tensor([0]))
