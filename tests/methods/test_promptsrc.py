"""PromptSRC against a plain computation of its sheet: losses, anchors, averages over epochs, and the rounded towers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import AdapterError, ConfigError, DataError
from adaptkit.methods.adapter import AdaptedModel, load_adapter, save_adapter
from adaptkit.methods.prompts.ivlp import IVLP, IVLPConfig
from adaptkit.methods.prompts.promptsrc import (
    TEACHER_TEMPLATES,
    PromptSRC,
    PromptSRCConfig,
    RunningMean,
    gaussian_weights,
    weighted_sum,
)
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TrainingSettings
from tests.methods.deep import assert_same_gradients, plain_image, plain_text, siglip_like
from tests.methods.tiny import NAMES, NOVEL, make_task, query, tiny_clip

BACKBONE = tiny_clip()
BACKBONES = {"clip": BACKBONE, "siglip": siglip_like()}
SIZES = {"num_text_context": 2, "num_image_context": 3, "text_depth": 3, "image_depth": 2}
SETTINGS = TrainingSettings(epochs=4, batch_size=8, lr=2e-2)


def config(**settings):
    return PromptSRCConfig(**{**SIZES, **settings})


def plain_anchors(backbone, names):
    features = []
    for name in names:
        texts = [template.format(name.replace("_", " ")) for template in TEACHER_TEMPLATES]
        features.append(backbone.encode_text(backbone.tokenize(texts)).mean(dim=0))
    return F.normalize(torch.stack(features), dim=-1)


def plain_terms(method, pixels, labels):
    backbone = method.backbone
    w = plain_text(backbone, NAMES, "a photo of a", list(method.text_prompts))
    f = plain_image(backbone, pixels, list(method.image_prompts))
    u, g = plain_anchors(backbone, NAMES), F.normalize(backbone.encode_image(pixels), dim=-1)
    z = backbone.logit_scale * f @ w.T + backbone.logit_bias
    q = backbone.logit_scale * g @ u.T + backbone.logit_bias
    p, s = q.softmax(dim=-1), z.softmax(dim=-1)
    return {
        "cross_entropy": F.cross_entropy(z, labels),
        "text_consistency": 25 * (w - u).abs().mean(),
        "image_consistency": 10 * (f - g).abs().mean(),
        "logit_consistency": (p * (p / s).log()).sum() / z.numel(),
    }


@pytest.mark.parametrize("kind", sorted(BACKBONES))
def test_losses_equal_the_plain_way(kind):
    method = PromptSRC(BACKBONES[kind], NAMES, config=config(), seed=3)
    pixels, labels = query(BACKBONE, "images"), torch.arange(9) % 4
    terms, wanted = method.losses(pixels, labels), plain_terms(method, pixels, labels)
    assert list(terms) == list(wanted)
    for name, term in terms.items():
        torch.testing.assert_close(term, wanted[name], rtol=1e-4, atol=1e-6)
    assert_same_gradients(sum(terms.values()), sum(wanted.values()), method.parameters())


def test_predictions_are_those_of_independent_prompts():
    ours = PromptSRC(BACKBONE, NAMES, config=config(), seed=4)
    plain = IVLP(BACKBONE, NAMES, config=IVLPConfig(**SIZES), seed=4)
    pixels = query(BACKBONE, "images")
    for names in (NAMES, NOVEL):
        assert torch.equal(ours.set_classes(names)(pixels), plain.set_classes(names)(pixels))
    assert ours._anchor_memo is None  # predicting needs no anchors


# --- what is computed how often ---------------------------------------------------------------------------------------


def counting_backbone():
    """A tiny CLIP that notes how many texts and images its frozen encoders see."""
    backbone = tiny_clip()
    seen = {"texts": 0, "images": 0, "tower": 0}

    class Counting(type(backbone)):
        def encode_text(self, tokens):
            seen["texts"] += len(tokens.ids)
            return super().encode_text(tokens)

        def encode_image(self, pixels):
            seen["images"] += len(pixels)
            return super().encode_image(pixels)

    backbone.__class__ = Counting
    backbone.image.register_forward_pre_hook(lambda *_: seen.update(tower=seen["tower"] + 1))
    return backbone, seen


def test_anchors_once_a_fit_and_frozen_features_from_the_store():
    backbone, seen = counting_backbone()
    task = make_task(backbone, "images", val=False)
    frozen = make_task(BACKBONE, "image_features").train
    given = PromptSRC(backbone, NAMES, config=config())
    report = fit_method(given, FitTask(NAMES, task.train, None, 0, frozen), SETTINGS)
    assert report["steps"] == 8
    assert seen == {"texts": 60 * len(NAMES), "images": 0, "tower": 8}  # the prompted branch alone
    computed = PromptSRC(backbone, NAMES, config=config())
    fit_method(computed, task, SETTINGS)
    assert seen["images"] == 4 * len(task.train.labels)
    for ours, theirs in zip(given.parameters(), computed.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_anchors_made_under_autocast_are_exact():
    pixels, labels = query(BACKBONE, "images"), torch.arange(9) % 4
    method = PromptSRC(BACKBONE, NAMES, config=config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        method.losses(pixels, labels)
    torch.testing.assert_close(method.text_anchors(), plain_anchors(BACKBONE, NAMES), rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        method.set_classes(NOVEL).text_anchors()
    assert not method.text_anchors().is_inference()
    torch.testing.assert_close(method.text_anchors(), plain_anchors(BACKBONE, NOVEL), rtol=1e-5, atol=1e-6)


def test_templates():
    assert len(TEACHER_TEMPLATES) == len(set(TEACHER_TEMPLATES)) == 60
    assert TEACHER_TEMPLATES[0] == "a photo of a {}."
    assert all(template.count("{}") == 1 for template in TEACHER_TEMPLATES)


def test_a_name_too_long_for_a_template():
    name = "very " * 67 + "bird"  # fits beside the context, not behind the longest template
    method = PromptSRC(BACKBONE, ["cat", name], config=config())
    with pytest.raises(DataError, match=r"Class name '(very )+bird' doesn't fit into PromptSRC's template"):
        method.text_anchors()


# --- averaging --------------------------------------------------------------------------------------------------------


def test_gaussian_weights():
    weights = gaussian_weights(20, 15, 1)
    assert weights[12:17] == pytest.approx([0.054, 0.242, 0.399, 0.242, 0.054], abs=5e-4)
    assert sum(weights) == pytest.approx(1)
    assert max(weights[:8]) < 1e-9
    assert gaussian_weights(0, 15, 1) == []
    far = gaussian_weights(3, 1000, 0.5)  # each density is zero in floating point
    assert far == pytest.approx([0, 0, 1])
    whole, part = gaussian_weights(20, 6, 10), gaussian_weights(7, 6, 10)
    assert part == pytest.approx([weight / sum(whole[:7]) for weight in whole[:7]])


def test_the_running_mean_is_the_weighted_mean():
    numbers = torch.Generator().manual_seed(0)
    values = [[torch.randn(3, 2, generator=numbers), torch.randn(4, generator=numbers)] for _ in range(20)]
    for mean, std in ((15.0, 1.0), (30.0, 30.0), (3.0, 0.5), (900.0, 1.0)):
        running = RunningMean()
        for epoch, entry in enumerate(values, start=1):
            running.add(entry, -((epoch - mean) ** 2) / (2 * std**2))
        weights = gaussian_weights(20, mean, std)
        for place in range(2):
            wanted = sum(w * entry[place].double() for w, entry in zip(weights, values, strict=True))
            torch.testing.assert_close(running.values[place].double(), wanted, rtol=1e-5, atol=1e-6)


class Watched(PromptSRC):
    """Keeps each epoch's prompts; stops as by Ctrl-C in the middle of an epoch."""

    stop_in: int | None = None

    def losses(self, inputs, labels, frozen=None):
        if self.stop_in is not None and len(self.seen) == self.stop_in:
            raise KeyboardInterrupt
        return super().losses(inputs, labels, frozen)

    def prepare(self, task):
        super().prepare(task)
        self.seen = []

    def after_epoch(self, epoch, epochs):
        self.seen.append([prompt.detach().clone() for prompt in self.parameters()])
        super().after_epoch(epoch, epochs)


