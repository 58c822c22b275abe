"""Episodes: how they are drawn and told, answers by likelihood and freely, and what can't be."""

from __future__ import annotations

import pytest
import torch

from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.errors import ConfigError, DataError
from adaptkit.methods.episodes import (
    EpisodeConfig,
    answer_episode,
    conversation,
    draw_episode,
    evaluate_episodes,
    nonsense_words,
)
from adaptkit.methods.mllm.frozen import Frozen, FrozenConfig
from tests.backbones import tiny_mllm as tiny
from tests.methods.tiny import NAMES, drawn_images


@pytest.fixture(scope="module")
def llava():
    return tiny.load("llava")


def make(backbone):
    return Frozen(backbone, NAMES, config=FrozenConfig())


LABELS = torch.arange(12) % 4


def test_episodes_are_drawn_without_overlap():
    config = EpisodeConfig(ways=3, inner_shots=2, repeats=1)
    numbers, seen = torch.Generator().manual_seed(0), set()
    for _ in range(50):
        episode = draw_episode(NAMES, LABELS, config, numbers)
        assert len(set(episode.classes)) == len(set(episode.words)) == 3
        assert not set(episode.words) & {name.replace("_", " ") for name in NAMES}
        images = [image for _, image in episode.shown]
        assert len(images) == 2 * 3 * 2
        assert len(set(images)) == 6
        assert episode.query not in images
        assert LABELS[episode.query] == episode.classes[episode.answer]
        assert all(LABELS[image] == episode.classes[place] for place, image in episode.shown)
        seen.add(episode.answer)
    assert seen == {0, 1, 2}


def test_an_episodes_conversation():
    config = EpisodeConfig(nonsense=False)
    episode = draw_episode(NAMES, LABELS, config, torch.Generator().manual_seed(1))
    turns = conversation(episode, config)
    assert len(turns) == 3
    assert turns[0].text.startswith(f"Answer with {episode.words[0]} or {episode.words[1]}.")
    assert [turn.answer for turn in turns[:-1]] == [f"This is a {episode.words[place]}." for place, _ in episode.shown]
    assert turns[-1].answer is None
    bare = conversation(episode, EpisodeConfig(induction=False))
    assert bare[0].text == turns[-1].text
    none = draw_episode(NAMES, LABELS, EpisodeConfig(inner_shots=0), torch.Generator().manual_seed(1))
    assert len(conversation(none, EpisodeConfig(inner_shots=0))) == 1


def test_nonsense_words_are_new():
    words = nonsense_words(500, torch.Generator().manual_seed(0), ("baba",))
    assert len(set(words)) == 500
    assert "baba" not in words
    assert all(word.isalpha() for word in words)


@pytest.mark.parametrize("scoring", ["likelihood", "open"])
def test_episodes_are_answered(llava, scoring):
    method, pixels = make(llava), drawn_images(LABELS, 1, 5, tiny.SIDE)[0]
    config = EpisodeConfig(scoring=scoring)
    found = evaluate_episodes(method, pixels, LABELS, NAMES, config, 4, seed=3)
    assert found["episodes"] == 4
    assert found["correct"] + found["unmatched"] <= 4
    assert found["accuracy"] == found["correct"] / 4
    assert found["chance"] == 0.5
    assert found == evaluate_episodes(method, pixels, LABELS, NAMES, config, 4, seed=3)


def test_the_likeliest_word_answers(llava):
    method, pixels = make(llava), drawn_images(LABELS, 1, 5, tiny.SIDE)[0]
    config = EpisodeConfig()
    episode = draw_episode(NAMES, LABELS, config, torch.Generator().manual_seed(2))
    features = method.features(pixels[torch.tensor([*(i for _, i in episode.shown), episode.query])])
    (row,) = method.prompt_rows(features, [conversation(episode, config)])
    scores = []
    for answer in llava.prompter.answers([Turn(method.question)], [f"This is a {word}." for word in episode.words]):
        with torch.no_grad():
            hidden = method.mllm.hidden(method.mllm.batch([row + answer], features), features)
            log_probs = method.mllm.logits(hidden)[0].log_softmax(dim=-1)
        scores.append(sum(float(log_probs[len(row) + k - 1, token]) for k, token in enumerate(answer)))
    assert answer_episode(method, pixels, episode, config) == scores.index(max(scores))


@pytest.mark.parametrize(("settings", "says"), [({"ways": 1}, "ways is 1"), ({"inner_shots": -1}, "inner_shots is -1")])
def test_episodes_that_cannot_be(settings, says):
    with pytest.raises(ConfigError, match=says):
        EpisodeConfig(**settings)


def test_too_few_images_for_episodes(llava):
    with pytest.raises(DataError, match="5-way episodes need"):
        draw_episode(NAMES, LABELS, EpisodeConfig(ways=5), torch.Generator())
    with pytest.raises(DataError, match="0 of 4 have them"):
        draw_episode(NAMES, LABELS, EpisodeConfig(inner_shots=3), torch.Generator())
    with pytest.raises(ConfigError, match="episodes is 0"):
        evaluate_episodes(make(llava), torch.zeros(1, 3, 28, 28), LABELS[:1], NAMES, EpisodeConfig(), 0, 0)
