"""Tip-Adapter and Tip-Adapter-F: the cache, the search against a plain double loop, and what is never looked at."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.errors import AdapterError, ConfigError, UnsupportedError
from adaptkit.methods.adapters.zero_shot import ZeroShot
from adaptkit.methods.caches import _cache
from adaptkit.methods.caches._cache import CacheConfig, _similarities, grid, view_mean_keys
from adaptkit.methods.caches.tip_adapter import TipAdapter
from adaptkit.methods.caches.tip_adapter_f import TipAdapterF
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs
from tests.methods.tiny import DIM, NAMES, NOVEL, make_task, query, tiny_clip

BACKBONE = tiny_clip()


def drawn(shots_per_class, seed, spread=2.0):
    numbers = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((shots,), index) for index, shots in enumerate(shots_per_class)])
    centres = torch.randn(len(shots_per_class), DIM, generator=torch.Generator().manual_seed(5))
    values = centres[labels] + spread * torch.randn(len(labels), DIM, generator=numbers)
    order = torch.randperm(len(labels), generator=numbers)
    return TensorInputs(values[order][None], labels[order])


def plain_search(method, val, alphas, betas):
    """The sheet's double loop, in fp64: beta outside, alpha inside, strict improvements only."""
    f, keys = F.normalize(val.values[0].double(), dim=-1), method.keys.detach().double()
    one_hot = F.one_hot(method.key_labels, len(NAMES)).double()
    clip = 100 * f @ method.zero_shot().double().T
    best, chosen = -1, None
    for beta in betas:
        cache = torch.exp(-beta * (1 - f @ keys.T)) @ one_hot
        for alpha in alphas:
            right = int(((clip + alpha * cache).argmax(dim=1) == val.labels).sum())
            if right > best:
                best, chosen = right, (float(beta), float(alpha))
    return chosen, best / len(val.labels)


@settings(max_examples=20, deadline=None)
@given(
    shots=st.one_of(st.integers(1, 4).map(lambda n: [n] * 4), st.lists(st.integers(1, 5), min_size=4, max_size=4)),
    seed=st.integers(0, 50),
    rows=st.sampled_from([1, 3, 1000]),
)
def test_search_equals_the_double_loop(shots, seed, rows):
    config = CacheConfig(max_alpha=30, max_beta=20, alpha_steps=6, beta_steps=25)
    method, val = TipAdapter(BACKBONE, NAMES, config=config), drawn([3] * 4, seed + 100)
    method._search_rows = lambda alphas: rows  # any chunking gives the same
    report = fit_method(method, FitTask(NAMES, drawn(shots, seed), val))
    chosen, accuracy = plain_search(method, val, grid(30, 6), grid(20, 25))
    assert (report["beta"], report["alpha"]) == chosen
    assert report["val_accuracy"] == accuracy
    assert report["settings_tried"] == 150
    assert float(method.alpha) == pytest.approx(report["alpha"])


def test_products_stand_in_for_exponentials():
    distance = -2 * torch.rand(7, 30, generator=torch.Generator().manual_seed(0))
    betas = grid(50.0, 200)
    for beta, similar in zip(betas, _similarities(distance, betas.tolist()), strict=True):
        torch.testing.assert_close(similar.double(), torch.exp(beta * distance.double()), rtol=3e-5, atol=1e-37)


def test_a_tie_between_classes_is_not_a_hit(monkeypatch):
    """Where nothing tells the classes apart, no setting may look good."""
    monkeypatch.setattr(TipAdapter, "zero_shot", lambda self: torch.full((4, DIM), DIM**-0.5))
    labels = torch.arange(4)
    val = TensorInputs(torch.eye(4, DIM)[None], labels)  # one number each, so that equal logits are equal bit for bit
    task = FitTask(NAMES, TensorInputs(torch.ones(1, 4, DIM), labels), val)
    assert TipAdapter(BACKBONE, NAMES).fit(task)["val_accuracy"] == 0


def test_the_grid_leaves_out_its_end():
    points = grid(7.0, 200)
    assert len(points) == 200
    assert float(points[0]) == 0.1
    assert float(points[1] - points[0]) == pytest.approx(6.9 / 200)
    assert float(points[-1]) < 7.0


def test_keys_average_augmented_views_before_normalising():
    values = (
        torch.randn(4, 3, DIM, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e6, 1, 5, 9])[:, None, None]
    )
    labels = torch.arange(3)
    torch.testing.assert_close(
        view_mean_keys(TensorInputs(values, labels)), F.normalize(values[1:].mean(dim=0), dim=-1)
    )
    plain = view_mean_keys(TensorInputs(values[:1], labels))
    torch.testing.assert_close(plain, F.normalize(values[0], dim=-1))


@pytest.mark.parametrize("kind", [TipAdapter, TipAdapterF])
def test_alpha_zero_and_an_empty_cache_are_zero_shot(kind):
    features = query(BACKBONE, "image_features")
    with torch.no_grad():
        wanted = ZeroShot(BACKBONE, NAMES)(features) * 100 / 20
        torch.testing.assert_close(kind(BACKBONE, NAMES)(features), wanted)  # before the fit
        method = kind(BACKBONE, NAMES, config=CacheConfig(alpha=0, search=False))
        method.build_cache(make_task(BACKBONE, "image_features"))
        torch.testing.assert_close(method(features), wanted)


