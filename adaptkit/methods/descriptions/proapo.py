"""ProAPO: an evolutionary search for the set of templates, then of sentences per class, that fits the few shots best.

Nothing is trained: candidates are sets, scored on stored features of the few shots. Stage 1 looks for templates that
all classes share; stage 2, where there are descriptions, for sentences of the classes that are still confused.

Source: arXiv 2502.19844; proapo sheet; reference code MorningStarOvO/ProAPO.
Kept from the reference: similarity between classes is added to the fitness (its sign in the paper's words is the
other); images come in the plain view.
Differs from the reference: the winner is the best by fitness on the training images, ties going to the smaller set, and
seeds know nothing of each other (chosen by test accuracy there, over all runs); the last round's candidates count
(off by one there); weights of the fitness are the same for every dataset; there are no lists of synonyms; the scale of
logits is the backbone's (100, which is CLIP's). A confusion group is a class with those that stand among the best five
of at least 4 % of its images; groups that are too large keep their worst classes.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.errors import ConfigError, DataError
from adaptkit.methods import methods
from adaptkit.methods._imagenet_templates import IMAGENET_TEMPLATES
from adaptkit.methods.base import ClassWeightMethod, MethodConfig, progress_of, read_all, render_prompts
from adaptkit.methods.descriptions._evolution import Archive, Bits, Breeder, Operators, evolve
from adaptkit.methods.descriptions._sentences import CHUNK, sentence_features
from adaptkit.types import FitTask, TrainingLoop

BASELINE = "a photo of a {}."
ALIKE = 0.98
"""Sentences of a class whose features have a higher cosine count as one."""
START_DRAWS = 16
CONFUSED_SHARE = 0.04
_TYPE = re.compile(r"a type of ([\w -]+)")
_VALUES_AT_ONCE = 2**24


@dataclass(frozen=True)
class ProAPOConfig(MethodConfig):
    """Settings of ProAPO, whose fitness is top-1, top-5 and R, each with its weight, less the weighted CE."""

    top1_weight: float = field(default=0.1, metadata={"help": "Weight of the top-1 accuracy in percent."})
    top5_weight: float = field(default=0.1, metadata={"help": "Weight of the top-5 accuracy in percent."})
    similarity_weight: float = field(default=0.05, metadata={"help": "Weight of the similarity between classes."})
    ce_weight: float = field(default=10.0, metadata={"help": "Weight of the mean cross-entropy, which is taken off."})
    type_words: tuple[str, ...] = field(
        default=(),
        metadata={"help": "What the classes are (flower, pet), for more templates; none takes the templates' own."},
    )
    library_limit: int = field(default=0, metadata={"help": "Keep this many templates, the fittest; 0 for all."})
    rounds: int = field(default=8, metadata={"help": "Rounds of the search for templates."})
    weighted: bool = field(default=False, metadata={"help": "Draw templates by how fit they are alone."})
    use_descriptions: bool = field(
        default=True, metadata={"help": "Search sentences per class too, where descriptions are given."}
    )
    groups: int = field(default=4, metadata={"help": "Groups of classes whose sentences are searched."})
    outer_steps: int = field(default=3, metadata={"help": "Times that a group's search fixes what it agrees on."})
    inner_steps: int = field(default=4, metadata={"help": "Rounds between them."})

    def __post_init__(self) -> None:
        for name in ("top1_weight", "top5_weight", "similarity_weight", "ce_weight"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be a finite number.")
        for name in ("library_limit", "rounds", "groups", "outer_steps", "inner_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 0.")
        if any(not word.strip() or {"{", "}"} & set(word) for word in self.type_words):
            raise ConfigError("type_words holds an empty word or one with a brace: give plain words.")


def template_library(templates: Sequence[str], type_words: Sequence[str]) -> tuple[str, ...]:
    """ImageNet's templates, the baseline among them, and for each type word four variants; lower case, each once.

    Args:
        templates: The run's own, whose "a type of …" gives the word where `type_words` has none.
        type_words: What the classes are.

    Example:
        >>> [one for one in template_library((), ("pet",)) if "many" in one]
        ['a photo of many {}.', 'a photo of many {}, a type of pet.', 'pet: a photo of many {}.', 'a pet of many {}.', \
'a pet photo of many {}.']
    """
    words = type_words or [found.group(1).strip() for found in map(_TYPE.search, templates) if found]
    library = list(IMAGENET_TEMPLATES)
    for word in dict.fromkeys(words):
        library += [f"{template.rstrip('.')}, a type of {word}." for template in IMAGENET_TEMPLATES]
        library += [f"{word}: {template}" for template in IMAGENET_TEMPLATES]
        library += [template.replace("photo", word) for template in IMAGENET_TEMPLATES]
        library += [template.replace("photo", f"{word} photo") for template in IMAGENET_TEMPLATES]
    return tuple(dict.fromkeys(template.lower() for template in library))


@dataclass
class Fitness:
    """How well class weights fit labelled features; counts how often it was asked.

    Args:
        features: Unit features [n, dim].
        labels: int64 [n].
        scale: Of the logits.
        config: The weights of its terms.
    """

    features: Tensor
    labels: Tensor
    scale: float
    config: ProAPOConfig
    evaluations: int = 0

    def logits(self, weights: Tensor) -> Tensor:
        """[n, classes] of unit class weights [classes, dim]."""
        return self.scale * (self.features @ weights.T)

    def __call__(self, weights: Tensor) -> float:
        return self.measure(weights)[0]

    def measure(self, weights: Tensor) -> tuple[float, float]:
        """Fitness and top-1 accuracy (percent) of unit class weights [classes, dim]."""
        self.evaluations += 1
        count, config = len(self.labels), self.config
        first = five = loss = 0.0
        for rows in torch.split(torch.arange(count), max(1, _VALUES_AT_ONCE // len(weights))):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            logits, labels = self.scale * (self.features[part] @ weights.T), self.labels[part]
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [rows, 5]
            first += float(hits[:, 0].sum())
            five += float(hits.any(dim=1).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        fitness = (
            config.top1_weight * 100 * first / count
            + config.top5_weight * 100 * five / count
            + config.similarity_weight * similarity(weights)
            - config.ce_weight * loss / count
        )
        return fitness, 100 * first / count


def similarity(weights: Tensor) -> float:
    """R: Frobenius norm of the strict upper triangle of all cosines between unit class weights [classes, dim]."""
    small = weights.T @ weights if weights.shape[1] < len(weights) else weights @ weights.T
    everything = small.square().sum()  # both products have the same norm, the first is smaller for many classes
    diagonal = weights.square().sum(dim=1).square().sum()
    return float(((everything - diagonal) / 2).clamp(min=0).sqrt())


@dataclass(frozen=True)
class Sentences:
    """The sentences of some classes.

    Args:
        texts: All of them.
        owners: Class index of each.
        usable: Whether it is no near duplicate of an earlier one of its class.
        features: Unit features [sentences, dim].
    """

    texts: tuple[str, ...]
    owners: tuple[int, ...]
    usable: tuple[bool, ...]
    features: Tensor

    def sums(self, classes: int, chosen: Sequence[int]) -> Tensor:
        """Per class the sum of its chosen sentences' unit features, [classes, dim]."""
        places = torch.tensor(sorted(chosen), dtype=torch.long, device=self.features.device)
        owners = torch.tensor(self.owners, dtype=torch.long, device=self.features.device)
        sums = self.features.new_zeros(classes, self.features.shape[1])
        return sums.index_add(0, owners[places], self.features[places])


