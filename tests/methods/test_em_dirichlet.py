"""EM-Dirichlet: the sheet's checks, a plain loop beside it, batches of any size, and its assumption."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from adaptkit.errors import AdapterError, AdaptKitWarning, ConfigError, DataError
from adaptkit.methods.transductive import _dirichlet, _transduction
from adaptkit.methods.transductive._dirichlet import (
    DirichletMixture,
    Fitted,
    Layer,
    climb,
    log_likelihood,
    log_probabilities,
    match_clusters,
    maximise,
    mm_step,
    row_objective,
)
from adaptkit.methods.transductive._transduction import Support, effective_number, shot_indices
from adaptkit.methods.transductive.em_dirichlet import EMDirichlet, EMDirichletConfig
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs
from tests.methods.drawn_batch import drawn
from tests.methods.tiny import DIM, NAMES, NOVEL, make_task, query, tiny_clip

BACKBONE = tiny_clip()
CLASSES, IMAGES = 6, 40


def method(**settings) -> EMDirichlet:
    return EMDirichlet(BACKBONE, NAMES, config=EMDirichletConfig(**settings))


def targets(seed=0, rows=5, classes=7, members=30):
    """Mean log-probabilities of a few Dirichlet draws, [rows, classes]."""
    numbers = torch.Generator().manual_seed(seed)
    z = torch.softmax(2 * torch.randn(rows, members, classes, generator=numbers, dtype=torch.float64), dim=-1)
    return z.log().mean(dim=1)


# --- concentrations ---------------------------------------------------------------------------------------------------


def test_an_mm_step_increases_the_likelihood_and_stays_positive():
    y, alpha = targets(), torch.ones(5, 7, dtype=torch.float64)
    before = row_objective(alpha, y)
    for _ in range(60):
        alpha = mm_step(alpha, y)
        after = row_objective(alpha, y)
        assert (alpha > 0).all()
        assert (after >= before - 1e-12).all()
        before = after
    assert (after > row_objective(torch.ones_like(alpha), y) + 0.1).all()


@pytest.mark.parametrize("value", [1e-13, 1e-10, 1e-6, 1.0, 1e6])
def test_an_mm_step_solves_its_quadratic_equation(value):
    """At every size of concentrations, the smallest and the largest too."""
    alpha, y = torch.full((1, 3), value, dtype=torch.float64), torch.tensor([[-30.0, -1.0, -0.1]], dtype=torch.float64)
    x = mm_step(alpha, y)
    assert (x > 0).all()
    assert torch.isfinite(x).all()
    gain = torch.digamma(alpha + 1)
    c = (2 * (torch.lgamma(torch.ones(())) - torch.lgamma(alpha + 1) + gain * alpha) / alpha**2).abs()
    if value < 1e-8:
        c = torch.full_like(alpha, torch.pi**2 / 6)
    b = gain - torch.digamma(alpha.sum()) - c * alpha - y
    left = c * x**2 + b * x
    torch.testing.assert_close(left, torch.ones_like(left), rtol=1e-6, atol=1e-6)


def test_both_solvers_find_the_point_where_the_gradient_vanishes():
    y, start = targets(3), torch.ones(5, 7, dtype=torch.float64)
    newton = climb(start, y)
    residual = torch.digamma(newton.sum(dim=1, keepdim=True)) - torch.digamma(newton) + y
    assert residual.abs().max() < 1e-12
    torch.testing.assert_close(maximise(start, y), newton, rtol=1e-3, atol=1e-5)


def test_tasks_of_a_batch_do_not_influence_each_other():
    y = torch.stack([targets(seed) for seed in range(3)])
    start = torch.ones_like(y)
    for solver in (maximise, climb):
        together = solver(start, y)
        for task in range(3):
            torch.testing.assert_close(together[task], solver(start[task], y[task]), rtol=1e-12, atol=0)


def test_a_likelihood_without_a_maximum_stays_bounded():
    """One member, or equal ones: nothing but the limits keeps the concentrations finite."""
    y = torch.log(torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64))
    alpha = climb(torch.ones_like(y), y)
    assert torch.isfinite(alpha).all()
    assert 10 < alpha.sum() <= 2 * _dirichlet.NEWTON_LARGEST * 3
    torch.testing.assert_close((alpha / alpha.sum())[0], y.exp()[0], rtol=0, atol=0.05)


def test_the_likelihood_is_a_dirichlet_density():
    numbers = torch.Generator().manual_seed(1)
    alpha = torch.rand(4, 4, generator=numbers, dtype=torch.float64) * 5 + 0.2
    z = torch.softmax(torch.randn(9, 4, generator=numbers, dtype=torch.float64), dim=-1)
    wanted = torch.stack([torch.distributions.Dirichlet(row).log_prob(z) for row in alpha], dim=1)
    torch.testing.assert_close(log_likelihood(alpha, z.log()), wanted)


# --- the whole method -------------------------------------------------------------------------------------------------


def plain_em(f, text, config, support, balance):
    """The sheet's algorithm, written out class by class, with the paper's MM updates."""
    z = torch.softmax(config.temperature * (f.double() @ text.double().T), dim=-1)
    u, (images, classes) = z, z.shape
    alpha, log_z = torch.ones(classes, classes, dtype=torch.float64), torch.log(z + 1e-15)
    hard = config.assignment == "hard"
    shots = None
    if support is not None:
        shots = torch.log(torch.softmax(config.temperature * (support.features.double() @ text.double().T), -1) + 1e-15)
    for _ in range(config.iterations):
        for k in range(classes):
            mass, total = u[:, k].sum(), (u[:, k, None] * log_z).sum(dim=0)
            if shots is not None:
                mass, total = mass + (support.labels == k).sum(), total + shots[support.labels == k].sum(dim=0)
            if mass <= 1e-15:
                continue
            a, y = alpha[k].clone(), total / mass
            for step in range(1, 1001):
                c = 2 * (torch.lgamma(torch.ones(())) - torch.lgamma(a + 1) + a * torch.digamma(a + 1)) / a**2
                b = torch.digamma(a + 1) - torch.digamma(a.sum()) - c.abs() * a - y
                new = (-b + (b**2 + 4 * c.abs()).sqrt()) / (2 * c.abs())
                stop = step % 50 == 0 and (new - a).square().sum() / a.square().sum() < 1e-13
                a = new
                if stop:
                    break
            alpha[k] = a
        v = torch.log(u.mean(dim=0) + 1e-15) + 1
        scores = torch.zeros(images, classes, dtype=torch.float64)
        for k in range(classes):
            density = torch.lgamma(alpha[k].sum()) - torch.lgamma(alpha[k]).sum() + (log_z * (alpha[k] - 1)).sum(dim=1)
            scores[:, k] = density + balance * v[k]
        soft = torch.softmax(scores, dim=-1)
        u = F.one_hot(soft.argmax(dim=1), classes).double() if hard else soft
    return soft


@pytest.mark.parametrize("assignment", ["soft", "hard"])
@pytest.mark.parametrize("use_support", [False, True])
def test_it_equals_the_plain_loop(assignment, use_support):
    f, text, _, support = drawn(CLASSES, shots=4)
    labelled = support if use_support else None
    em = method(assignment=assignment, iterations=3, effective_classes=3, temperature=20.0)
    fitted = em.fitted_mixture(f, text, labelled)
    wanted = plain_em(f, text, em.config, labelled, balance=2.0)
    torch.testing.assert_close(fitted.log_u.exp().double(), wanted, rtol=2e-3, atol=2e-4)
    assert torch.equal(fitted.log_u.argmax(dim=1), wanted.argmax(dim=1))


def test_chunks_change_nothing(monkeypatch):
    f, text, _, support = drawn(CLASSES)
    whole = method(iterations=4).fitted_mixture(f, text, support)
    monkeypatch.setattr(_transduction, "_CHUNK_BYTES", 8 * CLASSES * 7)
    em = method(iterations=4)
    assert len(em.chunks(f, CLASSES)) == 6
    parts = em.fitted_mixture(f, text, support)
    torch.testing.assert_close(parts.log_u, whole.log_u, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.prototypes, whole.prototypes, rtol=1e-9, atol=1e-12)


def test_with_no_balance_and_fixed_concentrations_it_is_the_bayes_posterior():
    f, text, _, _ = drawn(CLASSES)
    mixture = DirichletMixture([f], text, 30.0)
    alpha = torch.rand(CLASSES, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4 + 0.5
    log_z = log_probabilities(f @ text.T, 30.0)
    got = mixture._log_u(alpha, torch.zeros(CLASSES), Layer(0.0), log_z).exp()
    densities = torch.stack([torch.distributions.Dirichlet(row).log_prob(log_z.exp()) for row in alpha], dim=1)
    torch.testing.assert_close(got, torch.softmax(densities, dim=1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("use_support", [False, True])
def test_another_order_of_the_classes_and_images(use_support):
    f, text, _, support = drawn(CLASSES)
    em, order = method(iterations=5), torch.randperm(CLASSES, generator=torch.Generator().manual_seed(4))
    images = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(5))
    moved = Support(support.features, order.argsort()[support.labels])
    first = em.assign(f, text, support if use_support else None)
    second = em.assign(f[images], text[order], moved if use_support else None)
    torch.testing.assert_close(second, first[images][:, order], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("classes", "effective", "balance"), [(10, 5, 2), (4, 5, 0), (14, 5, 2), (10, 0, 1), (9, 2, 4)]
)
def test_the_weight_of_class_proportions(classes, effective, balance):
    assert method(effective_classes=effective).balance(classes) == balance


def test_a_subset_of_the_classes_takes_its_own_shots_and_new_ones_none():
    em = method()
    fit_method(em, make_task(BACKBONE, "image_features"))
    em.set_classes((NAMES[3], NOVEL[0], NAMES[1]))
    support = em.current_support()
    assert support is not None
    assert support.labels.bincount(minlength=3).tolist() == [4, 0, 4]
    assert torch.equal(support.features[support.labels == 2], em.support[em.support_labels == 1])
    em.set_classes(NOVEL)
    assert em.current_support() is None


# --- matching ---------------------------------------------------------------------------------------------------------


def clustered(members=(3, 0, 2, 1)):
    prototypes = torch.tensor([[0.1, 0.6, 0.2, 0.1], [0.0] * 4, [0.1, 0.7, 0.1, 0.1], [0.2, 0.2, 0.2, 0.4]]).double()
    owners = [cluster for cluster, count in enumerate(members) for _ in range(count)]
    log_u = torch.full((len(owners), 4), -5.0)
    log_u[torch.arange(len(owners)), owners] = -0.1
    return Fitted(log_u, prototypes, torch.tensor(members), torch.ones(4, 4), torch.zeros(4)), torch.tensor(owners)


def test_hungarian_gives_each_cluster_a_class_of_its_own():
    fitted, owners = clustered()
    scores = match_clusters(fitted, "hungarian")
    full = [0, 2, 3]
    _, classes = linear_sum_assignment(-fitted.prototypes[full].numpy())
    wanted = dict(zip(full, classes.tolist(), strict=True))
    assert wanted == {0: 2, 2: 1, 3: 3}
    assert scores.argmax(dim=1).tolist() == [wanted[owner] for owner in owners.tolist()]
    torch.testing.assert_close(scores.exp().sum(dim=1), fitted.log_u.exp().sum(dim=1))  # the same columns, moved


def test_basic_lets_clusters_share_a_class():
    fitted, owners = clustered()
    assert match_clusters(fitted, "basic").argmax(dim=1).tolist() == [
        {0: 1, 2: 1, 3: 3}[one] for one in owners.tolist()
    ]
    assert match_clusters(fitted, "none") is fitted.log_u


def test_zero_shot_answers_beat_zero_shot_where_the_clusters_are_clear():
    """Texts that are off: the batch shows where the classes lie."""
    f, text, labels, _ = drawn(CLASSES, images=120, spread=0.15)
    off = F.normalize(text + 0.45 * torch.randn(text.shape, generator=torch.Generator().manual_seed(8)), dim=-1)
    right = (f @ off.T).argmax(dim=1).eq(labels).float().mean()
    got = method(effective_classes=0).assign(f, off, None).argmax(dim=1).eq(labels).float().mean()
    assert right < 1
    assert got >= right


# --- batches, assumptions, bad input ----------------------------------------------------------------------------------


def fitted_method(**settings) -> EMDirichlet:
    em = method(**settings)
    fit_method(em, make_task(BACKBONE, "image_features"))
    return em


@pytest.mark.parametrize("images", [0, 1, 2, 9])
@pytest.mark.parametrize("use_support", [False, True])
@pytest.mark.filterwarnings("ignore::adaptkit.errors.AdaptKitWarning")
def test_batches_of_any_size(images, use_support):
    em = fitted_method(use_support=use_support)
    scores = em(query(BACKBONE, "image_features", 9)[:images])
    assert scores.shape == (images, 4)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    torch.testing.assert_close(scores.exp().sum(dim=1), torch.ones(images))


def test_effective_number_of_classes():
    assert effective_number(torch.eye(5)) == pytest.approx(5)
    assert effective_number(torch.eye(5)[[0, 0, 1, 1]]) == pytest.approx(2)


def warned(em, inputs) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        em(inputs)
        em(inputs)  # said once
    said = [str(item.message) for item in caught if issubclass(item.category, AdaptKitWarning)]
    assert len(said) <= 1
    return said[0] if said else ""


def test_it_warns_when_the_batch_contradicts_the_assumption():
    """Seen from the zero-shot predictions of the batch, without labels."""
    names = tuple(f"class {index}" for index in range(12))
    em = EMDirichlet(BACKBONE, names, config=EMDirichletConfig(effective_classes=2))
    text = F.normalize(torch.randn(12, DIM, generator=torch.Generator().manual_seed(2)), dim=-1)
    everything = EMDirichlet(BACKBONE, names, config=EMDirichletConfig(effective_classes=0))
    for one in (em, everything):
        one.zero_shot = lambda: text
        one.cosine_logits = lambda f, weights: 100 * f @ weights.T
    assert "at most 2 of the 12 classes" in warned(em, text.repeat(3, 1))
    em.set_classes(names)
    assert warned(em, text[:2].repeat(5, 1)) == ""
    assert "all 12 classes" in warned(everything, text[:2].repeat(5, 1))
    everything.set_classes(names)
    assert warned(everything, text.repeat(3, 1)) == ""
    everything.set_classes(names)
    assert "all 12 classes" in warned(everything, text[:1])


def test_one_class_is_refused_in_the_fit_and_certain_afterwards():
    task = make_task(BACKBONE, "image_features")
    alone = FitTask(NAMES[:1], TensorInputs(task.train.values[:, :4], torch.zeros(4, dtype=torch.int64)))
    with pytest.raises(DataError, match="at least 2"):
        fit_method(EMDirichlet(BACKBONE, NAMES[:1]), alone)
    em = fitted_method().set_classes(NAMES[:1])
    assert torch.equal(em(query(BACKBONE, "image_features", 3)), torch.zeros(3, 1))


def test_features_that_are_not_finite_are_refused():
    em, inputs = fitted_method(), query(BACKBONE, "image_features", 5).clone()
    inputs[2, 3] = float("nan")
    with pytest.raises(DataError, match=r"Image 2 has features that aren't finite"):
        em(inputs)
    task = make_task(BACKBONE, "image_features")
    task.train.values[0, 1] = float("inf")
    with pytest.raises(DataError, match="Training image 1 "):
        fit_method(method(), task)


def test_support_is_bounded():
    em = fitted_method(max_support=3)
    assert em.support_labels.bincount().tolist() == [3, 3, 3, 3]
    assert shot_indices(torch.tensor([1, 0, 1, 1, 0]), 2).tolist() == [0, 1, 2, 4]
    assert fitted_method(use_support=False).support.shape == (0, DIM)
    wide = fitted_method()
    with pytest.raises(AdapterError, match="allow 3"):
        em.load_adapter_state(wide.adapter_state())
    state = wide.adapter_state()
    with pytest.raises(AdapterError, match="outside its 4 classes"):
        wide.load_adapter_state({**state, "support_labels": state["support_labels"] + 1})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": 0.0, "query_batch": -1}, "temperature.*|query_batch.*"),
        ({"assignment": "firm"}, "soft or hard"),
        ({"matching": "best"}, "hungarian, basic or none"),
        ({"effective_classes": -2}, "effective_classes is -2"),
        ({"solver": "adam"}, "newton or mm"),
    ],
)
def test_settings_that_cannot_be_used(settings, says):
    with pytest.raises(ConfigError, match=says):
        EMDirichletConfig(**settings)
