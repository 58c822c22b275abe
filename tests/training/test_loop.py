"""The gradient loop: batches, views, one optimiser step by hand, precision, interruption, and its refusals."""

from __future__ import annotations

import collections
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import ConfigError, DataError, TrainingError
from adaptkit.methods.adapters.clip_adapter import CLIPAdapter
from adaptkit.methods.base import GradientMethod, ParameterGroup
from adaptkit.methods.prompts.coop import CoOp, CoOpConfig
from adaptkit.methods.prompts.maple import MaPLe, MaPLeConfig
from adaptkit.training.loop import GradientLoop, epoch_batches, epoch_views, fit_method, select_views
from adaptkit.training.seeding import generator
from adaptkit.types import FitTask, TensorInputs, TrainingSettings
from tests.methods.tiny import NAMES, make_task, tiny_clip

QUICK = TrainingSettings(epochs=3, batch_size=8)


@pytest.fixture(scope="module")
def backbone():
    return tiny_clip()


@pytest.fixture
def adapter(backbone):
    return CLIPAdapter(backbone, NAMES)


@pytest.fixture(scope="module")
def task(backbone):
    return make_task(backbone, "image_features")


# --- batches and views ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [(10, 32, [10]), (80, 32, [32, 32]), (64, 32, [32, 32]), (5, 1, [1] * 5), (33, 32, [32])],
)
def test_short_batch_only_where_there_is_no_full_one(count, size, sizes):
    batches = epoch_batches(count, size, generator(0, "x"))
    assert [len(batch) for batch in batches] == sizes
    seen = torch.cat(batches).tolist()
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(count))


def numbered(views: int, count: int) -> TensorInputs:
    """Inputs whose single value is 100 · view + index."""
    values = 100.0 * torch.arange(views)[:, None] + torch.arange(count)
    return TensorInputs(values[..., None], torch.zeros(count, dtype=torch.int64))


def test_augmented_views_are_drawn_per_image_and_never_the_plain_one():
    inputs = numbered(4, 200)
    views = epoch_views(inputs, 0, False, generator(0, "v"))
    assert set(views.tolist()) == {1, 2, 3}
    again = epoch_views(inputs, 1, False, generator(1, "v"))
    assert not torch.equal(views, again)
    indices = torch.randperm(200, generator=generator(2, "i"))[:60]
    wanted = 100.0 * views[indices] + indices
    assert torch.equal(select_views(inputs, indices, views[indices])[:, 0], wanted)


def test_plain_view_where_there_is_no_other_and_new_ones_where_they_are_fresh():
    assert set(epoch_views(numbered(1, 5), 3, False, generator(0)).tolist()) == {0}
    assert set(epoch_views(numbered(1, 5), 3, True, generator(0)).tolist()) == {4}


def test_fresh_views_are_asked_for_by_epoch(adapter, task):
    asked = []

    class Fresh(TensorInputs):
        def select(self, indices, view=0):
            asked.append(view)
            return super().select(indices, 0)

    inputs = Fresh(task.train.values, task.train.labels)
    GradientLoop(replace(QUICK, fresh_views=True))(adapter, FitTask(NAMES, inputs))
    assert asked == [1, 1, 2, 2, 3, 3]


# --- what training does -----------------------------------------------------------------------------------------------


def test_sgd_steps_are_those_of_the_formula(backbone, task):
    """Momentum, coupled weight decay and the schedule, written out by hand over three one-batch epochs."""
    settings = TrainingSettings(epochs=3, batch_size=16, lr=0.1)
    method, plain = CLIPAdapter(backbone, NAMES), CLIPAdapter(backbone, NAMES)
    report = GradientLoop(settings)(method, task)
    weights = dict(plain.named_parameters())
    buffers = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for rate in (1e-5, 0.1, 0.1 * 0.75):  # cos(pi / 3) = 1/2
        loss = F.cross_entropy(plain(task.train.values[0]), task.train.labels)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            buffers[name] = 0.9 * buffers[name] + gradient + 5e-4 * weight.detach()
            weight.data -= rate * buffers[name]
    for name, weight in method.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-6)
    assert report["learning_rates"] == pytest.approx([1e-5, 0.1, 0.075])


def test_report_and_progress(adapter, task):
    shown = []
    report = GradientLoop(QUICK, lambda *said: shown.append(said))(adapter, task)
    assert report["epochs"] == 3
    assert report["steps"] == 6
    assert report["interrupted"] is False
    assert report["trained_parameters"] == adapter.num_trained() == 16 * 16 // 2
    assert len(report["losses"]) == len(report["accuracies"]) == len(report["learning_rates"]) == 3
    assert all(0 <= accuracy <= 1 for accuracy in report["accuracies"])
    assert shown[-1][1:] == (6, 6)
    assert shown[-1][0].startswith("clip-adapter epoch 3/3: loss ")
    assert "accuracy" in shown[-1][0]
    assert not adapter.training
    assert all(parameter.grad is None for parameter in adapter.parameters())