@methods.register("proapo")
class ProAPO(ClassWeightMethod):
    """Evolutionary search of templates and class sentences by their fit to the few shots; nothing is trained."""

    name = "proapo"
    config_class = ProAPOConfig
    config: ProAPOConfig
    reads_descriptions = "optional"
    writes_texts = True
    template_choice: Tensor
    sentence_choice: Tensor

    def build(self) -> None:
        self.library = template_library(self.templates, self.config.type_words)
        self.sentence_counts = [len(self.descriptions.get(name, ())) for name in self.fitted_names]
        choice = torch.zeros(len(self.library), dtype=torch.uint8)
        choice[self.library.index(BASELINE)] = 1  # before it is fitted
        self.register_buffer("template_choice", choice)
        self.register_buffer("sentence_choice", torch.zeros(sum(self.sentence_counts), dtype=torch.uint8))

    # --- what was chosen ----------------------------------------------------------------------------------------------

    @property
    def chosen_templates(self) -> tuple[str, ...]:
        """The templates that all classes share."""
        return tuple(self.library[place] for place in self.template_choice.nonzero()[:, 0].tolist())

    def chosen_sentences(self, name: str) -> tuple[str, ...]:
        """The sentences of a class beside its templates.

        A class that wasn't fitted takes all of its own, if it has some and the search found sentences of use at all.
        """
        sentences = self.descriptions.get(name, ())
        if self.other is None and name in self.fitted_names:
            place = self.fitted_names.index(name)
            start = sum(self.sentence_counts[:place])
            chosen = self.sentence_choice[start : start + len(sentences)].tolist()
            return tuple(sentence for sentence, used in zip(sentences, chosen, strict=True) if used)
        if not sentences or not bool(self.sentence_choice.any()):
            return ()
        listed = self._listed((name,))
        return tuple(text for text, usable in zip(listed.texts, listed.usable, strict=True) if usable)

    def class_weights(self) -> Tensor:
        names = self.class_names
        sums = torch.stack(list(self._template_features(self.chosen_templates, names))).sum(dim=0)  # [classes, dim]
        chosen = [self.chosen_sentences(name) for name in names]
        if any(chosen):
            features = F.normalize(sentence_features(self.backbone, [one for some in chosen for one in some]), dim=-1)
            owners = [place for place, some in enumerate(chosen) for _ in some]
            sums = sums.index_add(0, torch.tensor(owners, device=sums.device), features)
        return F.normalize(sums, dim=-1)

    def _template_features(self, templates: Sequence[str], names: Sequence[str]) -> list[Tensor]:
        """Unit features [classes, dim] of each template; prompts are in lower case."""
        found: list[Tensor] = []
        at_once = max(1, CHUNK // len(names))
        for start in range(0, len(templates), at_once):
            part = templates[start : start + at_once]
            prompts = [prompt.lower() for template in part for prompt in render_prompts(names, template)]
            features = F.normalize(sentence_features(self.backbone, prompts), dim=-1)
            found += features.unflatten(0, (len(part), len(names)))
        return found

    def _listed(self, names: Sequence[str]) -> Sentences:
        """All sentences of these classes, near duplicates marked."""
        texts = [sentence for name in names for sentence in self.descriptions.get(name, ())]
        owners = [place for place, name in enumerate(names) for _ in self.descriptions.get(name, ())]
        features = F.normalize(sentence_features(self.backbone, texts), dim=-1)
        kept: dict[int, list[int]] = {}
        for place, owner in enumerate(owners):
            earlier = kept.setdefault(owner, [])
            if not earlier or float((features[earlier] @ features[place]).max()) <= ALIKE:
                earlier.append(place)
        usable = {place for places in kept.values() for place in places}
        return Sentences(tuple(texts), tuple(owners), tuple(place in usable for place in range(len(texts))), features)

    # --- the search ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(self, task: FitTask, loop: TrainingLoop | None = None) -> dict[str, Any]:
        """Search on the training images alone; the report counts the fitness evaluations."""
        self.set_classes(self.fitted_names)
        if len(self.fitted_names) < 2:
            raise DataError(f"{self.name} needs at least two classes to tell apart: add another class.")
        device = self.backbone.device
        features = F.normalize(read_all(task.train).to(device), dim=-1)
        fitness = Fitness(features, task.train.labels.to(device), float(self.backbone.logit_scale), self.config)
        numbers = random.Random(task.seed)
        tell = progress_of(loop)
        with torch.autocast(device.type, enabled=False):
            sums, report = self._search_templates(
                fitness,
                numbers,
                lambda done: tell(f"{self.name}: templates, round {done + 1}", done, self.config.rounds),
            )
            self.sentence_choice.zero_()
            if self.config.use_descriptions and any(self.sentence_counts):
                search = SentenceSearch(self._listed(self.fitted_names), sums, fitness, numbers, self.config)
                chosen = search.run(lambda done, total: tell(f"{self.name}: sentences, group {done + 1}", done, total))
                self.sentence_choice[sorted(chosen)] = 1
                report |= search.report
        return report | {"fitness_evaluations": fitness.evaluations}

    def _search_templates(
        self, fitness: Fitness, numbers: random.Random, progress: Callable[[int], None]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Stage 1; the sum of the winners' unit features [classes, dim], and facts."""
        features = self._template_features(self.library, self.fitted_names)
        alone = [fitness.measure(one) for one in features]
        baseline, least = alone[self.library.index(BASELINE)]
        least -= 200 / len(self.fitted_names) + 0.1
        usable = [place for place, (_, top1) in enumerate(alone) if top1 >= least]
        if self.config.library_limit:
            usable = sorted(sorted(usable, key=lambda place: -alone[place][0])[: self.config.library_limit])

        def weights_of(chosen: Bits) -> Tensor:
            return F.normalize(torch.stack([features[place] for place in sorted(chosen)]).sum(dim=0), dim=-1)

        archive = Archive(lambda chosen: fitness(weights_of(chosen)))
        archive.add([frozenset((place,)) for place in numbers.sample(usable, min(4, len(usable)))])
        likely = {place: alone[place][0] - baseline + 1 for place in usable} if self.config.weighted else None
        breeder = Breeder(tuple(usable), Operators(), numbers, likely)
        history = [archive.best_score(), *evolve(archive, breeder, self.config.rounds, progress=progress)]
        winner = archive.best()[0]
        self.template_choice.zero_()
        self.template_choice[sorted(winner)] = 1
        return torch.stack([features[place] for place in sorted(winner)]).sum(dim=0), {
            "library": len(self.library),
            "library_dropped": len(self.library) - len(usable),
            "baseline_fitness": baseline,
            "fitness": archive.best_score(),
            "history": history,
            "chosen_templates": list(self.chosen_templates),
        }


class SentenceSearch:
    """Stage 2: which sentences the classes take beside the templates.

    Args:
        sentences: Of the fitted classes.
        template_sums: Sum of the templates' unit features, [classes, dim].
        fitness: On the training images.
        numbers: Where draws come from.
        config: Groups and steps.
    """

    def __init__(
        self,
        sentences: Sentences,
        template_sums: Tensor,
        fitness: Fitness,
        numbers: random.Random,
        config: ProAPOConfig,
    ) -> None:
        self.sentences, self.template_sums = sentences, template_sums
        self.fitness, self.numbers, self.config = fitness, numbers, config
        self.by_class: dict[int, list[int]] = {}
        for place, owner in enumerate(sentences.owners):
            if sentences.usable[place]:
                self.by_class.setdefault(owner, []).append(place)
        self.report: dict[str, Any] = {}

    def weights_of(self, chosen: Bits) -> Tensor:
        """Unit class weights [classes, dim] of the templates with these sentences."""
        sums = self.template_sums + self.sentences.sums(len(self.template_sums), list(chosen))
        return F.normalize(sums, dim=-1)

    def score(self, chosen: Bits) -> float:
        return self.fitness(self.weights_of(chosen))

    def run(self, progress: Callable[[int, int], None] = lambda done, total: None) -> Bits:
        """The best choice of sentences that was found."""
        starts = Archive(self.score)
        starts.add(self.starts())
        chosen = starts.best()[0]
        history = [starts.best_score()]
        groups = self.groups(chosen)
        for done, group in enumerate(groups):
            progress(done, len(groups))
            chosen, scores = self.improve(chosen, history[-1], group)
            history += scores
        self.report = {
            "sentences": len(self.sentences.texts),
            "near_duplicates": self.sentences.usable.count(False),
            "start_fitness": history[0],
            "sentence_history": history,
            "groups": [list(group) for group in groups],
            "chosen_sentences": len(chosen),
            "fitness": history[-1],
        }
        return chosen

    def starts(self) -> list[Bits]:
        """None, all, some drawn per class, and some drawn with one size for all classes."""
        everything = frozenset(place for places in self.by_class.values() for place in places)
        most = max(map(len, self.by_class.values()))

        def drawn(size: int | None) -> Bits:
            chosen: list[int] = []
            for places in self.by_class.values():
                count = self.numbers.randint(0, len(places)) if size is None else min(size, len(places))
                chosen += self.numbers.sample(places, count)
            return frozenset(chosen)

        return [
            frozenset(),
            everything,
            *(drawn(None) for _ in range(START_DRAWS)),
            *(drawn(self.numbers.randint(1, most)) for _ in range(START_DRAWS)),
        ]

    def improve(self, chosen: Bits, fitness: float, group: Sequence[int]) -> tuple[Bits, list[float]]:
        """Search a group's sentences, all others as they are; the best choice, and its fitness by round."""
        own = frozenset(place for owner in group for place in self.by_class.get(owner, ()))
        others, fixed, best = chosen - own, frozenset[int](), chosen & own
        history: list[float] = []
        for _ in range(self.config.outer_steps):
            kept = others | fixed
            archive = Archive(lambda bits, kept=kept: self.score(kept | bits), {best - fixed: fitness})  # type: ignore[misc]
            breeder = Breeder(tuple(sorted(own - fixed)), Operators(mutations=4), self.numbers)
            history += evolve(archive, breeder, self.config.inner_steps)
            top = archive.best(4)
            best, fitness = fixed | top[0], archive.best_score()
            fixed |= frozenset.intersection(*top)
        return others | best, history

    # --- which classes ------------------------------------------------------------------------------------------------

    def groups(self, chosen: Bits) -> list[tuple[int, ...]]:
        """Groups of classes to search together, the worst first: clusters of class weights, and classes confused."""
        weights = self.weights_of(chosen)
        count, labels = len(weights), self.fitness.labels
        logits = self.fitness.logits(weights)
        worst = _worst_first(logits, labels, count)
        rank = {owner: place for place, owner in enumerate(worst)}
        considered = [owner for owner in worst if owner in self.by_class][: max(1, int(10 * math.log(count)))]
        limit = max(1, int(2.5 * math.log(count)))
        found = [
            sorted(set(cluster) & set(considered), key=rank.__getitem__)[:limit] for cluster in self._clusters(weights)
        ]
        for owner, confused in _confusions(logits, labels, considered).items():
            found.append([owner, *(other for other in confused if other in self.by_class)][:limit])
        unique = dict.fromkeys(tuple(sorted(group)) for group in found if group)
        ranked = sorted(unique, key=lambda group: sum(rank[owner] for owner in group) / len(group))
        return ranked[: self.config.groups]

    def _clusters(self, weights: Tensor) -> list[list[int]]:
        """k-means clusters of class weights, with the k of the best silhouette; none for fewer than 25 classes."""
        sizes = range(5, int(0.2 * len(weights)) + 1, 2)
        if not sizes:
            return []
        from sklearn.cluster import KMeans
        from sklearn.metrics import silhouette_score

        rows, seed = weights.cpu().numpy(), self.numbers.randrange(2**31)
        labelled = [KMeans(size, n_init=4, random_state=seed).fit_predict(rows) for size in sizes]
        best = max(labelled, key=lambda labels: float(silhouette_score(rows, labels)))
        return [
            [place for place, label in enumerate(best) if label == cluster] for cluster in sorted(set(best.tolist()))
        ]


def _worst_first(logits: Tensor, labels: Tensor, classes: int) -> list[int]:
    """Classes by their accuracy, of equals those with the larger loss first; classes without an image come last."""
    right = (logits.argmax(dim=1) == labels).double()
    losses = F.cross_entropy(logits, labels, reduction="none").double()
    counts = torch.bincount(labels, minlength=classes).double()
    accuracy = torch.zeros(classes, dtype=torch.double, device=labels.device).index_add(0, labels, right) / counts
    loss = torch.zeros(classes, dtype=torch.double, device=labels.device).index_add(0, labels, losses) / counts
    return sorted(
        range(classes), key=lambda owner: (not counts[owner], float(accuracy[owner]), -float(loss[owner]), owner)
    )


def _confusions(logits: Tensor, labels: Tensor, owners: Sequence[int]) -> dict[int, list[int]]:
    """For each class those that stand among the best five of enough of its images, the most frequent first."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [n, 5]
    found: dict[int, list[int]] = {}
    for owner in owners:
        mine = best[labels == owner]
        others = mine[mine != owner]
        if not len(others):
            continue
        shares = torch.bincount(others, minlength=logits.shape[1]) / len(mine)
        order = shares.argsort(descending=True, stable=True).tolist()
        found[owner] = [other for other in order if float(shares[other]) >= CONFUSED_SHARE]
    return found
