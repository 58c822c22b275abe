"""ProAPO's fitness and weights against plain ones, its operators, its archive, and what it chooses."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.errors import ConfigError, DataError
from adaptkit.methods._imagenet_templates import IMAGENET_TEMPLATES
from adaptkit.methods.adapter import AdaptedModel, load_adapter, save_adapter
from adaptkit.methods.descriptions import proapo
from adaptkit.methods.descriptions._evolution import EXTRA_TRIES, Archive, Breeder, Operators, evolve
from adaptkit.methods.descriptions.proapo import Fitness, ProAPO, ProAPOConfig, similarity, template_library
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs
from tests.methods.tiny import DESCRIPTIONS, DIM, NAMES, NOVEL, make_task, query, tiny_clip

BACKBONE = tiny_clip()
QUICK = {"rounds": 3, "groups": 2, "outer_steps": 2, "inner_steps": 2}


def make(names=NAMES, descriptions=DESCRIPTIONS, templates=("a photo of a {}.",), **config):
    return ProAPO(
        BACKBONE, names, templates=templates, config=ProAPOConfig(**{**QUICK, **config}), descriptions=descriptions
    )


def fitted(seed=0, shots=4, **given):
    method = make(**given)
    return method, fit_method(method, make_task(BACKBONE, "image_features", shots=shots, seed=seed))


def unit(*shape, seed=0):
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# --- the fitness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "dim"), [(7, 16), (30, 8), (3, 16)])
def test_the_fitness_is_the_sheets(classes, dim, monkeypatch):
    monkeypatch.setattr(proapo, "_VALUES_AT_ONCE", 3 * classes)  # several chunks
    weights, features = unit(classes, dim), unit(20, dim, seed=1)
    labels = torch.arange(20) % classes
    config = ProAPOConfig(top1_weight=0.3, top5_weight=0.07, similarity_weight=0.4, ce_weight=2.5)
    fitness = Fitness(features, labels, 30.0, config)
    first = five = loss = 0.0
    for feature, label in zip(features, labels.tolist(), strict=True):
        logits = 30 * weights @ feature
        order = logits.argsort(descending=True).tolist()
        first += order[0] == label
        five += label in order[:5]
        loss -= float(logits[label] - logits.logsumexp(0))
    r = sum(float(weights[i] @ weights[j]) ** 2 for i in range(classes) for j in range(i + 1, classes)) ** 0.5
    wanted = 0.3 * 100 * first / 20 + 0.07 * 100 * five / 20 + 0.4 * r - 2.5 * loss / 20
    got, top1 = fitness.measure(weights)
    assert got == pytest.approx(wanted, rel=1e-5)
    assert top1 == pytest.approx(100 * first / 20)
    assert similarity(weights) == pytest.approx(r, rel=1e-5)
    assert fitness.evaluations == 1


def test_without_its_other_terms_it_is_the_cross_entropy():
    weights, features, labels = unit(6, 8), unit(12, 8, seed=2), torch.arange(12) % 6
    config = ProAPOConfig(top1_weight=0, top5_weight=0, similarity_weight=0, ce_weight=1)
    got = Fitness(features, labels, 10.0, config)(weights)
    assert got == pytest.approx(-float(F.cross_entropy(10 * features @ weights.T, labels)), rel=1e-5)


# --- the operators ----------------------------------------------------------------------------------------------------


def breeder(size=10, seed=0, **operators):
    return Breeder(tuple(range(size)), Operators(**operators), random.Random(seed))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**16), st.integers(0, 5))
def test_children_are_new_sets_one_step_away(size, seed, step):
    one = breeder(size, seed)
    archive = Archive(lambda bits: float(sum(bits)))
    parents = list({frozenset(one.numbers.sample(range(size), one.numbers.randint(1, size))) for _ in range(4)})
    archive.add(parents)
    for parent in parents:
        more, less, other = one.added(parent), one.removed(parent), one.replaced(parent)
        assert (more is None) == (len(parent) == size)
        assert more is None or (more > parent and len(more) == len(parent) + 1)
        assert (less is None) == (len(parent) <= 2)
        assert less is None or (less < parent and len(less) == len(parent) - 1)
        assert (other is None) == (len(parent) == size)
        assert other is None or (len(other) == len(parent) and len(other - parent) == 1)
    crossed = one.crossed(parents)
    common, every = frozenset.intersection(*parents), frozenset.union(*parents)
    assert (crossed is None) == (len(every - common) < 2)
    assert crossed is None or common < crossed <= every
    assert len(one.drawn(2 + step)) == min(2 + step, size)
    children = one.children(archive, parents, 2 + step)
    assert len(set(children)) == len(children)
    assert not set(children) & set(parents)
    assert all(child and child <= set(range(size)) for child in children)


def test_a_round_makes_as_many_as_the_sheet_says():
    archive = Archive(lambda bits: float(len(bits)))
    parents = [frozenset(range(5 * k, 5 * k + 5)) for k in range(4)]
    archive.add(parents)
    assert len(breeder(80, removals=5).children(archive, parents, 9)) == 4 * (8 + 5 + 8) + 8 + 16


def test_an_operator_gives_up():
    """Of a pair of members there are three sets, all known: no operator finds another, and none goes on for ever."""
    drawn = []

    class Counting(random.Random):
        def sample(self, *given, **also):
            drawn.append(given)
            return super().sample(*given, **also)

    archive = Archive(lambda bits: 0.0)
    archive.add([frozenset({0}), frozenset({1}), frozenset({0, 1})])
    one = Breeder((0, 1), Operators(), Counting(0))
    assert one.children(archive, archive.best(4), 2) == []
    assert len(drawn) == 8 + EXTRA_TRIES


def test_weights_steer_additions_and_removals():
    heavy = Breeder((0, 1, 2, 3), Operators(), random.Random(0), {0: 1.0, 1: 1.0, 2: 1e6, 3: -5.0})
    assert {heavy.added(frozenset({0})) for _ in range(50)} == {frozenset({0, 2})}
    assert {heavy.removed(frozenset({0, 2, 3})) for _ in range(20)} == {frozenset({0, 2})}


def test_crossover_prefers_what_more_parents_hold():
    parents = [frozenset({9, 0}), frozenset({9, 0}), frozenset({9, 0, 1}), frozenset({9, 2})]
    one, held = breeder(seed=3), {0: 0, 1: 0, 2: 0}
    for _ in range(600):
        child = one.crossed(parents)
        assert 9 in child
        for member in held:
            held[member] += member in child
    assert held[0] > 1.2 * max(held[1], held[2])


# --- the archive ------------------------------------------------------------------------------------------------------


def test_the_archive_never_asks_twice_and_its_best_never_falls():
    asked = []

    def score(bits):
        asked.append(bits)
        return -abs(sum(bits) - 23)

    archive = Archive(score)
    archive.add([frozenset({k}) for k in range(4)])
    history = evolve(archive, breeder(30), 8)
    assert len(history) == 8
    assert history == sorted(history)
    assert len(set(asked)) == len(asked) == len(archive.scores) > 200
    assert history[-1] == archive.best_score() == 0


def test_ties_go_to_the_smaller_set_then_to_the_earlier():
    archive = Archive(lambda bits: 1.0)
    archive.add([frozenset({1, 2}), frozenset({5}), frozenset({3})])
    assert archive.best(2) == [frozenset({5}), frozenset({3})]


def test_the_last_rounds_sets_count():
    """Only sets of nine score, and only the eighth round draws them: the reference would miss them."""
    archive = Archive(lambda bits: float(len(bits) == 9))
    archive.add([frozenset({0})])
    nothing = Operators(additions=0, removals=0, replacements=0, mutations=8, crossovers=0)
    history = evolve(archive, Breeder(tuple(range(40)), nothing, random.Random(0)), 8)
    assert history == [0.0] * 7 + [1.0]
    assert len(archive.best()[0]) == 9


# --- the library ------------------------------------------------------------------------------------------------------


def test_the_library():
    assert len(IMAGENET_TEMPLATES) == len(set(IMAGENET_TEMPLATES)) == 80
    plain = template_library(("a photo of a {}.",), ())
    assert plain == IMAGENET_TEMPLATES
    pets = template_library(("a photo of a {}, a type of pet.",), ())
    assert pets == template_library((), ("pet",))
    assert {"a photo of a {}, a type of pet.", "pet: a photo of a {}.", "a pet of a {}.", "a pet photo of a {}."} < set(
        pets
    )
    assert all(one == one.lower() and one.count("{}") == 1 for one in pets)
    assert len(set(pets)) == len(pets) > 300


def test_templates_far_below_the_baseline_are_dropped_and_the_rest_capped():
    _, report = fitted(library_limit=20, use_descriptions=False)
    assert report["library"] == 80
    assert report["library_dropped"] >= 60
    method, _ = fitted(descriptions={}, library_limit=1)
    assert len(method.chosen_templates) == 1


# --- the whole --------------------------------------------------------------------------------------------------------


def plain_weights(method, names):
    rows = []
    for name in names:
        prompts = [t.format(name.replace("_", " ")).lower() for t in method.chosen_templates]
        prompts += method.chosen_sentences(name)
        features = BACKBONE.encode_text(BACKBONE.tokenize(prompts))
        rows.append(F.normalize(F.normalize(features, dim=-1).mean(dim=0), dim=-1))
    return torch.stack(rows)


def test_weights_are_the_mean_of_unit_prompts_and_the_fitness_is_theirs():
    method, report = fitted()
    weights = plain_weights(method, NAMES)
    with torch.no_grad():
        torch.testing.assert_close(method.class_weights(), weights, rtol=1e-5, atol=1e-5)
    task = make_task(BACKBONE, "image_features")
    fitness = Fitness(F.normalize(task.train.values[0], dim=-1), task.train.labels, 20.0, method.config)
    assert fitness(weights) == pytest.approx(report["fitness"], rel=1e-4)
    assert report["fitness"] >= report["start_fitness"] >= report["history"][-1] >= report["history"][0]


def test_histories_never_fall_and_evaluations_are_counted(monkeypatch):
    asked = []
    measure = Fitness.measure
    monkeypatch.setattr(Fitness, "measure", lambda self, weights: asked.append(1) or measure(self, weights))
    _, report = fitted()
    assert report["fitness_evaluations"] == len(asked) > 80 + 4 + 34
    for name in ("history", "sentence_history"):
        assert report[name] == sorted(report[name]), name
    assert len(report["history"]) == 1 + QUICK["rounds"]
    groups = len(report["groups"])
    assert 1 <= groups <= 2
    assert len(report["sentence_history"]) == 1 + groups * QUICK["outer_steps"] * QUICK["inner_steps"]


def test_a_seed_gives_the_same_history():
    (first, one), (second, two), (_, other) = fitted(seed=3), fitted(seed=3), fitted(seed=4)
    assert one == two
    assert one["history"] != other["history"] or one["chosen_templates"] != other["chosen_templates"]
    assert torch.equal(first.template_choice, second.template_choice)


def test_validation_and_test_images_have_no_part():
    task = make_task(BACKBONE, "image_features")
    first, second = make(), make()
    fit_method(first, task)
    fit_method(second, FitTask(task.class_names, task.train, None, task.seed))
    assert torch.equal(first.template_choice, second.template_choice)
    assert torch.equal(first.sentence_choice, second.sentence_choice)


def test_without_descriptions_templates_alone_are_searched():
    _, report = fitted(descriptions={})
    assert "sentence_history" not in report
    assert report["fitness"] == report["history"][-1]
    plain = ProAPO(BACKBONE, NAMES)
    with torch.no_grad():  # before a fit it is the baseline
        zero = plain_weights(plain, NAMES)
        torch.testing.assert_close(plain.class_weights(), zero, rtol=1e-5, atol=1e-5)
    assert plain.chosen_templates == ("a photo of a {}.",)


def test_near_duplicates_are_one(monkeypatch):
    monkeypatch.setattr(proapo, "ALIKE", 0.9999)  # a random tower finds all sentences rather alike
    twice = {name: (*DESCRIPTIONS[name], DESCRIPTIONS[name][0], "quite another thing") for name in NAMES}
    method, report = fitted(descriptions=twice)
    assert report["near_duplicates"] == len(NAMES)
    assert all(len(set(method.chosen_sentences(name))) == len(method.chosen_sentences(name)) for name in NAMES)


def test_weighted_draws_run():
    method, report = fitted(weighted=True)
    assert report["chosen_templates"] == list(method.chosen_templates)


def test_groups_of_many_classes(monkeypatch):
    """Thirty classes, two of which are confused with one another: clusters by k-means, and the pair comes first."""
    names = tuple(f"kind {index}" for index in range(30))
    said = {name: (f"{name} has a mark", f"{name} is round") for name in names}
    method = make(names, said, groups=4)
    weights = unit(30, DIM, seed=8)
    features = weights.clone()
    features[[4, 5]] = features[[5, 4]]
    fitness = Fitness(features, torch.arange(30), 20.0, method.config)
    search = proapo.SentenceSearch(method._listed(names), weights, fitness, random.Random(0), method.config)
    monkeypatch.setattr(search, "weights_of", lambda chosen: weights)
    groups = search.groups(frozenset())
    assert 1 <= len(groups) <= 4
    assert len(groups) == len(set(groups))
    assert all(1 <= len(group) <= int(2.5 * 3.4012) for group in groups)
    assert any({4, 5} <= set(group) for group in groups)
    assert len(search._clusters(weights)) in (5,)


# --- classes, files and refusals --------------------------------------------------------------------------------------


def test_novel_classes_take_templates_and_sentences_they_have(tmp_path):
    method, _ = fitted()
    method.sentence_choice.fill_(1)
    with torch.no_grad():
        method.set_classes(NOVEL)
        assert method.chosen_sentences(NOVEL[0]) == DESCRIPTIONS[NOVEL[0]]
        torch.testing.assert_close(method.class_weights(), plain_weights(method, NOVEL), rtol=1e-5, atol=1e-5)
        method.set_classes(("a stranger",))
        assert method.chosen_sentences("a stranger") == ()
        torch.testing.assert_close(method.class_weights(), plain_weights(method, ("a stranger",)), rtol=1e-5, atol=1e-5)
        method.sentence_choice.zero_()  # no sentence was of use to the fitted classes
        assert method.chosen_sentences(NOVEL[0]) == ()
        method.set_classes(NAMES)
        method.sentence_choice[2] = 1
        save_adapter(tmp_path / "adapter", AdaptedModel(method))
        loaded = load_adapter(tmp_path / "adapter", BACKBONE)
        assert loaded.method.chosen_templates == method.chosen_templates
        assert torch.equal(loaded.method(query(BACKBONE, "image_features")), method(query(BACKBONE, "image_features")))


def test_what_it_refuses():
    task = make_task(BACKBONE, "image_features")
    one = FitTask(("a",), TensorInputs(task.train.values[:, :4], task.train.labels[:4]))
    with pytest.raises(DataError, match="at least two classes"):
        fit_method(ProAPO(BACKBONE, ("a",)), one)
    broken = task.train.values.clone()
    broken[0, 3, 2] = float("nan")
    with pytest.raises(DataError, match="Training image 3"):
        fit_method(make(), FitTask(NAMES, TensorInputs(broken, task.train.labels)))
    for config, said in (
        ({"ce_weight": float("inf")}, "finite"),
        ({"rounds": -1}, "at least 0"),
        ({"type_words": ("{}",)}, "brace"),
    ):
        with pytest.raises(ConfigError, match=said):
            ProAPOConfig(**config)
