"""Many adapters over one backbone: answers are each adapter's own, images are encoded once, and sets change in use."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch

import adaptkit
from adaptkit.errors import AdapterError, ConfigError, DataError, UnknownNameError, UnsupportedError
from adaptkit.export.adapter_set import AdapterSet
from adaptkit.export.fold import fold
from adaptkit.methods import methods
from adaptkit.methods.adapter import AdaptedModel, save_adapter
from adaptkit.methods.lora.clip_lora import ClipLora, ClipLoraConfig
from adaptkit.methods.lora.peft import Peft, PeftConfig
from tests.contract.test_methods import fitted, suitable
from tests.methods.test_clip_lora import shaken
from tests.methods.tiny import NAMES, NOVEL, query, tiny_clip

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def backbone():
    return tiny_clip(layers=12)


@pytest.fixture(scope="module")
def models(backbone):
    """All three ways an image takes; LoRA of different ranks, matrices and layers."""
    made = {name: fitted(backbone, name)[0] for name in ("tip-adapter", "clip-adapter", "linear-probe", "vpt")}
    made["lora-a"] = shaken(ClipLora(backbone, NAMES))
    made["lora-b"] = shaken(ClipLora(backbone, NOVEL, config=ClipLoraConfig(rank=4, targets="vo", position="top3")))
    made["lora-text"] = shaken(ClipLora(backbone, NAMES, config=ClipLoraConfig(towers="text")))
    made["peft-lora"] = shaken(Peft(backbone, NAMES, config=PeftConfig("lora", towers="image")))
    made["dora"] = shaken(Peft(backbone, NAMES, config=PeftConfig("dora", towers="image")))
    return {name: AdaptedModel(method) for name, method in made.items()}


@pytest.fixture
def adapters(backbone, models):
    return AdapterSet(backbone, models)


@pytest.fixture
def counted(backbone):
    """How many images the frozen encoder has seen in each run; edited runs of it hand it their edits too."""
    seen = []

    def count(module, inputs, output):
        if len(inputs) == 1:
            seen.append(len(inputs[0]))

    handle = backbone.image.register_forward_hook(count)
    yield seen
    handle.remove()


def close(given, wanted):
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5 * max(1.0, float(wanted.abs().max())))


def test_every_adapter_about_every_image(backbone, adapters, models, counted):
    pixels = query(backbone, "images")
    answers = adapters.ask(pixels)
    assert sum(counted) == len(pixels)  # one run for tip-adapter, clip-adapter, linear-probe and lora-text
    compared = 0
    for name, model in models.items():
        with torch.no_grad():
            close(answers[name].clone(), model(pixels))
        compared += 1
    assert compared == len(adapters) == 9
    assert list(adapters.ask(pixels, ["vpt"])) == ["vpt"]
    assert answers["lora-b"].shape == (len(pixels), len(NOVEL))


def test_each_image_to_an_adapter_of_its_own(backbone, adapters, models, counted):
    names = ["lora-a", "vpt", "tip-adapter", "lora-b", "dora", "tip-adapter", "lora-a", "peft-lora", "clip-adapter"]
    pixels, through = query(backbone, "images", len(names)), []
    hook = adapters._lora._tower.register_forward_hook(lambda tower, inputs, output: through.append(len(inputs[0])))
    answers = adapters.route(pixels, names)
    hook.remove()
    assert counted == [3]
    assert through == [4]  # three LoRA adapters in one run, each row by its own updates
    for row, name in enumerate(names):
        with torch.no_grad():
            close(answers[row].clone(), models[name](pixels[row : row + 1])[0])
    assert len(answers) == 9


def test_an_image_to_several_adapters_is_encoded_once(backbone, adapters, models, counted):
    pixels = query(backbone, "images", 2)
    names = ["tip-adapter", "vpt", "lora-a", "clip-adapter", "lora-a", "linear-probe"]
    images = [1, 1, 0, 1, 1, 0]
    answers = adapters.route(pixels, names, images)
    assert counted == [2]
    for name, image, answer in zip(names, images, answers, strict=True):
        with torch.no_grad():
            close(answer.clone(), models[name](pixels[image : image + 1])[0])
    for wrong in ([0, 1], [0, 1, 0, 1, 0, 2], [0, 1, 0, 1, 0, -1]):
        with pytest.raises(DataError):
            adapters.route(pixels, names, wrong)


def test_lora_adapters_share_one_tower(backbone, adapters):
    tower = adapters._lora._tower
    shared = {id(value) for value in backbone.image.parameters()}
    own = [name for name, value in tower.named_parameters() if id(value) not in shared]
    assert own
    assert all(".lora_" in name for name in own)
    assert {name.split(".")[-2] for name in own} == {"a0", "a1", "a2"}
    adapters.remove("lora-a")
    assert {name.split(".")[-2] for name, _ in tower.named_parameters() if ".lora_" in name} == {"a1", "a2"}
    assert not any(value.requires_grad for value in backbone.parameters())


def test_adding_replacing_and_removing(backbone, models, tmp_path):
    adapters = AdapterSet(backbone)
    pixels = query(backbone, "images", 3)
    assert adapters.ask(pixels) == {}
    adapters.add("one", models["tip-adapter"])
    with pytest.raises(ConfigError, match="There is an adapter 'one' already"):
        adapters.add("one", models["lora-a"])
    for name in ("lora-a", "lora-b", "vpt", "clip-adapter"):
        adapters.add("one", models[name], replace=True)
        with torch.no_grad():
            close(adapters.ask(pixels)["one"].clone(), models[name](pixels))
    folder = save_adapter(tmp_path / "saved", models["linear-probe"], {"classifier": {"labels": [4, 3, 2, 1]}})
    adapters.add("two", folder)
    assert adapters.labels("two") == (4, 3, 2, 1)
    assert adapters.labels("one") == NAMES
    assert list(adapters) == ["one", "two"]
    adapters.remove("one")
    assert "one" not in adapters
    assert len(adapters) == 1


def test_what_is_refused(backbone, adapters, models):
    pixels = query(backbone, "images", 2)
    with pytest.raises(UnknownNameError, match="Did you mean 'tip-adapter'"):
        adapters.ask(pixels, ["tip-adaptor"])
    with pytest.raises(UnknownNameError, match="The set holds 9"):
        adapters.route(pixels, ["vpt", "nothing like it"])
    with pytest.raises(UnknownNameError):
        adapters.remove("none")
    with pytest.raises(UnknownNameError):
        adapters.labels("none")
    with pytest.raises(DataError, match="2 images, but 1 adapters"):
        adapters.route(pixels, ["vpt"])
    for wrong in (pixels[0], pixels[:, :1], pixels[..., :8], (pixels * 50).to(torch.uint8)):
        with pytest.raises(DataError, match=r"\[batch, 3, 16, 16\] are accepted"):
            adapters.ask(wrong)
    assert adapters.route(pixels[:0], []) == []
    assert adapters.ask(pixels[:0], ["tip-adapter", "lora-a"])["lora-a"].shape == (0, len(NAMES))
    with pytest.raises(ConfigError, match="named in a list"):
        adapters.ask(pixels, "vpt")
    with pytest.raises(ConfigError, match="at least one letter"):
        adapters.add("", models["vpt"])
    with pytest.raises(AdapterError, match="not an adapter folder"):
        adapters.add("new", "nowhere")
    with pytest.raises(UnsupportedError, match="cocoop can't be folded"):
        adapters.add("new", AdaptedModel(methods.get("cocoop")(backbone, NAMES)))
    other = tiny_clip(layers=1)
    other.spec = type(other.spec)(**{**vars(other.spec), "digest": "9" * 64})
    with pytest.raises(AdapterError, match="one set serves one backbone"):
        adapters.add("new", AdaptedModel(methods.get("zero-shot")(other, NAMES)))
    assert len(adapters) == 9


def test_changes_while_others_ask(backbone, models):
    """Answers are whole whatever happens at the same time: the one adapter's or the other's, never a mix."""
    adapters = AdapterSet(backbone, {"steady": models["lora-b"], "moving": models["lora-a"]})
    pixels, done = query(backbone, "images", 4), Event()
    with torch.no_grad():
        allowed = [models[name](pixels) for name in ("lora-a", "peft-lora", "tip-adapter")]
        steady = models["lora-b"](pixels)

    def ask():
        asked = 0
        while not done.is_set() or not asked:
            answers = adapters.ask(pixels, ["moving", "steady"])
            close(answers["steady"].clone(), steady)
            assert any(torch.allclose(answers["moving"], wanted, rtol=1e-4, atol=1e-4) for wanted in allowed)
            asked += 1
        return asked

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(ask) for _ in range(2)]
        for place in range(9):
            name = ("peft-lora", "tip-adapter", "lora-a")[place % 3]
            adapters.add("moving", models[name], replace=True)
            adapters.add(f"other {place}", models["lora-b"])
            adapters.remove(f"other {place}")
        done.set()
        assert all(one.result() >= 1 for one in running)
    assert list(adapters) == ["moving", "steady"]


def test_features_of_a_language_model():
    """Its hidden states serve methods on features, also in a set, though no image encoder of it stands alone."""
    mllm = suitable("mllm-zero-shot")
    model, pixels = AdaptedModel(fitted(mllm, "linear-probe")[0]), query(mllm, "images", 2)
    adapters = AdapterSet(mllm, {"probe": model})
    with torch.no_grad():
        close(adapters.ask(pixels)["probe"].clone(), model(pixels))
    with pytest.raises(UnsupportedError, match="no image encoder that stands alone"):
        fold(model)


def test_it_is_public():
    assert adaptkit.AdapterSet is AdapterSet
