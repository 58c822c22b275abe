"""UNEM: EM-Dirichlet with injected constants, gradients, tasks that never use an image twice, and its training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import AdapterError, ConfigError, DataError, TrainingError
from adaptkit.methods.transductive import unem as unem_module
from adaptkit.methods.transductive._dirichlet import implicit_maximum, maximise
from adaptkit.methods.transductive._transduction import Support
from adaptkit.methods.transductive.em_dirichlet import EMDirichlet, EMDirichletConfig
from adaptkit.methods.transductive.unem import UNEM, Tasks, UNEMConfig, inverse_softplus
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs
from tests.methods.tiny import DIM, NAMES, NOVEL, make_task, query, tiny_clip

BACKBONE = tiny_clip()
TWELVE = tuple(f"class {index}" for index in range(12))
QUICK = {"epochs": 2, "tasks": 4, "tasks_per_step": 2, "layers": 3, "task_images": 10}


def drawn(seed=0, classes=12, images=40, shots=2, spread=0.25):
    numbers = torch.Generator().manual_seed(seed)
    text = F.normalize(torch.randn(classes, DIM, generator=numbers), dim=-1)
    labels = torch.arange(images) % classes
    f = F.normalize(text[labels] + spread * torch.randn(images, DIM, generator=numbers), dim=-1)
    shot_labels = torch.arange(classes).repeat_interleave(shots)
    support = F.normalize(text[shot_labels] + spread * torch.randn(len(shot_labels), DIM, generator=numbers), dim=-1)
    return f, text, labels, Support(support, shot_labels)


def toy_tasks(classes=3, count=2, images=8, shots=3, seed=0, support=True):
    numbers = torch.Generator().manual_seed(seed)

    def cosines(rows):
        return 0.3 * torch.randn(count, rows, classes, generator=numbers, dtype=torch.float64)

    labels = torch.randint(classes, (count, images), generator=numbers)
    shot_labels = torch.arange(classes).repeat_interleave(shots).expand(count, -1)
    query_, shots_ = cosines(images), cosines(classes * shots)
    query_ = query_ + 0.2 * F.one_hot(labels, classes)
    shots_ = shots_ + 0.2 * F.one_hot(shot_labels, classes)
    return Tasks(query_, labels, shots_, shot_labels) if support else Tasks(query_, labels)


def toy(classes=3, **settings):
    made = UNEM(BACKBONE, [f"class {i}" for i in range(classes)], config=UNEMConfig(**{"layers": 3, **settings}))
    made._set(1.0, 1.0)
    return made


# --- the forward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_support", [True, False])
def test_with_injected_constants_it_is_em_dirichlet(use_support):
    f, text, _, support = drawn()
    labelled = support if use_support else None
    unem = UNEM(BACKBONE, TWELVE, config=UNEMConfig(layers=10))  # as made: e = 30, weight floor(12 / 5), temperature 1
    assert [layer.balance for layer in unem.layers_for(12)] == pytest.approx([2.0] * 10)
    assert [layer.temperature for layer in unem.layers_for(12)] == [1.0] * 10
    em = EMDirichlet(BACKBONE, TWELVE, config=EMDirichletConfig(iterations=10))
    torch.testing.assert_close(unem.assign(f, text, labelled), em.assign(f, text, labelled), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("support", [False, True])
def test_training_and_answering_agree(shared, support):
    f, text, labels, shots = drawn()
    method = UNEM(BACKBONE, TWELVE, config=UNEMConfig(layers=4, shared=shared, matching="none"))
    with torch.no_grad():
        method.class_weights.copy_(torch.linspace(0.5, 2, len(method.class_weights)))
        method.temperatures.copy_(torch.linspace(-1, 1, len(method.temperatures)))
        method.feature_temperature.fill_(22.0)
        tasks = Tasks((f.double() @ text.double().T)[None], labels[None])
        if support:
            cosines = (shots.features.double() @ text.double().T)[None]
            tasks = Tasks(tasks.query, tasks.labels, cosines, shots.labels[None])
        trained = method.unrolled(tasks)[0].float()
    answered = method.assign(f, text, shots if support else None)
    torch.testing.assert_close(trained, answered, rtol=1e-4, atol=1e-4)


def test_class_weights_scale_with_the_number_of_classes():
    method = UNEM(BACKBONE, TWELVE)
    assert method.layers_for(24)[0].balance == pytest.approx(2 * method.layers_for(12)[0].balance)


@pytest.mark.parametrize("value", [0.01, 0.5, 2.0, 30.0])
def test_inverse_softplus(value):
    assert float(F.softplus(torch.tensor(inverse_softplus(value)))) == pytest.approx(value, rel=1e-5)
    assert float(F.softplus(torch.tensor(inverse_softplus(0.0)))) < 1e-15


# --- gradients --------------------------------------------------------------------------------------------------------


def test_the_fixed_points_gradient():
    numbers = torch.Generator().manual_seed(0)
    z = torch.softmax(2 * torch.randn(3, 20, 4, generator=numbers, dtype=torch.float64), dim=-1)
    y = z.log().mean(dim=1).requires_grad_()
    start = torch.ones(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda target: implicit_maximum(start, target), (y,), atol=1e-5)
    weight = torch.randn(3, 4, generator=numbers, dtype=torch.float64)
    (implicit,) = torch.autograd.grad((implicit_maximum(start, y) * weight).sum(), y)
    (unrolled,) = torch.autograd.grad((maximise(start, y) * weight).sum(), y)
    torch.testing.assert_close(implicit, unrolled, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("loss", ["nll", "double-softmax"])
@pytest.mark.parametrize("support", [True, False])
def test_gradients_of_a_toy_against_differences(loss, support):
    """Three classes: every parameter, by central differences."""
    method, tasks = toy(loss=loss).double(), toy_tasks(support=support)
    with torch.no_grad():
        method.feature_temperature.fill_(8.0)
    method.task_loss(tasks).backward()
    checked = 0
    for parameter in method.parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for index in range(len(flat)):
            kept, values = flat[index].item(), []
            for change in (1e-4, -1e-4):
                flat[index] = kept + change
                with torch.no_grad():
                    values.append(float(method.task_loss(tasks)))
            flat[index] = kept
            assert float(gradient[index]) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-3, abs=1e-7)
            checked += 1
    assert checked == 7


@pytest.mark.parametrize("steps", [0, 60])
def test_unrolled_gradients_are_near_the_implicit_ones(steps):
    tasks, found = toy_tasks(), []
    for settings in ({}, {"differentiation": "unrolled", "unrolled_steps": steps}):
        method = toy(**settings)
        with torch.no_grad():
            method.feature_temperature.fill_(8.0)
        method.task_loss(tasks).backward()
        found.append(torch.cat([p.grad.view(-1) for p in method.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=5e-2, atol=1e-4)


def test_the_published_loss_takes_softmax_twice():
    tasks = toy_tasks()
    u = toy().unrolled(tasks).exp().flatten(0, 1)
    labels = tasks.labels.flatten()
    torch.testing.assert_close(toy(loss="double-softmax").task_loss(tasks), F.cross_entropy(u, labels))
    torch.testing.assert_close(toy().task_loss(tasks), -u[torch.arange(len(u)), labels].log().mean())


def test_parts_of_a_step_give_the_same_gradients(monkeypatch):
    tasks, found = toy_tasks(count=5), []
    for limit in (1e9, 1.0):
        monkeypatch.setattr(unem_module, "_TRAIN_BYTES", limit)
        method = toy()
        parts = list(method._parts(torch.arange(5)))
        loss = sum(method._backward(tasks.part(part), len(part) / 5) for part in parts)
        found.append((len(parts), loss, torch.cat([p.grad.view(-1) for p in method.parameters()])))
    assert [count for count, _, _ in found] == [1, 5]
    assert found[0][1] == pytest.approx(found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-8)


# --- tasks ------------------------------------------------------------------------------------------------------------


def val_task(counts=(3, 3, 3, 3), shots=2):
    numbers = torch.Generator().manual_seed(3)

    def inputs(per_class):
        labels = torch.cat([torch.full((count,), index) for index, count in enumerate(per_class)])
        return TensorInputs(torch.randn(1, len(labels), DIM, generator=numbers), labels)

    return FitTask(NAMES, inputs([shots] * 4), inputs(counts), seed=5)


def rows_of(cosines, everything):
    """Which rows of `everything` the cosines are."""
    return [int((everything - row).abs().sum(dim=1).argmin()) for row in cosines]


def made(task, **settings):
    method = UNEM(BACKBONE, NAMES, config=UNEMConfig(**{**QUICK, "learn": False, **settings}))
    fit_method(method, task)
    return method


def test_tasks_hold_the_classes_and_images_asked_for():
    task = val_task()
    method = made(task, effective_classes=2, tasks=20)
    tasks = method.draw_tasks(task)
    assert tasks.query.shape == (20, 6, 4)
    assert {len(set(labels.tolist())) for labels in tasks.labels} == {2}
    assert {label for labels in tasks.labels for label in labels.tolist()} == {0, 1, 2, 3}
    everything = F.normalize(task.val.values[0], dim=-1).double() @ method.zero_shot().double().T
    for cosines, labels in zip(tasks.query, tasks.labels, strict=True):
        rows = rows_of(cosines, everything)
        assert len(set(rows)) == 6
        assert torch.equal(task.val.labels[rows], labels)
    assert torch.equal(tasks.support_labels[0], task.train.labels)  # the shots, as at test time
    again = method.draw_tasks(task)
    assert torch.equal(again.query, tasks.query)


def test_support_from_validation_never_shares_an_image_with_the_queries():
    task = val_task((4, 3, 2, 1))
    method = made(task, effective_classes=4, support_from="validation", task_shots=2)
    tasks = method.draw_tasks(task)
    everything = F.normalize(task.val.values[0], dim=-1).double() @ method.zero_shot().double().T
    assert tasks.support_labels[0].bincount(minlength=4).tolist() == [2, 2, 1, 0]
    for support, cosines in zip(tasks.support, tasks.query, strict=True):
        assert not set(rows_of(support, everything)) & set(rows_of(cosines, everything))


def test_tasks_without_support():
    task = val_task()
    assert made(task, use_support=False).draw_tasks(task).support is None


@pytest.mark.parametrize("counts", [(3, 0, 0, 0), None])
def test_too_few_validation_images_leave_em_dirichlet(counts):
    task = val_task() if counts is None else val_task(counts)
    task = FitTask(task.class_names, task.train, None) if counts is None else task
    method = UNEM(BACKBONE, NAMES, config=UNEMConfig(**QUICK))
    report = fit_method(method, task)
    assert not report["searched"]
    assert "validation images" in report["why_not_searched"]
    assert [layer.temperature for layer in method.layers_for(4)] == [1.0] * 3


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_support", [True, False])
def test_training_lowers_the_loss_and_is_reported(use_support):
    settings = {**QUICK, "epochs": 8, "effective_classes": 2, "use_support": use_support}
    method = UNEM(BACKBONE, NAMES, config=UNEMConfig(**settings))
    report = fit_method(method, make_task(BACKBONE, "image_features"))
    assert report["searched"]
    assert report["val_labels_train_parameters"]
    assert report["val_images"] == 16
    assert len(report["losses"]) == 8
    assert report["losses"][-1] < report["losses"][0]
    assert report["class_weights"] == pytest.approx([layer.balance for layer in method.layers_for(4)])
    assert report["temperatures"] == pytest.approx([layer.temperature for layer in method.layers_for(4)])
    assert method(query(BACKBONE, "image_features")).shape == (9, 4)
    assert method.set_classes(NOVEL)(query(BACKBONE, "image_features")).shape == (9, 3)


def test_parameters_stay_finite_after_eighty_epochs_of_the_published_settings():
    method = toy(loss="double-softmax", lr=0.5, epochs=80, tasks_per_step=2)
    losses = method.train_on(toy_tasks(images=6, shots=2), seed=0)
    assert len(losses) == 80
    assert all(torch.isfinite(parameter).all() for parameter in method.parameters())
    assert losses[-1] < losses[0]


def test_a_loss_that_is_not_finite_is_an_error():
    tasks = toy_tasks()
    tasks.query[0, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match="lower lr"):
        toy(epochs=1).train_on(tasks, seed=0)


def test_what_is_trained():
    assert UNEM(BACKBONE, NAMES).num_trained() == 21
    assert UNEM(BACKBONE, NAMES, config=UNEMConfig(learn_features=False)).num_trained() == 20
    assert UNEM(BACKBONE, NAMES, config=UNEMConfig(shared=True)).num_trained() == 3


# --- reading and bad input --------------------------------------------------------------------------------------------


def test_released_parameters_are_read_by_layer_or_shared():
    released = {"emb_t": torch.tensor(17.7), **{f"{k}.{i}": torch.tensor(float(i)) for k in "t" for i in range(3)}}
    released |= {f"gamma.{index}": torch.tensor(10.0 + index) for index in range(3)}
    method = UNEM(BACKBONE, NAMES, config=UNEMConfig(layers=3))
    method.load_reference_state(released)
    assert float(method.feature_temperature) == pytest.approx(17.7)
    assert method.class_weights.tolist() == [10.0, 11.0, 12.0]
    assert method.temperatures.tolist() == [0.0, 1.0, 2.0]
    shared = UNEM(BACKBONE, NAMES, config=UNEMConfig(shared=True))
    shared.load_reference_state({"emb_t": torch.tensor(1.0), "gamma": torch.tensor(2.0), "t": torch.tensor([3.0])})
    assert shared.class_weights.tolist() == [2.0]
    with pytest.raises(AdapterError, match=r"no 'gamma\.3'"):
        UNEM(BACKBONE, NAMES, config=UNEMConfig(layers=4)).load_reference_state(released)
    with pytest.raises(AdapterError, match="holds 5 values, not 3"):
        method.load_reference_state({**released, "gamma": torch.zeros(5)})


def test_one_class_and_validation_features_that_are_not_finite():
    task = make_task(BACKBONE, "image_features")
    alone = FitTask(NAMES[:1], TensorInputs(task.train.values[:, :4], torch.zeros(4, dtype=torch.int64)))
    with pytest.raises(DataError, match="at least 2"):
        fit_method(UNEM(BACKBONE, NAMES[:1]), alone)
    task.val.values[0, 3] = float("nan")
    with pytest.raises(DataError, match="Validation image 3 "):
        fit_method(UNEM(BACKBONE, NAMES, config=UNEMConfig(**QUICK)), task)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layers": 0, "lr": -1.0}, "layers is 0.*lr is"),
        ({"loss": "mse"}, "nll, double-softmax"),
        ({"differentiation": "none"}, "implicit, unrolled"),
        ({"support_from": "test"}, "train, validation"),
        ({"unrolled_steps": -1}, "unrolled_steps is -1"),
    ],
)
def test_settings_that_cannot_be_used(settings, says):
    with pytest.raises(ConfigError, match=says):
        UNEMConfig(**settings)


# --- the Gaussian version ---------------------------------------------------------------------------------------------


def plain_gaussian(f, text, support, layers, factor):
    """The sheet's steps, class by class and image by image, in float64; support is unit features with labels."""
    f, text = f.double(), text.double()
    u = torch.softmax(float(BACKBONE.logit_scale) * f @ text.T, dim=1)
    for weight, temperature in layers:
        centres, v = [], []
        for k in range(len(text)):
            shots = support.features[support.labels == k].double()
            centres.append((shots.sum(dim=0) + (u[:, k, None] * f).sum(dim=0)) / (len(shots) + u[:, k].sum()))
            v.append(torch.log(u[:, k].mean() + 1e-15) + 1)
        far = torch.stack([(factor * f - factor * centre).square().sum(dim=1) for centre in centres], dim=1)
        u = torch.softmax((-0.5 * far + weight * torch.stack(v)) / temperature, dim=1)
    return u