def fitted(stop_in=None, backbone=BACKBONE, **settings):
    method = Watched(backbone, NAMES, config=config(**settings), seed=1)
    method.stop_in = stop_in
    return method, fit_method(method, make_task(BACKBONE, "images", val=False), SETTINGS)


@pytest.mark.parametrize(("averaging", "rounding"), [("prompts", 1e-6), ("reference", 1e-3)])
@pytest.mark.parametrize("stop_in", [None, 3])
def test_averages_over_the_epochs_that_finished(averaging, rounding, stop_in):
    method, report = fitted(stop_in, averaging=averaging, averaging_mean=3.0, averaging_std=1.0)
    done = stop_in or 4
    assert (report["interrupted"], len(method.seen)) == (stop_in is not None, done)
    weights = gaussian_weights(done, 3.0, 1.0)
    assert report["epoch_weights"] == weights
    for place, prompt in enumerate(method.parameters()):
        wanted = sum(w * entry[place] for w, entry in zip(weights, method.seen, strict=True))
        torch.testing.assert_close(prompt.detach(), wanted, rtol=0, atol=rounding)
        assert not torch.equal(prompt, method.seen[-1][place])
    again = Watched(BACKBONE, NAMES, config=method.config, seed=1)  # a second fit starts its average anew
    for _ in range(2):
        again.load_adapter_state({**again.adapter_state(), **untouched_prompts(method)})
        again.stop_in = stop_in
        fit_method(again, make_task(BACKBONE, "images", val=False), SETTINGS)
    for ours, theirs in zip(again.parameters(), method.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def untouched_prompts(method):
    fresh = PromptSRC(BACKBONE, NAMES, config=method.config, seed=1).adapter_state()
    return {key: value for key, value in fresh.items() if key != "epoch_weights"}


def test_no_average():
    method, report = fitted(averaging="none")
    assert report["epoch_weights"] == []
    assert all(torch.equal(a, b) for a, b in zip(method.parameters(), method.seen[-1], strict=True))
    stopped, _ = fitted(0)  # before the first epoch ended there is nothing to average
    assert all(torch.isfinite(prompt).all() for prompt in stopped.parameters())


# --- the reference's average ------------------------------------------------------------------------------------------


def test_weighted_sums_are_rounded_at_every_step():
    value, weights = torch.tensor([0.1234567, 3.7e-7]), [1e-6, 0.4, 0.6 - 1e-6]
    wanted = torch.zeros(2, dtype=torch.float16)
    for weight in weights:
        wanted = (value.half() * weight).half() + wanted
    assert torch.equal(weighted_sum([value] * 3, weights, torch.float16), wanted.float())
    assert not torch.equal(wanted.float(), value)


def test_the_reference_average_rounds_a_copy_of_the_towers(tmp_path):
    pixels, backbone = query(BACKBONE, "images"), tiny_clip()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    ours, _ = fitted(averaging_mean=3.0, averaging_std=1.0)
    method, report = fitted(backbone=backbone, averaging="reference", averaging_mean=3.0, averaging_std=1.0)
    assert method.num_trained() == ours.num_trained()
    with torch.no_grad():
        logits = method(pixels)
        difference = float((logits - ours(pixels)).abs().max())
    assert 1e-5 < difference < 0.1
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    image, text = method.image_tower(), method.text_tower()
    assert image is not backbone.image
    weights, source = method.epoch_weights.tolist(), backbone.image.blocks[1]
    assert weights == pytest.approx(report["epoch_weights"])
    half = weighted_sum([source.fc1.weight] * 4, weights, torch.float16)
    assert torch.equal(image.blocks[1].fc1.weight, half)
    assert not torch.equal(half, source.fc1.weight)
    torch.testing.assert_close(image.blocks[1].ln_1.weight, source.ln_1.weight, rtol=1e-6, atol=0)  # fp32
    assert text.token_embedding.weight is backbone.text.token_embedding.weight
    assert not any(parameter.requires_grad for tower in (image, text) for parameter in tower.parameters())

    plain = IVLP(backbone, NAMES, config=IVLPConfig(**SIZES))  # the same prompts in towers that weren't rounded
    plain.load_adapter_state({key: value for key, value in method.adapter_state().items() if key != "epoch_weights"})
    assert not torch.equal(plain(pixels), logits)

    model = method.adapter_state()
    other = PromptSRC(tiny_clip(), NAMES, config=method.config)
    other.load_adapter_state({key: value.clone() for key, value in model.items()})
    with torch.no_grad():
        assert torch.equal(other(pixels), logits)
    save_adapter(tmp_path / "adapter", AdaptedModel(method))
    loaded = load_adapter(tmp_path / "adapter", tiny_clip())
    with torch.no_grad():
        assert torch.equal(loaded.method(pixels), logits)
        assert torch.equal(loaded.method.set_classes(NOVEL)(pixels), method.set_classes(NOVEL)(pixels))


def test_a_reference_average_without_image_prompts_rounds_the_image_tower_too():
    method, _ = fitted(averaging="reference", num_image_context=0)
    pixels = query(BACKBONE, "images")
    assert not torch.equal(method.encode_image(pixels), BACKBONE.encode_image(pixels))
    torch.testing.assert_close(method.encode_image(pixels), BACKBONE.encode_image(pixels), rtol=0.05, atol=0.01)


def test_training_again_starts_on_exact_towers():
    method, _ = fitted(averaging="reference")
    method.prepare(make_task(BACKBONE, "images"))
    assert method.image_tower() is BACKBONE.image
    assert len(method.epoch_weights) == 0


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(1, 1),
        torch.ones(1, dtype=torch.int64),
        torch.full((100_001,), 1 / 100_001),
        torch.tensor([0.5, 0.4]),
        torch.tensor([2.0, -1.0]),
        torch.tensor([math.nan]),
    ],
)
def test_epoch_weights_of_a_file_are_checked(value):
    method = PromptSRC(BACKBONE, NAMES, config=config(averaging="reference"))
    with pytest.raises(AdapterError, match="epoch_weights"):
        method.load_adapter_state({**method.adapter_state(), "epoch_weights": value})
    assert len(method.epoch_weights) == 0