def test_it_learns(backbone):
    method = CoOp(backbone, NAMES, config=CoOpConfig(num_context=4))
    task = make_task(backbone, "image_features")
    report = GradientLoop(TrainingSettings(epochs=40, batch_size=16, lr=0.05))(method, task)
    assert report["losses"][-1] < 0.85 * report["losses"][0]


@pytest.mark.parametrize("seed", [0, 3])
def test_the_seed_decides_everything(backbone, seed):
    def trained(of):
        task = make_task(backbone, "image_features", views=3, seed=of)
        method = CLIPAdapter(backbone, NAMES)
        GradientLoop(replace(QUICK, lr=0.1))(method, task)
        return method.down.weight

    torch.manual_seed(seed + 100)  # the global generator has no say
    first = trained(seed)
    torch.rand(5)
    assert torch.equal(first, trained(seed))
    assert not torch.equal(first, trained(seed + 1))


def test_dropout_is_seeded_and_the_global_generator_untouched(backbone, task):
    class Dropping(CLIPAdapter):
        def losses(self, inputs, labels):
            return {"loss": F.cross_entropy(self(F.dropout(inputs, 0.5, self.training)), labels)}

    def trained():
        method = Dropping(backbone, NAMES)
        GradientLoop(QUICK)(method, task)
        return method.down.weight

    before = torch.random.get_rng_state()
    first = trained()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(first, trained())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", [CLIPAdapter, CoOp, MaPLe])
def test_autocast_keeps_fp32_weights_and_stays_near(backbone, kind, precision):
    config = {CLIPAdapter: None, CoOp: CoOpConfig(num_context=2), MaPLe: MaPLeConfig(depth=2)}[kind]
    settings = TrainingSettings(epochs=2, batch_size=8)
    losses = {}
    for mode in ("fp32", precision):
        method = kind(backbone, NAMES, config=config)
        task = make_task(backbone, method.reads)
        losses[mode] = GradientLoop(replace(settings, precision=mode))(method, task)["losses"]
        assert all(parameter.dtype == torch.float32 for parameter in method.parameters())
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.05)


def test_terms_are_summed_and_reported(backbone, task):
    class TwoTerms(CLIPAdapter):
        def losses(self, inputs, labels):
            return {**super().losses(inputs, labels), "extra": inputs.new_tensor(2.0)}

    epochs = []
    loop = GradientLoop(on_epoch=lambda *told: epochs.append(told)).with_settings(QUICK)
    report = loop(TwoTerms(backbone, NAMES), task)
    assert report["loss_terms"]["extra"] == pytest.approx(2.0)
    assert report["losses"][-1] == pytest.approx(sum(report["loss_terms"].values()))
    assert [name for name, _ in epochs] == ["clip-adapter"] * 3
    for told, report_name in (("loss", "losses"), ("accuracy", "accuracies"), ("learning_rate", "learning_rates")):
        assert [numbers[told] for _, numbers in epochs] == report[report_name]
    last = epochs[-1][1]
    assert {key[5:]: value for key, value in last.items() if key.startswith("loss/")} == report["loss_terms"]


# --- stopping and refusing --------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_there_is(adapter, task):
    before = adapter.down.weight.detach().clone()

    def press(what, done, total):
        if done == 4:
            raise KeyboardInterrupt

    report = GradientLoop(replace(QUICK, epochs=9), press)(adapter, task)
    assert report["interrupted"] is True
    assert report["epochs"] == 1  # the second one wasn't finished
    assert report["steps"] == 4
    assert not torch.equal(before, adapter.down.weight)
    assert not adapter.training


def test_ctrl_c_through_fit(backbone, task):
    def press(what, done, total):
        raise KeyboardInterrupt

    method = CLIPAdapter(backbone, NAMES)
    report = fit_method(method, task, QUICK, press)
    assert report["interrupted"] is True
    assert "ratio" in report


def test_a_loss_that_is_not_finite_stops(backbone, task):
    class Breaking(CLIPAdapter):
        def losses(self, inputs, labels):
            (loss,) = super().losses(inputs, labels).values()
            self.calls = getattr(self, "calls", 0) + 1
            return {"loss": loss * float("nan") if self.calls == 4 else loss}

    method = Breaking(backbone, NAMES)
    with pytest.raises(TrainingError, match=r"became nan in epoch 2, step 4, at learning rate 0.002: try a lower lr"):
        GradientLoop(QUICK)(method, task)
    assert all(torch.isfinite(parameter).all() for parameter in method.parameters())
    assert not method.training


def test_touching_the_backbone_is_found(backbone, task):
    class Touching(CLIPAdapter):
        def losses(self, inputs, labels):
            with torch.no_grad():
                self.backbone.image.ln_post.weight.mul_(1.0)
            return super().losses(inputs, labels)

    with pytest.raises(TrainingError, match=r"touched the frozen backbone \(image.ln_post.weight\)"):
        GradientLoop(QUICK)(Touching(backbone, NAMES), task)