def gaussian(**settings):
    method = UNEM(BACKBONE, TWELVE, config=UNEMConfig(**{"likelihood": "gaussian", "layers": 4, **settings}))
    with torch.no_grad():
        method.class_weights.copy_(torch.linspace(0.5, 2, len(method.class_weights)))
        method.temperatures.copy_(torch.linspace(-1, 1, len(method.temperatures)))
        method.feature_temperature.fill_(4.0)
    return method


def test_gaussian_assignments_equal_the_plain_version(monkeypatch):
    f, text, labels, shots = drawn()
    method = gaussian()
    layers = [(layer.balance, layer.temperature) for layer in method.layers_for(12)]
    wanted = plain_gaussian(f, text, shots, layers, float(F.softplus(torch.tensor(4.0))))
    whole = method.assign(f, text, shots)
    torch.testing.assert_close(whole.double().exp(), wanted, rtol=1e-4, atol=1e-5)
    assert (whole.argmax(dim=1) == labels).float().mean() > 0.8
    with torch.no_grad():  # as training sees it
        tasks = Tasks(f.double()[None], labels[None], shots.features.double()[None], shots.labels[None])
        monkeypatch.setattr(method, "zero_shot", lambda: text)
        torch.testing.assert_close(method.unrolled(tasks)[0].float(), whole, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(UNEM, "chunks", staticmethod(lambda f, columns: torch.split(f, 7)))
    torch.testing.assert_close(method.assign(f, text, shots), whole, rtol=1e-4, atol=1e-4)


def test_the_gaussian_versions_gradient():
    numbers = torch.Generator().manual_seed(1)
    method = toy(likelihood="gaussian")

    def features(rows):
        return F.normalize(torch.randn(2, rows, DIM, generator=numbers, dtype=torch.float64), dim=-1)

    labels = torch.randint(3, (2, 6), generator=numbers)
    tasks = Tasks(features(6), labels, features(6), torch.arange(3).repeat(2).expand(2, -1))
    method.double()
    trained = [method.feature_temperature, method.class_weights, method.temperatures]

    def loss(*values):
        with torch.no_grad():
            for parameter, value in zip(trained, values, strict=True):
                parameter.copy_(value)
        return method.task_loss(tasks)

    grads = torch.autograd.grad(method.task_loss(tasks), trained)
    start, checked = [parameter.detach().clone() for parameter in trained], 0
    for place, grad in enumerate(grads):
        for index in range(start[place].numel()):
            moved = []
            for sign in (1, -1):
                values = [value.clone() for value in start]
                values[place].view(-1)[index] += sign * 1e-5
                moved.append(float(loss(*values)))
            assert (moved[0] - moved[1]) / 2e-5 == pytest.approx(float(grad.view(-1)[index]), rel=1e-4, abs=1e-8)
            checked += 1
    assert checked == 7


@pytest.mark.parametrize("support_from", ["train", "validation"])
def test_the_gaussian_version_trains(support_from):
    config = UNEMConfig(**QUICK, likelihood="gaussian", support_from=support_from, effective_classes=0)
    method = UNEM(BACKBONE, NAMES, config=config)
    report = fit_method(method, make_task(BACKBONE, "image_features"))
    assert report["searched"]
    assert torch.isfinite(torch.tensor(report["losses"])).all()
    inputs = query(BACKBONE, "image_features")
    for names in (NAMES, NAMES[:2], NOVEL, (NAMES[0], NOVEL[0])):  # classes without shots start from their names
        scores = method.set_classes(names)(inputs)
        assert scores.shape == (len(inputs), len(names))
        assert torch.isfinite(scores).all()


def test_the_gaussian_version_needs_shots():
    with pytest.raises(ConfigError, match="use_support is False, but must be true with likelihood gaussian"):
        UNEMConfig(likelihood="gaussian", use_support=False)
    with pytest.raises(ConfigError, match="one of dirichlet, gaussian"):
        UNEMConfig(likelihood="normal")