def test_a_refused_state_changes_no_rounding():
    method, _ = fitted(averaging="reference")
    pixels, own = query(BACKBONE, "images"), method.epoch_weights.clone()
    with torch.no_grad():
        before = method(pixels)
    state = method.adapter_state() | {"epoch_weights": torch.ones(1, dtype=torch.float64)}
    with pytest.raises(AdapterError, match="finite"):
        method.load_adapter_state(state | {"text_prompts.0": torch.full((2, 16), math.nan)})
    assert torch.equal(method.epoch_weights, own)
    with torch.no_grad():
        assert torch.equal(method(pixels), before)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"averaging": "all"}, "averaging 'all' is unknown: choose prompts, reference or none"),
        ({"averaging_std": 0.0}, "averaging_std is 0.0, but must be a number of epochs"),
        ({"averaging_mean": math.inf}, "averaging_mean is inf"),
        ({"text_weight": -1.0}, "text_weight is -1.0, but must be 0 or more"),
        ({"image_weight": math.nan}, "image_weight is nan"),
        ({"text_depth": 0}, "text_depth is 0"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(ConfigError, match=said):
        PromptSRCConfig(**settings)


def test_a_depth_beyond_the_tower():
    with pytest.raises(ConfigError, match="text_depth is 9, but the text tower of 'tiny' has 3 layers"):
        PromptSRC(BACKBONE, NAMES)
