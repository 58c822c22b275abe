"""TransCLIP: a dense plain version beside it, the sheet's checks, and what is chosen on validation images only."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import AdaptKitWarning, ConfigError, DataError, UnknownNameError, UnsupportedError
from adaptkit.methods import methods
from adaptkit.methods.base import GradientMethod
from adaptkit.methods.transductive import _transduction
from adaptkit.methods.transductive._transduction import Support
from adaptkit.methods.transductive.transclip import Graph, TransCLIP, TransCLIPConfig, nearest
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs
from tests.methods.drawn_batch import drawn
from tests.methods.tiny import DIM, NAMES, NOVEL, make_task, query, tiny_clip

BACKBONE = tiny_clip()
CLASSES, IMAGES = 5, 40


def method(**settings) -> TransCLIP:
    return TransCLIP(BACKBONE, NAMES, config=TransCLIPConfig(**{"temperature": 10.0, **settings}))


def solver(f, text, support=None, **settings):
    return method(**settings).solver(f, text, support)


# --- against the plain version ----------------------------------------------------------------------------------------


def plain_transclip(f, text, config, support, gamma):
    """The sheet's updates with dense matrices, in float64."""
    f, text = f.double(), text.double()
    images, classes = len(f), len(text)
    y = torch.softmax(config.temperature * f @ text.T, dim=-1)
    z, weight = y, config.text_weight if support is None else config.text_weight_support

    def dense(rows, own):
        similar = rows @ f.T
        if own:
            similar.fill_diagonal_(-2)
        top = similar.topk(config.neighbours, dim=1)
        return torch.zeros_like(similar).scatter_(1, top.indices, top.values)

    w = dense(f, True)
    centres = []
    for k in range(classes):
        top = z[:, k].topk(config.confident).indices
        centres.append(F.normalize((z[top, k, None] * f[top]).mean(dim=0), dim=0))
    mu, pull = torch.stack(centres), 0
    if support is not None:
        shots, one_hot = support.features.double(), F.one_hot(support.labels, classes).double()
        mu = F.normalize(one_hot.T @ shots, dim=-1)
        pull = dense(shots, False).T @ one_hot
    variance = torch.full((f.shape[1],), 1 / f.shape[1], dtype=torch.float64)
    for step in range(config.iterations + 1):
        likely = -0.5 * ((f[:, None] - mu) ** 2 / variance).sum(dim=-1)
        for _ in range(config.inner_iterations):
            z = y**weight * torch.exp((likely + 50 / 6 * (w.T @ z + w @ z + pull)) / 50)
            z = z / z.sum(dim=1, keepdim=True)
        if step == config.iterations:
            return z, mu, variance
        rows, weights = f, z / images
        if support is not None:
            rows = torch.cat([f, shots])
            weights = torch.cat([weights, 50 * gamma / len(shots) * one_hot])
        mu = F.normalize((weights.T @ rows) / weights.sum(dim=0)[:, None], dim=-1)
        deviation = (weights[..., None] * (rows[:, None] - mu) ** 2).sum(dim=(0, 1))
        variance = deviation / weights.sum()
    raise AssertionError


