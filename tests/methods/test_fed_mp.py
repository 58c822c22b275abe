"""Fed-MP: the attention, a client's training and the server written out; splits; the memory and its switches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import AdapterError, AdaptKitWarning, ConfigError, DataError, TrainingError
from adaptkit.methods.adapters.zero_shot import ZeroShot
from adaptkit.methods.transductive.fed_mp import (
    FedMP,
    FedMPConfig,
    PrototypeMemory,
    merge,
    split_clients,
    symmetric_info_nce,
)
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs
from tests.methods.tiny import DIM, NAMES, NOVEL, make_task, query, tiny_clip

BACKBONE = tiny_clip()


def numbers(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=numbers(seed)), dim=-1)


def fitted(seed: int = 0, **settings) -> tuple[FedMP, dict]:
    method = FedMP(BACKBONE, NAMES, config=FedMPConfig(**settings), seed=seed)
    return method, fit_method(method, make_task(BACKBONE, "image_features", shots=5, seed=seed))


# --- the sheet's checks -----------------------------------------------------------------------------------------------


def test_uniform_attention_is_zero_shot():
    features = query(BACKBONE, "image_features")
    method = FedMP(BACKBONE, NAMES, config=FedMPConfig(entropy_share=0.0))
    with torch.no_grad():
        assert not torch.allclose(method(features), ZeroShot(BACKBONE, NAMES)(features), atol=1e-3)
        for value in method.attention.parameters():
            value.zero_()
        torch.testing.assert_close(method(features), ZeroShot(BACKBONE, NAMES)(features), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.2, 0.7, 3.3], [2.0, -0.5, 1.0]])
def test_merging_identical_adapters_is_identity(weights):
    state = {key: value.clone() for key, value in FedMP(BACKBONE, NAMES).attention.state_dict().items()}
    merged = merge([state] * 3, weights)
    assert merged.keys() == state.keys()
    assert all(torch.equal(merged[key], state[key]) for key in state)


def test_merging_is_the_weighted_mean():
    states = [
        {"a": torch.randn(3, 2, generator=numbers(i)), "b": torch.randn(2, generator=numbers(9 + i))} for i in range(3)
    ]
    merged = merge(states, [1.0, 2.0, 5.0])
    for key in ("a", "b"):
        wanted = (states[0][key] + 2 * states[1][key] + 5 * states[2][key]) / 8
        torch.testing.assert_close(merged[key], wanted, rtol=1e-5, atol=1e-6)


def test_adapters_that_cannot_be_merged():
    one = {"a": torch.ones(2)}
    with pytest.raises(AdapterError, match="add up to 0"):
        merge([one, one], [1.0, -1.0])
    with pytest.raises(AdapterError, match="nan"):
        merge([one, one], [1.0, math.nan])
    with pytest.raises(AdapterError, match="2 adapters and 1 weights"):
        merge([one, one], [1.0])
    with pytest.raises(AdapterError, match="0 adapters"):
        merge([], [])
    with pytest.raises(AdapterError, match="one kind"):
        merge([one, {"a": torch.ones(3)}], [1.0, 1.0])


def test_threshold_zero_disables_the_memory():
    features = unit(40, DIM, seed=1)
    memory = PrototypeMemory(unit(4, DIM), 1000.0, entropy_share=0.0)  # answers are as sure as can be
    for part in features.split(7):
        torch.testing.assert_close(memory.answer(part), 1000.0 * part @ unit(4, DIM).T, rtol=1e-5, atol=1e-3)
    assert not memory.counts.any()


# --- the memory -------------------------------------------------------------------------------------------------------


def plain_memory(features, texts, scale, bias, config):
    """One image after the other, as in the sheet."""
    classes = len(texts)
    means, counts = torch.zeros_like(texts), [0] * classes
    rows = []
    for start in range(0, len(features), config.memory_batch):
        batch = features[start : start + config.memory_batch]
        prototypes = texts.clone()
        for k in range(classes):
            if counts[k] and (min(counts) or not config.wait_for_all):
                prototypes[k] = texts[k] + means[k]
                if config.renormalise:
                    prototypes[k] = prototypes[k] / prototypes[k].norm()
        logits = scale * batch @ prototypes.T + bias
        rows.append(logits)
        for f, row in zip(batch, logits, strict=True):
            p = row.softmax(dim=0)
            if -(p * p.log()).sum() < config.entropy_share * math.log(classes):
                k = int(row.argmax())
                means[k] = (means[k] * counts[k] + f) / (counts[k] + 1)
                counts[k] += 1
    return torch.cat(rows), counts


@pytest.mark.parametrize("wait_for_all", [True, False])
@pytest.mark.parametrize("renormalise", [True, False])
def test_memory_is_the_sheets(wait_for_all, renormalise):
    config = FedMPConfig(wait_for_all=wait_for_all, renormalise=renormalise, memory_batch=7, entropy_share=0.9)
    method, features = FedMP(BACKBONE, NAMES, config=config), torch.randn(90, DIM, generator=numbers())
    with torch.no_grad():
        logits = method(features)
        attention = method.attention.up(method.attention.down(features).tanh()).exp()
        adapted = attention / attention.sum(dim=1, keepdim=True) * features
        adapted = adapted / adapted.norm(dim=1, keepdim=True)
        wanted, counts = plain_memory(adapted, method.zero_shot(), 20.0, 0.0, config)
    assert min(counts) > 0  # image prototypes came into use
    assert not torch.allclose(wanted, 20 * adapted @ method.zero_shot().T, atol=0.1)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


def test_waiting_for_all_may_take_for_ever():
    texts = torch.eye(3)
    features = torch.eye(3)[[0, 1, 0, 1]]
    waiting = PrototypeMemory(texts, 100.0, wait_for_all=True)
    eager = PrototypeMemory(texts, 100.0, wait_for_all=False, renormalise=False)
    for memory in (waiting, eager):
        memory.answer(features)
        assert memory.counts.tolist() == [2, 2, 0]
    assert torch.equal(waiting.prototypes(), texts)
    assert torch.equal(eager.prototypes(), torch.diag(torch.tensor([2.0, 2.0, 1.0])))


def test_answers_do_not_depend_on_earlier_calls():
    method, features = (
        FedMP(BACKBONE, NAMES, config=FedMPConfig(entropy_share=0.9)),
        query(BACKBONE, "image_features", 60),
    )
    state = {key: value.clone() for key, value in method.state_dict().items()}
    with torch.no_grad():
        first = method(features)
        method(features.flip(0))
        method.set_classes(NOVEL)(features)
        again = method.set_classes(NAMES)(features)
    assert torch.equal(first, again)
    assert all(torch.equal(state[key], value) for key, value in method.state_dict().items())


def test_order_matters_and_can_be_drawn():
    features = torch.randn(90, DIM, generator=numbers())
    plain = FedMP(BACKBONE, NAMES, config=FedMPConfig(entropy_share=0.9))
    shuffled = FedMP(BACKBONE, NAMES, config=replace(plain.config, shuffle=True, shuffle_seed=4))
    with torch.no_grad():
        in_order = plain(features)
        assert not torch.allclose(plain(features.flip(0)).flip(0), in_order, atol=1e-3)
        order = torch.randperm(90, generator=numbers(4))
        wanted = torch.empty_like(in_order)
        wanted[order] = plain(features[order])
        assert torch.equal(shuffled(features), wanted)
        first = in_order[:18]  # the first batch sees the empty memory
        torch.testing.assert_close(first, plain(features[:18]))


def test_one_class_and_no_images():
    with torch.no_grad():
        assert FedMP(BACKBONE, NAMES).set_classes(NAMES[:1])(query(BACKBONE, "image_features")).shape == (9, 1)


# --- splits -----------------------------------------------------------------------------------------------------------

LABELS = torch.arange(10).repeat_interleave(16)


@pytest.mark.parametrize("skew", ["classes", "iid", "dirichlet"])
@pytest.mark.parametrize("clients", [1, 3, 7])
def test_each_image_has_one_client(skew, clients):
    parts = split_clients(LABELS, clients, skew, 0.5, numbers())
    assert len(parts) == clients
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(160))
    again = split_clients(LABELS, clients, skew, 0.5, numbers())
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    if clients > 1:
        other = split_clients(LABELS, clients, skew, 0.5, numbers(1))
        assert any(not torch.equal(a, b) for a, b in zip(parts, other, strict=True))


def test_classes_are_disjoint_and_iid_is_even():
    by_class = [set(LABELS[part].tolist()) for part in split_clients(LABELS, 3, "classes", 0.5, numbers())]
    assert sorted(len(classes) for classes in by_class) == [3, 3, 4]
    assert len(set.union(*by_class)) == 10
    assert sorted(len(part) for part in split_clients(LABELS, 3, "iid", 0.5, numbers())) == [53, 53, 54]


def test_concentration_sets_the_skew():
    def largest_share(concentration: float) -> float:
        parts = split_clients(LABELS, 4, "dirichlet", concentration, numbers())
        counts = torch.stack([LABELS[part].bincount(minlength=10) for part in parts])
        return float((counts.amax(dim=0) / 16).mean())

    assert largest_share(0.05) > 0.85
    assert 0.25 <= largest_share(1000.0) < 0.35


# --- training ---------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_of_both_directions():
    images, texts = unit(6, DIM, seed=1), unit(6, DIM, seed=2)
    logits = 20 * images @ texts.T
    rows = -logits.log_softmax(dim=1).diagonal().mean()
    columns = -logits.log_softmax(dim=0).diagonal().mean()
    torch.testing.assert_close(symmetric_info_nce(images, texts, 20.0), (rows + columns) / 2)


@pytest.mark.parametrize("residual_init", ["zero", "uniform"])
def test_a_whole_fit_is_the_sheets(residual_init):
    """One client with all images in one batch: two rounds of two epochs, Adam's steps written out."""
    config = FedMPConfig(
        num_clients=1, client_batch=100, client_lr=1e-2, holdout=0.0, residual_init=residual_init, skew="iid"
    )
    task = make_task(BACKBONE, "image_features", shots=5)
    method = FedMP(BACKBONE, NAMES, config=config)
    adapter = [value.detach().clone().requires_grad_() for value in method.attention.parameters()]
    fit_method(method, task)

    draws = torch.Generator().manual_seed(0x5DEECE66D)
    torch.randperm(20, generator=draws)  # iid
    torch.randperm(20, generator=draws)  # held out
    start = torch.zeros(4, DIM)
    if residual_init == "uniform":
        start.uniform_(-5, 5, generator=draws)
    texts = BACKBONE.text_features([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    f, labels = task.train.values[0], task.train.labels
    losses = []
    for _ in range(2):
        values = [*adapter, start.clone().requires_grad_()]
        first, second = [torch.zeros_like(v) for v in values], [torch.zeros_like(v) for v in values]
        for step in (1, 2):
            w1, b1, w2, b2, residual = values
            a = ((f @ w1.T + b1).tanh() @ w2.T + b2).softmax(dim=1)
            t = F.normalize(texts + 0.3 * residual, dim=1)[labels]
            logits = 20 * F.normalize(a * f, dim=1) @ t.T
            loss = (-logits.log_softmax(1).diagonal().mean() - logits.log_softmax(0).diagonal().mean()) / 2
            losses.append(float(loss.detach()))
            for i, gradient in enumerate(torch.autograd.grad(loss, values)):
                gradient = gradient + 0.2 * values[i].detach()
                first[i] = 0.9 * first[i] + 0.1 * gradient
                second[i] = 0.98 * second[i] + 0.02 * gradient**2
                corrected = first[i] / (1 - 0.9**step), second[i] / (1 - 0.98**step)
                moved = values[i].detach() - 1e-2 * corrected[0] / (corrected[1].sqrt() + 1e-6)
                values[i] = moved.requires_grad_()
        adapter = [value.detach().clone().requires_grad_() for value in values[:4]]  # residuals are thrown away
    assert len(losses) == 4
    for mine, plain in zip(method.attention.parameters(), adapter, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)


def test_facts_of_a_fit():
    method, facts = fitted(client_lr=1e-2)
    assert facts["clients"] == 2
    assert facts["clients_left_out"] == 0
    assert facts["client_images"] == [10, 10]
    assert facts["client_held_out"] == [2, 2]
    assert sorted(name for names in facts["client_classes"] for name in names) == sorted(NAMES)
    assert facts["local_parameters"] == [2 * DIM, 2 * DIM]
    assert facts["trained_parameters"] == method.num_trained() == 2 * (DIM**2 + DIM)
    assert [sum(one["weights"]) for one in facts["rounds"]] == [pytest.approx(1), pytest.approx(1)]
    assert all(len(one["losses"]) == 2 for one in facts["rounds"])


def test_training_helps():
    task = make_task(BACKBONE, "image_features", shots=12)
    losses = []
    for rounds in (1, 8):
        config = FedMPConfig(rounds=rounds, local_epochs=3, client_lr=1e-2, client_decay=0.0, skew="iid")
        method = FedMP(BACKBONE, NAMES, config=config)
        losses.append(sum(fit_method(method, task)["rounds"][-1]["losses"]))
    assert losses[1] < losses[0] - 0.03


@pytest.mark.parametrize("skew", ["classes", "iid", "dirichlet"])
def test_same_seed_same_adapter(skew):
    settings = {"skew": skew, "concentration": 5.0, "client_lr": 1e-2, "residual_init": "uniform"}
    (one, _), (same, _), (other, _) = fitted(**settings), fitted(**settings), fitted(1, **settings)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.attention.up.weight, other.attention.up.weight)


def test_best_held_out_epoch_counts(monkeypatch):
    """The second of three epochs is the best: it is returned, unless the last is asked for."""
    epochs = {}
    for selection in ("best", "last"):
        scores = iter([0.2, 0.9, 0.5] * 2)
        monkeypatch.setattr(FedMP, "_held_accuracy", lambda *_, scores=scores: next(scores))
        _, facts = fitted(local_epochs=3, rounds=1, selection=selection)
        epochs[selection] = facts["rounds"][0]["epochs"]
        assert next(scores, None) is None
    assert epochs == {"best": [2, 2], "last": [3, 3]}


def test_without_held_out_images_the_last_epoch_counts():
    method = FedMP(BACKBONE, NAMES)
    facts = fit_method(method, make_task(BACKBONE, "image_features", shots=2, val=False))
    assert facts["client_held_out"] == [0, 0]
    assert facts["rounds"][0]["epochs"] == [2, 2]
    assert facts["rounds"][0]["held_out_accuracies"] == [None, None]


def test_validation_shots_are_not_used():
    task = make_task(BACKBONE, "image_features", shots=5)
    bare = FitTask(task.class_names, task.train, None, task.seed)
    one, two = FedMP(BACKBONE, NAMES), FedMP(BACKBONE, NAMES)
    fit_method(one, task)
    fit_method(two, bare)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def weights_of(**settings) -> list[float]:
    return fitted(rounds=1, client_lr=1e-3, **settings)[1]["rounds"][0]["weights"]


def test_server_weights():
    texts = F.normalize(BACKBONE.text_features([f"a photo of a {name.replace('_', ' ')}." for name in NAMES]), dim=1)
    _, facts = fitted(rounds=1, client_lr=1e-9, client_decay=0.0)  # residuals stay zero
    wanted = []
    for classes in facts["client_classes"]:
        own = texts[[NAMES.index(name) for name in classes]]
        wanted.append(float((texts @ own.T).mean()))
    total = sum(wanted)
    assert facts["rounds"][0]["weights"] == pytest.approx([w / total for w in wanted], rel=1e-4)
    assert weights_of(weighting="uniform") == [0.5, 0.5]
    assert weights_of(weighting="images", skew="iid", num_clients=2) == [0.5, 0.5]
    assert weights_of(target_names=NOVEL) != weights_of()
    assert weights_of(weighting="similarity-last-batch") != weights_of()


def test_negative_similarities(monkeypatch):
    method = FedMP(BACKBONE, NAMES)
    parts = [torch.eye(DIM)[:2], -torch.eye(DIM)[:2]]
    updates = [type("U", (), {"texts": part, "last_texts": part})() for part in parts]
    wanted = torch.eye(DIM)[:4]
    assert method._weights([None, None], updates, wanted) == [0.25, 0.0]
    method.config = FedMPConfig(clip_weights=False)
    assert method._weights([None, None], updates, wanted) == [0.25, -0.25]
    method.config = FedMPConfig(clip_weights=False, weighting="similarity-last-batch")
    assert method._weights([None, None], updates, wanted) == [0.5, -0.5]
    method.config = FedMPConfig()
    assert method._weights([None, None], [updates[1]] * 2, wanted) == [1.0, 1.0]  # all clipped: equal


def test_interruption_keeps_whole_rounds():
    method = FedMP(BACKBONE, NAMES, config=FedMPConfig(rounds=3, client_lr=1e-2))
    task, seen = make_task(BACKBONE, "image_features", shots=5), []

    class Loop:
        @staticmethod
        def progress(what, done, total):
            seen.append((done, total))

    train, calls = method._train, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:  # the second client of the second round
            raise KeyboardInterrupt
        return train(*arguments)

    method._train = interrupted
    facts = method.fit(task, Loop())
    assert facts["interrupted"] is True
    assert len(facts["rounds"]) == 1
    one = FedMP(BACKBONE, NAMES, config=FedMPConfig(rounds=1, client_lr=1e-2))
    one.fit(task)
    assert all(torch.equal(a, b) for a, b in zip(method.parameters(), one.parameters(), strict=True))
    assert seen
    assert all(0 < done <= total for done, total in seen)


def test_progress_reaches_its_total():
    seen = []
    method = FedMP(BACKBONE, NAMES, config=FedMPConfig(client_batch=3))
    fit_method(method, make_task(BACKBONE, "image_features", shots=5), None, lambda *facts: seen.append(facts))
    assert seen[-1][1] == seen[-1][2] == 2 * 2 * (3 + 3)  # 8 images of each client: 3 + 3 + 2
    assert "fed-mp round 2/2: loss" in seen[-1][0]


# --- bad input --------------------------------------------------------------------------------------------------------


def test_clients_without_two_classes():
    task = make_task(BACKBONE, "image_features")
    with pytest.raises(DataError, match="None of the 4 clients of fed-mp has images of two classes"):
        fit_method(FedMP(BACKBONE, NAMES, config=FedMPConfig(num_clients=4)), task)
    with pytest.warns(AdaptKitWarning, match="2 of the 3 clients of fed-mp have images of fewer than two classes"):
        facts = fit_method(FedMP(BACKBONE, NAMES, config=FedMPConfig(num_clients=3)), task)
    assert (facts["clients"], facts["clients_left_out"]) == (1, 2)
    single = FitTask(NAMES[:1], TensorInputs(torch.randn(1, 4, DIM), torch.zeros(4, dtype=torch.int64)))
    with pytest.raises(DataError, match="two classes"):
        fit_method(FedMP(BACKBONE, NAMES[:1]), single)


def test_bad_images_and_labels():
    labels = torch.arange(4).repeat(4)
    for values, wrong, says in (
        (torch.full((1, 16, DIM), float("nan")), labels, "aren't finite"),
        (torch.randn(1, 16, DIM), labels + 1, "labels from 0 to 3"),
        (torch.randn(1, 0, DIM), labels[:0], "needs training images"),
    ):
        with pytest.raises(DataError, match=says):
            fit_method(FedMP(BACKBONE, NAMES), FitTask(NAMES, TensorInputs(values, wrong)))
    far = FedMP(BACKBONE, NAMES, config=FedMPConfig(client_lr=1e30, rounds=1, local_epochs=9))
    before = far.attention.up.weight.clone()
    with pytest.raises(TrainingError, match="lower client_lr"):
        fit_method(far, FitTask(NAMES, TensorInputs(torch.randn(1, 16, DIM), labels)))
    assert torch.equal(far.attention.up.weight, before)


def test_bad_settings():
    with pytest.raises(ConfigError, match=r"num_clients is 0.*holdout is 1.0.*memory_batch is 0"):
        FedMPConfig(num_clients=0, holdout=1.0, memory_batch=0)
    with pytest.raises(ConfigError, match="entropy_share is nan"):
        FedMPConfig(entropy_share=float("nan"))
    with pytest.raises(ConfigError, match="client_batch is 1, but must be at least 2"):
        FedMPConfig(client_batch=1)
