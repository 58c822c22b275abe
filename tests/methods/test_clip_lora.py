from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from adaptkit.errors import BackboneError, ConfigError, UnsupportedError
from adaptkit.methods.importing import import_reference
from adaptkit.methods.lora import _towers
from adaptkit.methods.lora._towers import merged_state, shared_copy
from adaptkit.methods.lora.clip_lora import ClipLora, ClipLoraConfig, positions
from adaptkit.methods.reference import read_reference_checkpoint
from adaptkit.training.loop import fit_method
from tests.methods.tiny import NAMES, NOVEL, closed_text, make_task, query, tiny_clip

pytest.importorskip("peft")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@pytest.fixture(scope="module")
def backbone():
    return tiny_clip()


def shaken(method, seed=3):
    """Every update away from zero."""
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=numbers))
    return method


def plain_towers(method):
    """Fresh towers with W + alpha / sqrt(rank) · B A in the place of W, differentiable."""
    config, towers, weights = method.config, {}, dict(method.named_parameters())
    for word in ("image", "text"):
        state = dict(getattr(method.backbone, f"{word}_tower").named_parameters())
        for name in list(state):
            key = f"{word}.{name.removesuffix('.weight')}.lora_A.weight"
            if key in weights:
                update = weights[key.replace("lora_A", "lora_B")] @ weights[key]
                state[name] = state[name] + config.alpha / math.sqrt(config.rank) * update
        towers[word] = state
    return towers


def plain_logits(method, pixels):
    towers, backbone = plain_towers(method), method.backbone
    images = torch.func.functional_call(backbone.image_tower, towers["image"], (pixels,))
    rows = backbone.text_rows(backbone.tokenize([f"a photo of a {name.replace('_', ' ')}." for name in NAMES]))
    texts = torch.func.functional_call(backbone.text_tower, towers["text"], (rows,))
    return 100 * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T


@pytest.mark.parametrize(
    "settings", [{}, {"targets": "qkvo", "rank": 3, "alpha": 2.0}, {"towers": "text"}, {"position": "up"}]
)
def test_logits_and_gradients_are_those_of_changed_weights(backbone, settings):
    method = shaken(ClipLora(backbone, NAMES, config=ClipLoraConfig(dropout=0.0, **settings)))
    pixels, labels = query(backbone, "images"), torch.arange(9) % 4
    plain = plain_logits(method, pixels)
    torch.testing.assert_close(method(pixels), plain, rtol=1e-5, atol=1e-4)
    wanted = torch.autograd.grad(F.cross_entropy(plain, labels), list(method.parameters()))
    (loss,) = method.losses(pixels, labels).values()
    actual = torch.autograd.grad(loss, list(method.parameters()))
    assert len(actual) >= 2
    for ours, theirs in zip(actual, wanted, strict=True):
        # logits are 100 times a cosine, and so is their rounding
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-5 * float(theirs.abs().max()))


def test_untrained_is_zero_shot(backbone):
    method = ClipLora(backbone, NAMES)
    pixels = query(backbone, "images")
    with torch.no_grad():
        features = F.normalize(backbone.encode_image(pixels), dim=-1)
        torch.testing.assert_close(method(pixels), 100 * features @ method.zero_shot().T, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(method.set_classes(NOVEL)(pixels), 100 * features @ method.zero_shot().T)


def test_a_is_drawn_and_b_is_zero(backbone):
    state = ClipLora(backbone, NAMES, seed=1).adapter_state()
    assert len(state) == 2 * 2 * 3 * 3
    for key, value in state.items():
        width = 24 if key.startswith("image") else 16
        if "lora_B" in key:
            assert not value.any()
            assert value.shape == (width, 2)
        else:
            assert value.shape == (2, width)
            bound = width**-0.5  # Kaiming-uniform with a = sqrt 5
            assert 0.5 * bound < value.abs().max() <= bound


def test_dropout_only_in_training(backbone):
    method = shaken(ClipLora(backbone, NAMES))
    pixels = query(backbone, "images")
    with torch.no_grad():
        plain = method(pixels)
        assert torch.equal(method(pixels), plain)
        method.train()
        one, two = method(pixels), method(pixels)
        method.eval()
        assert not torch.equal(one, two)
        assert torch.equal(method(pixels), plain)


def test_the_copy_takes_no_memory(backbone):
    tower = backbone.image_tower
    copied = shared_copy(tower)
    ours, theirs = dict(copied.named_parameters()), dict(tower.named_parameters())
    assert len(ours) > 30
    assert all(ours[name] is theirs[name] for name in theirs)
    assert not {id(m) for m in copied.modules()} & {id(m) for m in tower.modules()}


def test_the_backbone_keeps_its_modules(backbone):
    before = [(name, type(module)) for name, module in backbone.named_modules()]
    features = backbone.encode_image(query(backbone, "images"))
    method = shaken(ClipLora(backbone, NAMES))
    assert [(name, type(module)) for name, module in backbone.named_modules()] == before
    assert torch.equal(backbone.encode_image(query(backbone, "images")), features)
    frozen = {id(parameter) for parameter in backbone.parameters()}
    inside = [p for tower in method.changed_towers.values() for p in tower.parameters()]
    assert {id(p) for p in inside} - frozen == {id(p) for p in method.parameters()}
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_it_learns(backbone):
    task = make_task(backbone, "images", shots=4)
    method = ClipLora(backbone, NAMES)
    settings = replace(ClipLora.default_training, epochs=15, batch_size=16, lr=1e-2, views=0)
    report = fit_method(method, task, settings)
    assert report["losses"][-1] < 0.5 * report["losses"][0]


def test_iterations_count_with_the_shots(backbone):
    task = make_task(backbone, "images", shots=3)
    settings = replace(ClipLora.default_training, steps_per_shot=3, batch_size=8, views=0)
    report = fit_method(ClipLora(backbone, NAMES), task, settings)
    assert report["steps"] == 9  # 12 images in batches of 8 and 4: four whole epochs and half a one
    assert report["epochs"] == 5


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("all", range(12)),
        ("bottom", range(4)),
        ("mid", range(4, 8)),
        ("up", range(8, 12)),
        ("half-bottom", range(6)),
        ("half-up", range(6, 12)),
        ("top1", range(11, 12)),
        ("top3", range(9, 12)),
    ],
)
def test_positions(position, expected):
    assert positions(position, 12) == expected