@pytest.mark.parametrize("use_support", [False, True])
@pytest.mark.parametrize("iterations", [0, 1, 6])
def test_it_equals_the_plain_version(use_support, iterations):
    f, text, _, support = drawn(CLASSES)
    labelled = support if use_support else None
    clip = method(iterations=iterations)
    state = clip.solver(f, text, labelled).run(0.02)
    z, mu, variance = plain_transclip(f, text, clip.config, labelled, 0.02)
    torch.testing.assert_close(state.z.double(), z, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state.mu, mu, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.variance, variance, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(state.log_z.exp(), state.z)


@pytest.mark.parametrize("use_support", [False, True])
def test_chunks_change_nothing(monkeypatch, use_support):
    f, text, _, support = drawn(CLASSES)
    labelled = support if use_support else None
    whole = method().assign(f, text, labelled)
    monkeypatch.setattr(_transduction, "_CHUNK_BYTES", 8 * 7 * (CLASSES + DIM))
    clip = method()
    assert len(clip.chunks(f, CLASSES + DIM)) == 6
    torch.testing.assert_close(clip.assign(f, text, labelled), whole, rtol=1e-4, atol=1e-4)


# --- the graph --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_neighbours_in_chunks(rows):
    f = drawn(CLASSES)[0]
    graph = nearest(torch.split(f, rows), f, 3, themselves=True)
    similar = (f @ f.T).fill_diagonal_(-2)
    wanted = similar.topk(3, dim=1)
    assert torch.equal(graph.index, wanted.indices)
    torch.testing.assert_close(graph.weight, wanted.values)


def test_equal_images_are_neighbours_of_each_other_not_of_themselves():
    f = drawn(CLASSES)[0][[0, 0, 0, 1, 2]]
    graph = nearest([f], f, 2, themselves=True)
    assert [sorted(row) for row in graph.index[:3].tolist()] == [[1, 2], [0, 2], [0, 1]]


def test_shots_lose_their_nearest_image_only_under_parity():
    f, text, _, support = drawn(CLASSES)
    order = (support.features @ f.T).argsort(dim=1, descending=True)
    assert torch.equal(solver(f, text, support).from_support.index, order[:, :3])
    for parity in ("aligned", "published"):
        assert torch.equal(solver(f, text, support, parity=parity).from_support.index, order[:, 1:4])


def test_sums_over_neighbours():
    graph = Graph(torch.tensor([[1, 2], [0, 2], [1, 0]]), torch.tensor([[0.5, 0.25], [1.0, 0.5], [2.0, 0.1]]))
    dense = torch.zeros(3, 3).scatter_(1, graph.index, graph.weight)
    z = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(graph.outgoing(z), dense @ z)
    torch.testing.assert_close(graph.incoming(z, 3), dense.T @ z)


# --- the sheet's checks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_support", [False, True])
def test_without_neighbours_and_with_all_weight_on_text_it_is_zero_shot(use_support):
    f, text, _, support = drawn(CLASSES)
    weights = {"text_weight": 1e6, "text_weight_support": 1e6}
    clip = method(neighbours=0, **weights)
    found = clip.solver(f, text, support if use_support else None).run(0.02)
    hard = F.one_hot((f @ text.T).argmax(dim=1), CLASSES).float()
    torch.testing.assert_close(found.z, hard, rtol=0, atol=1e-3)


def test_without_neighbours_and_likelihood_it_is_the_text_prediction():
    f, text, _, _ = drawn(CLASSES)
    made = solver(f, text, neighbours=0, iterations=0)
    made.likelihood = lambda state: torch.zeros(IMAGES, CLASSES)
    state = made.start()
    made.assign(state)
    torch.testing.assert_close(state.z, torch.softmax(10 * f @ text.T, dim=-1))


@pytest.mark.parametrize("use_support", [False, True])
def test_rows_sum_to_one_and_centres_are_unit(use_support):
    f, text, _, support = drawn(CLASSES)
    state = solver(f, text, support if use_support else None).run(0.02)
    torch.testing.assert_close(state.z.sum(dim=1), torch.ones(IMAGES))
    torch.testing.assert_close(state.mu.norm(dim=1), torch.ones(CLASSES, dtype=torch.float64))
    assert (state.variance > 0).all()


@pytest.mark.parametrize("use_support", [False, True])
def test_another_order_of_the_classes_and_images(use_support):
    f, text, _, support = drawn(CLASSES)
    numbers = torch.Generator().manual_seed(3)
    order, images = torch.randperm(CLASSES, generator=numbers), torch.randperm(IMAGES, generator=numbers)
    moved = Support(support.features, order.argsort()[support.labels])
    first = method().assign(f, text, support if use_support else None)
    second = method().assign(f[images], text[order], moved if use_support else None)
    torch.testing.assert_close(second, first[images][:, order], rtol=1e-3, atol=1e-3)


def objective(made, state, gamma):
    """What the block updates lower: with the log-determinant that the assignments don't see."""
    labels = 0
    weight = z = state.z.double()
    total = -(z * made.text_weight * made.log_text.double()).sum() - torch.special.entr(z).sum()
    graph = made.graph
    total = total - (z * graph.outgoing(state.z).double()).sum() / 6
    spread = 0.5 * (weight.sum() * state.variance.log().sum())
    likely = (z * made.likelihood(state).double()).sum()
    if made.support is not None:
        one_hot = made.support.one_hot(CLASSES)
        labels = made.from_support.incoming(one_hot.float(), made.images).double()
        total = total - (z * labels).sum() / 6
        shots = made.support.features.double()
        share = 50 * gamma / len(shots) * made.images
        errors = ((shots - one_hot @ state.mu).square() / state.variance).sum()
        likely = likely - 0.5 * share * errors
        spread = spread + 0.5 * share * len(shots) * state.variance.log().sum()
    return float(total + (spread - likely) / 50)


@pytest.mark.parametrize("use_support", [False, True])
def test_the_objective_falls(use_support):
    """By each update of assignments and of the variance, and over every round. (The centres' update is that of equal
    variances, a step that needn't lower it by itself.)"""
    f, text, _, support = drawn(CLASSES, spread=0.4)
    made, gamma = solver(f, text, support if use_support else None), 0.02
    state = made.start()
    rounds = []
    for _ in range(10):
        for block in (made.assign, lambda s: made.recentre(s, gamma), lambda s: made.respread(s, gamma)):
            before = objective(made, state, gamma)
            block(state)
            after = objective(made, state, gamma)
            if getattr(block, "__name__", "") != "<lambda>" or block.__code__.co_names[0] == "respread":
                assert after <= before + 1e-3
        rounds.append(objective(made, state, gamma))
    assert all(late <= early + 1e-3 for early, late in itertools.pairwise(rounds))
    assert rounds[-1] < rounds[0]


def test_a_class_of_no_weight_keeps_its_centre():
    f, text, _, _ = drawn(CLASSES)
    made = solver(f, text)
    state = made.start()
    before = state.mu.clone()
    state.z[:, 2] = 0
    made.recentre(state, 0.0)
    assert torch.equal(state.mu[2], before[2])
    assert not torch.equal(state.mu[1], before[1])


# --- gamma ------------------------------------------------------------------------------------------------------------


def test_gamma_is_chosen_on_validation_images_as_a_batch():
    task = make_task(BACKBONE, "image_features")
    clip = method(gammas=(0.001, 0.1, 5.0))
    report = fit_method(clip, task)
    support = clip.current_support()
    f = F.normalize(task.val.values[0], dim=-1)
    right = []
    for gamma in clip.config.gammas:
        state = clip.solver(f, clip.zero_shot(), support).run(gamma)
        right.append(int((state.z.argmax(dim=1) == task.val.labels).sum()))
    best = right.index(max(right))
    assert report["gamma"] == clip.config.gammas[best] == pytest.approx(float(clip.gamma))
    assert report["val_accuracy"] == max(right) / 16
    assert report["settings_tried"] == 3
    assert report["searched"]


def test_without_validation_or_search_gamma_stays():
    task = make_task(BACKBONE, "image_features", val=False)
    report = fit_method(method(gamma=0.3), task)
    assert (report["gamma"], report["searched"]) == (0.3, False)
    assert "no validation" in report["why_not_searched"]
    clip = method(search=False)
    assert fit_method(clip, make_task(BACKBONE, "image_features"))["why_not_searched"] == "search is off"
    assert float(clip.gamma) == pytest.approx(0.02)
    assert "why_not_searched" not in fit_method(method(use_support=False), task)


def test_each_gamma_starts_afresh_except_under_parity():
    f, text, _, support = drawn(CLASSES)
    fresh = [state.z for state in solver(f, text, support).along((0.2, 0.002))]
    torch.testing.assert_close(fresh[1], solver(f, text, support).run(0.002).z)
    carried = [state.z for state in solver(f, text, support, parity="aligned", iterations=1).along((0.2, 0.002))]
    alone = solver(f, text, support, parity="aligned", iterations=1).run(0.002).z
    assert (carried[1] - alone).abs().max() > 1e-5


def test_parity_stops_at_the_chosen_gamma():
    f, text, _, support = drawn(CLASSES)
    clip = method(parity="published", iterations=2)
    clip.gamma.fill_(0.01)
    states = [state.log_z.clone() for state in clip.solver(f, text, support).along(clip.config.gammas[:2])]
    torch.testing.assert_close(clip.assign(f, text, support), states[-1])


# --- batches, assumptions, bad input ----------------------------------------------------------------------------------


def fitted(**settings) -> TransCLIP:
    clip = method(**settings)
    fit_method(clip, make_task(BACKBONE, "image_features"))
    return clip


@pytest.mark.parametrize("images", [1, 2, 4, 9])
@pytest.mark.parametrize("settings", [{}, {"use_support": False}, {"parity": "published"}, {"effective_classes": 2}])
@pytest.mark.filterwarnings("ignore::adaptkit.errors.AdaptKitWarning")
def test_batches_of_any_size(images, settings):
    clip = fitted(**settings)
    for names in (NAMES, NOVEL, (NAMES[2], NOVEL[1])):
        scores = clip.set_classes(names)(query(BACKBONE, "image_features")[:images])
        assert scores.shape == (images, len(names))
        assert torch.isfinite(scores).all()


def test_only_the_classes_that_seem_present_are_assigned():
    f, text, labels, support = drawn(CLASSES)
    some = labels < 2
    for labelled in (support, None):
        scores = method(effective_classes=2).assign(f[some], text, labelled)
        assert set(scores.argmax(dim=1).tolist()) == {0, 1}
        assert (scores[:, 2:] < -50).all()
        torch.testing.assert_close(scores[:, :2].exp().sum(dim=1), torch.ones(int(some.sum())))


def test_it_warns_of_a_batch_that_lacks_classes():
    clip = fitted()
    text = F.normalize(torch.randn(4, DIM, generator=torch.Generator().manual_seed(1)), dim=-1)
    clip.zero_shot = lambda: text
    clip.cosine_logits = lambda f, weights: 100 * f @ weights.T
    with pytest.warns(AdaptKitWarning, match="transclip assumes that a batch holds all 4 classes"):
        clip(text[:1].repeat(6, 1))
    clip.set_classes(NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip(text.repeat(2, 1))


def test_classes_are_counted_from_the_names():
    """A class that no test image shows doesn't break anything."""
    f, text, labels, _ = drawn(CLASSES)
    assert method().assign(f[labels < 4], text, None).shape == (32, CLASSES)


def test_one_class_and_features_that_are_not_finite():
    task = make_task(BACKBONE, "image_features")
    alone = FitTask(NAMES[:1], TensorInputs(task.train.values[:, :4], torch.zeros(4, dtype=torch.int64)))
    with pytest.raises(DataError, match="at least 2"):
        fit_method(TransCLIP(BACKBONE, NAMES[:1]), alone)
    bad = replace(task, val=TensorInputs(task.val.values * float("nan"), task.val.labels))
    with pytest.raises(DataError, match="aren't finite"):
        fit_method(method(), bad)
    inputs = query(BACKBONE, "image_features").clone()
    inputs[4] = float("inf")
    with pytest.raises(DataError, match="Image 4 has features"):
        fitted()(inputs)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"gammas": ()}, "at least one"),
        ({"gammas": (0.1, -1.0), "neighbours": -1}, "neighbours is -1.*gammas"),
        ({"parity": "all"}, "none, aligned or published"),
        ({"text_weight": -0.5}, "text_weight is -0.5"),
        ({"temperature": float("inf")}, "temperature is inf"),
    ],
)
def test_settings_that_cannot_be_used(settings, says):
    with pytest.raises(ConfigError, match=says):
        TransCLIPConfig(**settings)


