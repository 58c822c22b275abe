"""N-way open-ended episodes: classes bound to names within one prompt, and how often the query's name is then found.

    from adaptkit.methods.episodes import EpisodeConfig, evaluate_episodes
    print(evaluate_episodes(method, pixels, labels, names, EpisodeConfig(ways=2), episodes=100, seed=1))

An episode tells the task in a sentence (task induction), shows some inner shots of each of N classes with their names,
real or nonsense, and asks for the name of a further image of one of them. Any method that asks a multimodal language
model is measured by it, fitted or not.

Source: Frozen arXiv 2106.13884; mllm sheet `frozen.md` (few-shot protocol).
Differs from the paper: the sentence opens the first turn, since chat templates begin with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.backbones.mllm.trie import Trie
from adaptkit.errors import ConfigError, DataError
from adaptkit.methods.base import at_least, refuse
from adaptkit.methods.mllm._asking import AskingMethod
from adaptkit.methods.mllm._matching import Matcher

QUESTION = "What is this?"
SENTENCE = "This is a {}."

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u")


@dataclass(frozen=True)
class EpisodeConfig:
    """How episodes are drawn and answered."""

    ways: int = field(default=2, metadata={"help": "Classes of an episode."})
    inner_shots: int = field(default=1, metadata={"help": "Images of each class that are shown with its name."})
    repeats: int = field(default=0, metadata={"help": "How often the shown images are shown once more."})
    induction: bool = field(default=True, metadata={"help": "Begin with a sentence that tells the task."})
    nonsense: bool = field(default=True, metadata={"help": "Bind classes to drawn nonsense words, not to their names."})
    scoring: Literal["likelihood", "open"] = field(
        default="likelihood", metadata={"help": "The likeliest of the N names, or a free answer that is matched."}
    )

    def __post_init__(self) -> None:
        refuse(self, *at_least(self, 2, "ways"), *at_least(self, 0, "inner_shots", "repeats"))


@dataclass(frozen=True)
class Episode:
    """One episode.

    Args:
        classes: Indices of its classes.
        words: What each is called in it.
        shown: (place among `classes`, image), in the order shown.
        query: The image asked about.
        answer: Its class's place among `classes`.
    """

    classes: tuple[int, ...]
    words: tuple[str, ...]
    shown: tuple[tuple[int, int], ...]
    query: int
    answer: int


def nonsense_words(count: int, numbers: torch.Generator, taken: Sequence[str] = ()) -> tuple[str, ...]:
    """Pronounceable words of two syllables, all different and none of `taken`."""
    found: dict[str, None] = {}
    known = {word.lower() for word in taken}
    while len(found) < count:
        draws = torch.randint(len(_ONSETS) * len(_VOWELS), (2,), generator=numbers).tolist()
        word = "".join(_ONSETS[draw // len(_VOWELS)] + _VOWELS[draw % len(_VOWELS)] for draw in draws)
        if word not in known:
            found[word] = None
    return tuple(found)


def draw_episode(names: Sequence[str], labels: Tensor, config: EpisodeConfig, numbers: torch.Generator) -> Episode:
    """Draw an episode; its classes are different ones, and its query isn't among the images shown.

    Args:
        names: All class names.
        labels: Class of each image, int64 [images].
        config: How.
        numbers: Where draws come from.

    Raises:
        DataError: Too few classes have enough images.
    """
    pools = {label: (labels == label).nonzero()[:, 0] for label in range(len(names))}
    usable = torch.tensor([label for label, pool in pools.items() if len(pool) > config.inner_shots])
    if len(usable) < config.ways:
        raise DataError(
            f"{config.ways}-way episodes need as many classes with {config.inner_shots + 1} images, and"
            f" {len(usable)} of {len(names)} have them: give more images, or ask for fewer ways or inner shots."
        )
    classes = usable[torch.randperm(len(usable), generator=numbers)[: config.ways]].tolist()
    answer = int(torch.randint(config.ways, (), generator=numbers))
    shown: list[tuple[int, int]] = []
    query = -1
    for place, label in enumerate(classes):
        pool = pools[label][torch.randperm(len(pools[label]), generator=numbers)].tolist()
        shown += [(place, image) for image in pool[: config.inner_shots]]
        query = pool[config.inner_shots] if place == answer else query
    order = torch.randperm(len(shown), generator=numbers).tolist()
    own = tuple(names[label].replace("_", " ") for label in classes)
    words = nonsense_words(config.ways, numbers, names) if config.nonsense else own
    return Episode(tuple(classes), words, tuple(shown[i] for i in order) * (1 + config.repeats), query, answer)


def conversation(episode: Episode, config: EpisodeConfig) -> list[Turn]:
    """The episode's prompt: every shown image with its name, and the query without."""
    task = f"Answer with {' or '.join(episode.words)}. {QUESTION}" if config.induction else QUESTION
    turns = [Turn(QUESTION, 1, SENTENCE.format(episode.words[place])) for place, _ in episode.shown]
    turns.append(Turn(QUESTION))
    return [Turn(task, turns[0].images, turns[0].answer), *turns[1:]]


@torch.no_grad()
def answer_episode(method: AskingMethod, pixels: Tensor, episode: Episode, config: EpisodeConfig) -> int | None:
    """The place among the episode's classes that a method answers; None for a free answer that names none.

    Args:
        method: Any that asks a multimodal model.
        pixels: All images, [images, 3, size, size].
        episode: From `draw_episode`.
        config: How.
    """
    images = torch.tensor([*(image for _, image in episode.shown), episode.query])
    turns, mllm = conversation(episode, config), method.mllm
    prefix = method.prefix(method.features(pixels[images]), [turns])
    if config.scoring == "open":
        text = mllm.prompter.text(mllm.generate(prefix)[0])
        return Matcher(episode.words, {}).match(text).index
    sentences = [SENTENCE.format(word) for word in episode.words]
    trie = Trie.build(mllm.prompter.answers([Turn(QUESTION)], sentences))
    return int(mllm.candidate_scores(prefix, trie)[0].argmax())


def evaluate_episodes(
    method: AskingMethod,
    pixels: Tensor,
    labels: Tensor,
    names: Sequence[str],
    config: EpisodeConfig,
    episodes: int,
    seed: int,
) -> dict[str, Any]:
    """Answer many episodes; counts of right and unmatched answers, the share right and that of chance.

    Args:
        method: Any that asks a multimodal model.
        pixels: Images [images, 3, size, size].
        labels: Their classes, int64 [images].
        names: All class names.
        config: How.
        episodes: How many, at least 1.
        seed: Seeds the draws.

    Raises:
        ConfigError: No episode was asked for.
    """
    if episodes < 1:
        raise ConfigError(f"episodes is {episodes}, but at least 1 is needed.")
    numbers = torch.Generator().manual_seed(seed)
    drawn = [draw_episode(names, labels, config, numbers) for _ in range(episodes)]
    answers = [answer_episode(method, pixels, episode, config) for episode in drawn]
    right = sum(answer == episode.answer for answer, episode in zip(answers, drawn, strict=True))
    return {
        "episodes": episodes,
        "correct": right,
        "unmatched": sum(answer is None for answer in answers),
        "accuracy": right / episodes,
        "chance": 1 / config.ways,
    }