def test_unfreezing_the_backbone_is_found(task):
    class Unfreezing(CLIPAdapter):
        def prepare(self, task):
            self.backbone.image.ln_post.weight.requires_grad_(True)

    with pytest.raises(TrainingError, match="touched the frozen backbone"):
        Unfreezing(tiny_clip(), NAMES).fit(task, GradientLoop(QUICK))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 0}, "batch_size is 0, but must be at least 1"),
        ({"lr": 0.0}, "lr is 0.0, but must be a positive number"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"epochs": -1, "momentum": 1.0}, "epochs is -1.*momentum is 1.0"),
        ({"precision": "fp8"}, "precision is 'fp8', but must be fp32, bf16 or fp16"),
        ({"optimiser": "lion"}, "optimiser is 'lion'"),
    ],
)
def test_settings_out_of_range(changes, said):
    with pytest.raises(ConfigError, match=said):
        GradientLoop(replace(QUICK, **changes))


def test_bad_tasks(adapter, task):
    empty = TensorInputs(torch.zeros(1, 0, 16), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(DataError, match="no training images"):
        fit_method(adapter, FitTask(NAMES, empty))
    beyond = TensorInputs(task.train.values, task.train.labels + 1)
    with pytest.raises(DataError, match="run from 1 to 4, but 4 class names"):
        fit_method(adapter, FitTask(NAMES, beyond))
    with pytest.raises(DataError, match="other classes than the task's"):
        fit_method(adapter, FitTask(NAMES[:2], task.train))


def test_nothing_to_train_and_no_loop(backbone, task):
    class Empty(GradientMethod):
        name = "empty"

    with pytest.raises(TrainingError, match="empty has nothing to train"):
        fit_method(Empty(backbone, NAMES), task)
    with pytest.raises(ConfigError, match="hand its fit a loop"):
        CLIPAdapter(backbone, NAMES).fit(task)


def test_zero_epochs_change_nothing(adapter, task):
    before = collections.OrderedDict((k, v.clone()) for k, v in adapter.adapter_state().items())
    report = GradientLoop(replace(QUICK, epochs=0))(adapter, task)
    assert report["epochs"] == report["steps"] == 0
    assert all(torch.equal(before[key], value) for key, value in adapter.adapter_state().items())


@pytest.mark.parametrize(("count", "size", "sizes"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 4, [3])])
def test_the_last_batch_is_kept_on_request(count, size, sizes):
    batches = epoch_batches(count, size, generator(0, "x"), keep_last=True)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(torch.cat(batches).tolist()) == list(range(count))


class Grouped(CLIPAdapter):
    """Both layers with rates of their own, the second without decay; a third is left alone."""

    def parameter_groups(self):
        return (
            ParameterGroup((self.down.weight,)),
            ParameterGroup((self.up.weight,), lr=0.3, weight_decay=0.0, betas=(0.5, 0.7)),
        )


@pytest.mark.parametrize("optimiser", ["sgd", "adam", "adamw"])
def test_groups_have_rates_decay_and_betas_of_their_own(backbone, task, optimiser):
    """Two steps against torch's own optimisers, one for each group."""
    settings = replace(
        QUICK,
        epochs=2,
        batch_size=16,
        optimiser=optimiser,
        lr=0.1,
        weight_decay=0.4,
        schedule="cosine-epoch",
        warmup_epochs=0,
        eps=1e-6,
    )
    method, plain = Grouped(backbone, NAMES), Grouped(backbone, NAMES)
    report = GradientLoop(settings)(method, task)
    assert report["trained_parameters"] == method.num_trained()
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimiser]
    own = {"momentum": 0.9} if optimiser == "sgd" else {"eps": 1e-6}
    betas = {} if optimiser == "sgd" else {"betas": (0.5, 0.7)}
    optimisers = [
        kind([plain.down.weight], lr=0.1, weight_decay=0.4, **own),
        kind([plain.up.weight], lr=0.3, weight_decay=0.0, **own, **betas),
    ]
    for rate in (1.0, 0.5):
        loss = F.cross_entropy(plain(task.train.values[0]), task.train.labels)
        gradients = torch.autograd.grad(loss, [plain.down.weight, plain.up.weight])
        for one, base, parameter, gradient in zip(
            optimisers, (0.1, 0.3), (plain.down.weight, plain.up.weight), gradients, strict=True
        ):
            parameter.grad = gradient
            one.param_groups[0]["lr"] = rate * base
            one.step()
    torch.testing.assert_close(method.down.weight, plain.down.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.up.weight, plain.up.weight, rtol=1e-4, atol=1e-5)
    assert report["learning_rates"] == pytest.approx([0.1, 0.05])


def test_no_groups_are_nothing_to_train(backbone, task):
    class Empty(CLIPAdapter):
        def parameter_groups(self):
            return ()

    with pytest.raises(TrainingError, match="nothing to train"):
        GradientLoop(QUICK)(Empty(backbone, NAMES), task)