def test_every_layer_is_in_one_third_and_one_half():
    for layers in range(1, 30):
        thirds = [*positions("bottom", layers), *positions("mid", layers), *positions("up", layers)]
        halves = [*positions("half-bottom", layers), *positions("half-up", layers)]
        assert thirds == halves == list(range(layers))


def test_merging_twice_gives_the_same_and_changes_nothing(backbone):
    method = shaken(ClipLora(backbone, NAMES))
    pixels = query(backbone, "images")
    with torch.no_grad():
        before = method(pixels)
        first, second = method.merged_towers(), method.merged_towers()
        assert torch.equal(method(pixels), before)
    plain = plain_towers(method)
    for word in ("image", "text"):
        assert first[word].keys() == plain[word].keys()
        for name, value in first[word].items():
            assert torch.equal(value, second[word][name])
            torch.testing.assert_close(value, plain[word][name], rtol=1e-5, atol=1e-6)
    assert merged_state(backbone.text_tower).keys() == plain["text"].keys()


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_rank_above_the_width(backbone):
    with pytest.raises(ConfigError, match="text tower have width 16: choose a rank of at most 16"):
        ClipLora(backbone, NAMES, config=ClipLoraConfig(rank=20))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "qx"}, "letters out of q, k, v and o"),
        ({"targets": ""}, "letters out of q, k, v and o"),
        ({"targets": "qq"}, "at most once"),
        ({"rank": 0}, "at least 1"),
        ({"dropout": 1.0}, "below 1"),
        ({"alpha": 0.0}, "positive"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        ClipLoraConfig(**settings)


def test_a_closed_tower():
    with pytest.raises(BackboneError, match="reach inside the text tower"):
        ClipLora(closed_text(), NAMES)
    method = ClipLora(closed_text(), NAMES, config=ClipLoraConfig(towers="image"))
    assert method.num_trained() == 3 * 3 * 2 * 2 * 24
    with pytest.raises(BackboneError, match="merged checkpoint"):
        method.merged_towers()


def test_without_peft(backbone, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(_towers, "import_module", missing)
    with pytest.raises(UnsupportedError, match=r"pip install 'adaptkit\[lora\]'"):
        ClipLora(backbone, NAMES)


# --- the release's files ----------------------------------------------------------------------------------------------


def release_file(path, method, **metadata):
    """As `save_lora` writes it: layers counted through, those of the text tower first."""
    state, layers, count = method.adapter_state(), {}, 0
    for word in ("text", "image"):
        indices = sorted({int(key.split(".")[2]) for key in state if key.startswith(word)})
        for index in indices:
            start, layer = f"{word}.blocks.{index}.attn.", {}
            for name in PROJECTIONS:
                if f"{start}{name}.lora_A.weight" in state:
                    layer["proj" if name == "out_proj" else name] = {
                        f"w_lora_{side}": state[f"{start}{name}.lora_{side}.weight"] for side in "AB"
                    }
            layers[f"layer_{count}"] = layer
            count += 1
    config = method.config
    known = {
        "r": config.rank,
        "alpha": config.alpha,
        "encoder": {"image": "vision"}.get(config.towers, config.towers),
        "params": list(config.targets),
        "position": config.position,
    }
    torch.save({"weights": layers, "metadata": known | metadata}, path)
    return path


@pytest.mark.parametrize("settings", [{}, {"targets": "qko", "rank": 3, "alpha": 2.0}, {"towers": "image"}])
def test_the_releases_files(backbone, tmp_path, settings):
    method = shaken(ClipLora(backbone, NAMES, config=ClipLoraConfig(**settings)))
    state = read_reference_checkpoint(release_file(tmp_path / "lora_weights.pt", method))
    imported = import_reference("clip-lora", state, backbone, NAMES)
    pixels = query(backbone, "images")
    with torch.no_grad():
        assert torch.equal(imported.model(pixels), method(pixels))
    assert imported.ignored == ()
    assert len(imported.taken) == len(method.adapter_state())


def test_files_that_contradict_themselves(backbone, tmp_path):
    method = ClipLora(backbone, NAMES)
    for index, (metadata, message) in enumerate(
        [({"r": 4}, "say rank 4"), ({"params": ["q"]}, "say matrices q"), ({"encoder": "audio"}, "'audio'")]
    ):
        state = read_reference_checkpoint(release_file(tmp_path / f"{index}.pt", method, **metadata))
        with pytest.raises(ConfigError, match=message):
            import_reference("clip-lora", state, backbone, NAMES)


def test_the_training_of_the_paper():
    settings = ClipLora.default_training
    assert (settings.steps_per_shot, settings.batch_size, settings.epochs) == (500, 32, 0)
    assert (settings.optimiser, settings.lr, settings.min_lr, settings.weight_decay) == ("adamw", 2e-4, 1e-6, 1e-2)
    assert settings.keep_last