def test_order_of_the_shots_does_not_matter():
    task, features = make_task(BACKBONE, "image_features"), query(BACKBONE, "image_features")
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    shuffled = TensorInputs(task.train.values[:, order], task.train.labels[order])
    logits = []
    for train in (task.train, shuffled):
        method = TipAdapter(BACKBONE, NAMES)
        method.fit(replace(task, train=train))
        with torch.no_grad():
            logits.append(method(features))
    torch.testing.assert_close(*logits)


def test_f_starts_as_the_cache_and_then_trains_only_keys():
    task, features = make_task(BACKBONE, "image_features", views=3), query(BACKBONE, "image_features")
    config = CacheConfig(search=False)
    free, trained = TipAdapter(BACKBONE, NAMES, config=config), TipAdapterF(BACKBONE, NAMES, config=config)
    free.fit(task)
    trained.prepare(task)
    with torch.no_grad():
        assert torch.equal(free(features), trained(features))
    report = fit_method(trained, task, TipAdapterF.default_training)
    assert report["epochs"] == 20
    assert report["learning_rates"][0] == 1e-3
    assert [name for name, parameter in trained.named_parameters()] == ["keys"]
    assert not torch.equal(free.keys, trained.keys)
    assert float((trained.keys.detach().norm(dim=1) - 1).abs().max()) > 1e-4  # not normalised again
    assert torch.equal(free.key_labels, trained.key_labels)


def test_settings_stay_where_there_is_nothing_to_search_on():
    task = make_task(BACKBONE, "image_features", val=False)
    report = fit_method(TipAdapter(BACKBONE, NAMES), task)
    assert report == {
        "keys": 16,
        "alpha": pytest.approx(1.17),
        "beta": 1.0,
        "searched": False,
        "why_not_searched": "there are no validation images",
    }
    method = TipAdapter(BACKBONE, NAMES, config=CacheConfig(search=False))
    assert fit_method(method, make_task(BACKBONE, "image_features"))["why_not_searched"] == "search is off"


def test_a_second_fit_starts_over():
    method, task = TipAdapter(BACKBONE, NAMES), make_task(BACKBONE, "image_features")
    fit_method(method, task)
    report = fit_method(method, replace(task, val=None))
    assert report["alpha"] == pytest.approx(1.17)


def test_large_batches_go_in_chunks(monkeypatch):
    method, features = TipAdapter(BACKBONE, NAMES), query(BACKBONE, "image_features", 50)
    method.fit(make_task(BACKBONE, "image_features"))
    sizes = []
    original = TipAdapter.cache_logits
    monkeypatch.setattr(TipAdapter, "cache_logits", lambda self, f: sizes.append(len(f)) or original(self, f))
    with torch.no_grad():
        whole = method(features)
        monkeypatch.setattr(_cache, "_FORWARD_BYTES", 16 * 4 * 20)
        torch.testing.assert_close(method(features), whole)
    assert sizes == [50, 20, 20, 10]


def test_novel_classes_are_zero_shot_and_said_to_be():
    method, features = TipAdapter(BACKBONE, NAMES), query(BACKBONE, "image_features")
    method.fit(make_task(BACKBONE, "image_features"))
    with torch.no_grad():
        assert torch.equal(method.set_classes(NOVEL)(features), ZeroShot(BACKBONE, NOVEL)(features))
    assert method.uses_fallback
    with pytest.raises(UnsupportedError):
        method.set_classes((*NAMES, *NOVEL))


def test_released_caches():
    features = query(BACKBONE, "image_features")
    fitted = TipAdapter(BACKBONE, NAMES, config=CacheConfig(search=False))
    fitted.fit(make_task(BACKBONE, "image_features"))
    values = F.one_hot(fitted.key_labels).half()
    other = TipAdapter(BACKBONE, NAMES)
    other.load_reference_state({"keys": fitted.keys.T, "values": values})
    tuned = TipAdapterF(BACKBONE, NAMES)
    tuned.load_reference_state({"best_F": fitted.keys.half(), "values": values})
    with torch.no_grad():
        assert torch.equal(other(features), fitted(features))
        torch.testing.assert_close(tuned(features), fitted(features), rtol=1e-3, atol=1e-2)
    with pytest.raises(AdapterError, match="has no 'best_F': give the files best_F, values together"):
        tuned.load_reference_state({"keys": fitted.keys.T, "values": values})
    with pytest.raises(AdapterError, match="made for other classes or shots"):
        other.load_reference_state({"keys": fitted.keys.T, "values": values[:, :3]})


def test_states_that_lie_about_themselves():
    method = TipAdapter(BACKBONE, NAMES)
    state = {**method.adapter_state(), "keys": torch.zeros(3, DIM), "key_labels": torch.tensor([0, 1, 4])}
    with pytest.raises(AdapterError, match="labels outside its 4 classes"):
        method.load_adapter_state(state)
    with pytest.raises(AdapterError, match="made for another backbone"):
        method.load_adapter_state({**state, "keys": torch.zeros(3, DIM + 1)})
    with pytest.raises(AdapterError, match="made for another backbone"):
        method.load_adapter_state({**state, "key_labels": torch.tensor([0, 1])})


def test_bad_settings():
    with pytest.raises(
        ConfigError, match=r"alpha is -1, but must be 0 or more; beta_steps is 0, but must be at least 1"
    ):
        CacheConfig(alpha=-1, beta_steps=0)
    with pytest.raises(ConfigError, match=r"max_beta is 0.1, but must be above 0.1"):
        CacheConfig(max_beta=0.1)