# --- over another method ----------------------------------------------------------------------------------------------

SERVED = sorted(
    name
    for name in methods
    if (kind := methods.get(name)).reads == "image_features"
    and not kind.transductive
    and kind.reads_descriptions != "needed"
    and name != "zero-shot"
)


def over(name, **settings):
    made = method(start_from=name, **settings)
    if made.base is not None and isinstance(made.base, GradientMethod):  # the paper's settings take too long here
        made.base.default_training = replace(made.base.default_training, epochs=2, batch_size=8)
    if made.base is not None and hasattr(made.base.config, "iterations"):
        made.base.config = replace(made.base.config, iterations=20)
    return made


def test_which_methods_it_stands_on():
    assert {"coop", "taskres", "tip-adapter-f", "clip-adapter", "gda", "linear-probe"} <= set(SERVED)
    refused = [name for name in sorted(methods) if name not in (*SERVED, "zero-shot")]
    assert len(refused) + len(SERVED) + 1 == len(list(methods)) >= 38
    for name in refused:
        with pytest.raises(ConfigError, match=f"start_from is '{name}', which"):
            method(start_from=name)
    with pytest.raises(UnknownNameError, match="Did you mean 'taskres'"):
        method(start_from="taskress")


@pytest.mark.parametrize("name", SERVED)
def test_it_starts_from_what_another_method_learned(name):
    task, inputs = make_task(BACKBONE, "image_features"), query(BACKBONE, "image_features", 30)
    clip = over(name, iterations=0, neighbours=0)
    report = fit_method(clip, task)
    assert isinstance(report["base"], dict)
    alone = methods.get(name)(BACKBONE, NAMES)
    alone.load_adapter_state({key[5:]: v for key, v in clip.adapter_state().items() if key.startswith("base.")})
    with torch.no_grad():
        start = alone(inputs).log_softmax(dim=1)
    torch.testing.assert_close(clip.base_start(inputs), start)
    made = clip.solver(F.normalize(inputs, dim=1), clip.zero_shot(), None, start)
    torch.testing.assert_close(made.start().z, start.exp())
    again = TransCLIP(BACKBONE, NAMES, config=clip.config, seed=5)  # what is saved is enough
    again.load_adapter_state(clip.adapter_state())
    assert torch.equal(again(inputs), clip(inputs))


def test_a_base_that_knows_the_answers_is_followed():
    """With all weight on the start, the answers are the other method's."""
    task, inputs = make_task(BACKBONE, "image_features"), query(BACKBONE, "image_features", 30)
    clip = over("linear-probe", text_weight=1e6, text_weight_support=1e6)
    fit_method(clip, task)
    assert torch.equal(clip(inputs).argmax(dim=1), clip.base(inputs).argmax(dim=1))
    assert clip(inputs).argmax(dim=1).ne(method()(inputs).argmax(dim=1)).any()


def test_a_base_follows_the_classes():
    clip = over("linear-probe")
    fit_method(clip, make_task(BACKBONE, "image_features"))
    clip.set_classes(NAMES[:2])
    assert clip.base.class_names == NAMES[:2]
    assert clip(query(BACKBONE, "image_features")).shape == (9, 2)
    clip.set_classes(NOVEL)
    assert clip.base.uses_fallback
    with pytest.raises(UnsupportedError, match="different scales"):
        clip.set_classes((NAMES[0], NOVEL[0]))
    assert clip.class_names == clip.base.class_names == NOVEL
