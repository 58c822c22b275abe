"""Every registered method through the same behaviours, on a tiny random CLIP or MLLM. A new method is covered
as it is added.

What a method may do differently it declares: what it reads, what it does with classes it never saw, whether it needs
text; methods that look at all test images together live in the folder "transductive".
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields, replace
from functools import lru_cache

import pytest
import torch

from adaptkit.errors import AdapterError, AdaptKitError, ConfigError, DataError, UnsupportedError
from adaptkit.methods import methods
from adaptkit.methods.base import MethodConfig
from adaptkit.training.loop import fit_method
from adaptkit.types import OtherDataset
from tests.backbones import tiny_mllm
from tests.methods.tiny import DESCRIPTIONS, NAMES, NOVEL, closed_text, image_only, make_task, query, tiny_clip
from tests.quick import short_answers

ALL = tuple(methods)


@lru_cache(maxsize=2)
def backbone_for(mllm):
    """A multimodal language model, or a CLIP of twelve layers, so that every method's default depth fits."""
    return tiny_mllm.load("llava") if mllm else tiny_clip(layers=12)


def suitable(name):
    return backbone_for(methods.get(name).needs_mllm)


@pytest.fixture
def backbone(name):
    return suitable(name)


OTHERS = {
    "image only": lambda name: image_only(),
    "closed text": lambda name: closed_text(),
    "other kind": lambda name: backbone_for(not methods.get(name).needs_mllm),
}


def make(backbone, name, seed=0, names=NAMES):
    kind = methods.get(name)
    config = kind.config_class()
    if hasattr(config, "epochs"):  # it trains in a loop of its own
        config = replace(config, epochs=min(config.epochs, 2))
    if hasattr(config, "examples"):  # as many as fit into the tiny model's context
        config = replace(config, examples=2)
    config = short_answers(config)
    return kind(backbone, names, config=config, seed=seed, descriptions=DESCRIPTIONS)


def fitted(backbone, name, seed=0, **task):
    method = make(backbone, name, seed)
    settings = method.default_training
    if settings is not None:
        epochs = min(settings.epochs or 2, 2)  # where it is 0, steps are counted
        settings = replace(settings, epochs=epochs, batch_size=8, lr=max(settings.lr, 1e-2))
    report = fit_method(method, make_task(backbone, method.reads, views=3, seed=seed, **task), settings)
    return method, report


@pytest.fixture(scope="module", params=ALL)
def case(request):
    """A fitted method with its name and report; put back to its own classes before each use."""
    method, report = fitted(suitable(request.param), request.param)
    return request.param, method, report


@pytest.fixture
def name(case):
    return case[0]


@pytest.fixture
def method(case):
    return case[1].set_classes(NAMES)


def predict(method, inputs):
    with torch.no_grad():
        return method(inputs)


def test_how_many_methods_run():
    assert len(ALL) >= 7
    assert {"zero-shot", "linear-probe", "coop", "clip-adapter", "tip-adapter", "tip-adapter-f", "maple"} <= set(ALL)


def test_it_says_what_it_is(name, method):
    kind = type(method)
    entry = methods.entry(name)
    assert kind.name == name
    assert entry.summary
    assert len(entry.summary) <= 120
    assert "Source:" in inspect.getdoc(sys.modules[kind.__module__])
    assert issubclass(kind.config_class, MethodConfig)
    assert [field.name for field in fields(kind.config_class) if not field.metadata.get("help")] == []
    assert kind.reads in ("image_features", "images")
    assert kind.novel_classes in ("open", "synthesised", "zero-shot", "refused")


def test_logits_of_a_batch(backbone, method):
    inputs = query(backbone, method.reads)
    logits = predict(method, inputs)
    assert logits.shape == (len(inputs), len(NAMES))
    assert torch.isfinite(logits).all()
    assert not method.training
    assert not method.uses_fallback


def test_one_image_and_another_order(backbone, name, method):
    inputs = query(backbone, method.reads)
    one = predict(method, inputs[:1])
    assert one.shape == (1, len(NAMES))
    assert torch.isfinite(one).all()
    if methods.entry(name).family == "transductive":
        return  # its answers depend on the batch, by design
    logits, order = predict(method, inputs), torch.randperm(len(inputs), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(one, logits[:1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(predict(method, inputs[order]), logits[order], rtol=1e-4, atol=1e-4)


def test_only_its_own_parameters_change(backbone, name):
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    method, _ = fitted(backbone, name)
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in backbone.parameters())
    own = {id(parameter) for parameter in method.parameters()}
    assert not own & {id(parameter) for parameter in backbone.parameters()}


def test_what_it_trains_moves(backbone, name):
    untouched = make(backbone, name).adapter_state()
    method, report = fitted(backbone, name)
    assert isinstance(report, dict)
    taught = any(share != 1 for share in report.get("equal_groups", [0]))  # answers rewarded alike teach nothing
    if method.num_trained() and taught:
        state = method.adapter_state()
        assert any(key not in untouched or not torch.equal(untouched[key], value) for key, value in state.items())


def test_state_goes_into_a_new_instance(backbone, name, method):
    state = {key: value.clone() for key, value in method.adapter_state().items()}
    assert all(value.device == backbone.device for value in state.values())
    other = make(backbone, name, seed=5)
    other.load_adapter_state(state)
    other.eval()
    inputs = query(backbone, method.reads)
    assert torch.equal(predict(other, inputs), predict(method, inputs))
    limit = 1.01 if method.tunes_towers else 0.2  # of the backbone's size
    images = 4 * len(NAMES) * inputs[0].numel() * method.keeps_images
    assert sum(v.numel() for v in state.values()) - images < limit * sum(p.numel() for p in backbone.parameters())


def test_a_state_that_does_not_fit_is_refused(backbone, name, method):
    state = {key: value.clone() for key, value in method.adapter_state().items()}
    other = make(backbone, name)
    with pytest.raises(AdapterError, match="doesn't know"):
        other.load_adapter_state({**state, "surprise": torch.zeros(2)})
    for key, value in state.items():
        with pytest.raises(AdapterError):
            other.load_adapter_state({k: v for k, v in state.items() if k != key})
        if value.is_floating_point() and value.numel():
            with pytest.raises(AdapterError, match="finite"):
                other.load_adapter_state({**state, key: torch.full_like(value, float("nan"))})
        with pytest.raises(AdapterError):
            other.load_adapter_state({**state, key: value.new_zeros((*value.shape, 3))})
    other.load_adapter_state(state)


def test_seeds(backbone, name, method):
    again, _ = fitted(backbone, name)
    state, same = method.adapter_state(), again.adapter_state()
    assert state.keys() == same.keys()
    assert all(torch.equal(state[key], same[key]) for key in state)
    first, second = make(backbone, name, seed=1), make(backbone, name, seed=2)
    drew = not torch.equal(first.generator.get_state(), torch.Generator().manual_seed(1).get_state())
    one, two = first.adapter_state(), second.adapter_state()
    assert any(not torch.equal(one[key], two[key]) for key in one) == drew


def test_building_leaves_torchs_generator_alone(backbone, name):
    before = torch.random.get_rng_state()
    fitted(backbone, name)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_classes_it_never_saw(backbone, method):
    inputs = query(backbone, method.reads)
    own = predict(method, inputs)
    if method.novel_classes == "refused":
        with pytest.raises(UnsupportedError):
            method.set_classes(NOVEL)
    else:
        logits = predict(method.set_classes(NOVEL), inputs)
        assert logits.shape == (len(inputs), len(NOVEL))
        assert torch.isfinite(logits).all()
        assert method.uses_fallback == (method.novel_classes == "zero-shot")
        assert method.open_vocabulary == (method.novel_classes in ("open", "synthesised"))
    if method.novel_classes == "zero-shot":
        kind = "mllm-zero-shot" if method.needs_mllm else "zero-shot"
        plain, zero = methods.get(kind)(backbone, NOVEL), method.zero_shot()
        features = inputs if method.reads == plain.reads else backbone.encode_image(inputs)
        # sentences, where a method was given some, belong to its own zero-shot answer
        wanted = method.cosine_logits(features, zero) if method.descriptions else predict(plain, features)
        torch.testing.assert_close(logits, wanted)
        with pytest.raises(UnsupportedError, match="different scales"):
            method.set_classes((NAMES[0], NOVEL[0]))
    assert torch.equal(predict(method.set_classes(NAMES), inputs), own)


def test_another_datasets_texts_come_and_go(backbone, name, method):
    """Its classes are answered with its templates, as if they had been there from the start; then all is as before."""
    inputs, other = query(backbone, method.reads), OtherDataset(("a sketch of {}", "{}!"), DESCRIPTIONS)
    own, (templates, descriptions) = predict(method, inputs), (method.templates, method.descriptions)
    if method.novel_classes == "refused":
        with pytest.raises(UnsupportedError):
            method.set_classes(NOVEL, other)
    else:
        twin = type(method)(backbone, NAMES, templates=other.templates, config=method.config, descriptions=DESCRIPTIONS)
        twin.load_adapter_state(method.adapter_state())
        answered = predict(method.set_classes(NOVEL, other), inputs)
        torch.testing.assert_close(answered, predict(twin.set_classes(NOVEL), inputs))
        assert method.uses_fallback == (method.novel_classes == "zero-shot")
        mixed = predict(method.set_classes((NAMES[0], *NOVEL), other), inputs)  # called alike, but another class
        assert mixed.shape == (len(inputs), 1 + len(NOVEL))
        assert method.uses_fallback == (method.novel_classes == "zero-shot")
    with pytest.raises(ConfigError, match="another dataset"):
        method.set_classes(NAMES, OtherDataset(settings={"colour": 1}))
    predict(method.set_classes(NAMES, other), inputs)
    assert torch.equal(predict(method.set_classes(NAMES), inputs), own)
    assert (method.templates, method.descriptions) == (templates, descriptions)


def test_a_subset_of_its_classes_is_always_served(backbone, name, method):
    inputs = query(backbone, method.reads)
    full = predict(method, inputs)
    method.set_classes((NAMES[3], NAMES[1]))
    assert not method.uses_fallback
    part = predict(method, inputs)
    assert part.shape == (len(inputs), 2)
    if methods.entry(name).family != "transductive" and not method.scores_by_class_list:
        torch.testing.assert_close(part, full[:, [3, 1]], rtol=1e-4, atol=1e-4)


def test_a_refused_change_of_classes_changes_nothing(backbone, method):
    inputs = query(backbone, method.reads)
    own = predict(method, inputs)

    def ask(names):  # some only look at the names when they need them
        return predict(method.set_classes(names), inputs)

    for names in ((), ("a", "a"), ("a", " "), ("word " * 90, "other")):
        with pytest.raises(AdaptKitError):
            ask(names)
        method.set_classes(NAMES)
    assert torch.equal(predict(method, inputs), own)


def test_errors_are_ours(backbone, name):
    kind = methods.get(name)

    class OtherConfig(MethodConfig):
        pass

    if kind.config_class is not MethodConfig:
        with pytest.raises(ConfigError, match="takes a"):
            kind(backbone, NAMES, config=OtherConfig())
    with pytest.raises(DataError, match="occurs 2 times"):
        kind(backbone, (*NAMES, NAMES[0]))
    with pytest.raises(ConfigError, match="exactly one"):
        kind(backbone, NAMES, templates=("a photo",))


@pytest.mark.parametrize("other", OTHERS)
def test_backbones_it_cannot_use_are_refused_at_once(other, name):
    """Without text, closed, an MLLM for CLIP's methods and a CLIP for an MLLM's: it works whole, or is refused."""
    backbone = OTHERS[other](name)
    try:
        method = make(backbone, name)
    except AdaptKitError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert backbone.spec.name in refusal
        return
    method, _ = fitted(backbone, name)
    assert torch.isfinite(predict(method, query(backbone, method.reads))).all()
    if not backbone.has_text:
        assert not method.needs_text


def test_fitting_again_after_other_classes(backbone, name):
    """A fit is always on the method's own classes, whatever it predicts among at the moment."""
    method = make(backbone, name)
    method.set_classes(NAMES[:2])
    settings = method.default_training and replace(method.default_training, epochs=1, batch_size=8)
    fit_method(method, make_task(backbone, method.reads), settings)
    assert method.class_names == NAMES


def test_no_validation_and_one_shot(backbone, name):
    method, _ = fitted(backbone, name, shots=1, val=False)
    assert torch.isfinite(predict(method, query(backbone, method.reads))).all()
