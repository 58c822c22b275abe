"""An MLLM's features from other layers and tokens, centred; each with a name and a digest of its own."""

from __future__ import annotations

import pytest
import torch

from adaptkit.backbones.load import load_backbone
from adaptkit.backbones.mllm.model import IMAGE_PROMPT
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.backbones.mllm.reading import Reading, split_reading
from adaptkit.data.features import FeatureStore
from adaptkit.data.sources import load_dataset
from adaptkit.errors import BackboneError
from adaptkit.methods import methods
from adaptkit.training.loop import fit_method
from tests.backbones import tiny_mllm as tiny
from tests.methods.tiny import NAMES, make_task, query


@pytest.fixture(scope="module")
def name():
    return f"transformers:{tiny.save('llava')}"


@pytest.fixture(scope="module")
def plain(name):
    return load_backbone(name)


def images(backbone, pixels):
    with torch.no_grad():
        return backbone.encode_image(pixels)


def texts(backbone):
    with torch.no_grad():
        return backbone.encode_text(backbone.tokenize(["a cat", "a long golden retriever"]))


def kept_states(backbone, pixels):
    """Embeddings and the states behind each block, caught as the model runs, and which positions show the image."""
    kept = []
    blocks = getattr(backbone.language, "layers", None) or backbone.language.decoder.layers
    hooks = [block.register_forward_hook(lambda _, __, out: kept.append(out)) for block in blocks]
    features = backbone.image_features(pixels, IMAGE_PROMPT)
    rows = [backbone.prompter.ids([Turn(IMAGE_PROMPT)], [count]) for count in features.counts]
    batch = backbone.batch(rows, features)
    with torch.no_grad():
        backbone.hidden(batch, features)
    for hook in hooks:
        hook.remove()
    return [out[0] if isinstance(out, tuple) else out for out in kept], batch.ids == backbone.image_token


@pytest.mark.parametrize(
    "kind", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma", "smolvlm", "blip2", "instructblip"]
)
def test_layer_and_pooling(kind):
    plain = tiny.load(kind)
    pixels = tiny.pixels(2, plain.spec.preprocessing.image_size)
    states, shown = kept_states(plain, pixels)
    name = plain.spec.name
    first = load_backbone(f"{name}@layer1")
    torch.testing.assert_close(images(first, pixels), states[0][:, -1], rtol=1e-4, atol=1e-5)
    mean = load_backbone(f"{name}@layer1@image-mean")
    wanted = torch.stack([own[places].mean(dim=0) for own, places in zip(states[0], shown, strict=True)])
    torch.testing.assert_close(images(mean, pixels), wanted, rtol=1e-4, atol=1e-5)
    assert (images(first, pixels) - images(plain, pixels)).abs().max() > 1e-3
    last = load_backbone(f"{name}@layer2")
    torch.testing.assert_close(images(last, pixels), images(plain, pixels))
    assert not torch.equal(texts(first), texts(plain))
    assert torch.equal(texts(mean), texts(first))  # texts have no image to be read at


def test_centring_takes_off_what_says_nothing(name, plain):
    centred = load_backbone(f"{name}@centred")
    pixels = tiny.pixels(3)
    gap = images(plain, pixels) - images(centred, pixels)
    torch.testing.assert_close(gap, gap[:1].expand(3, -1), rtol=1e-4, atol=1e-5)
    assert gap.abs().max() > 0.1
    noise = torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(0))
    blank = torch.stack([torch.full((3, 28, 28), 0.5), noise])
    torch.testing.assert_close(gap[0], images(plain, blank).mean(dim=0), rtol=1e-4, atol=1e-4)
    assert texts(centred).shape == (2, 64)
    assert not torch.equal(texts(centred), texts(plain))


def test_names_and_digests_differ_so_stored_features_do(name, plain, tmp_path):
    readings = ["", "@layer1", "@image-mean", "@centred", "@layer1@image-mean@centred"]
    backbones = [load_backbone(name + suffix) for suffix in readings]
    assert len({backbone.spec.digest for backbone in backbones}) == 5
    assert [backbone.spec.name for backbone in backbones] == [name + suffix for suffix in readings]
    assert load_backbone(f"{name}@centred@layer1@image-mean").spec.digest == backbones[4].spec.digest
    split = load_dataset("digits").train.subset(range(3))
    store = FeatureStore(tmp_path)
    rows = torch.arange(3)
    found = [store.inputs(backbone, split, batch_size=3).select(rows) for backbone in backbones]
    assert store.encoded == 15
    assert all(not torch.equal(found[0], other) for other in found[1:])


def test_methods_run_on_it(name):
    backbone = load_backbone(f"{name}@layer1@image-mean@centred")
    for kind in ("tip-adapter", "linear-probe"):
        method = methods.get(kind)(backbone, NAMES)
        fit_method(method, make_task(backbone, "image_features", shots=2))
        with torch.no_grad():
            assert torch.isfinite(method(query(backbone, "image_features", 3))).all()


def test_names_taken_apart():
    assert split_reading("mini-mllm") == ("mini-mllm", Reading())
    assert split_reading("x@bf16@nf4@image-mean@layer12") == ("x@bf16@nf4", Reading(12, "image-mean"))
    assert split_reading("x@layer2@bf16") == ("x@layer2@bf16", Reading())  # not at the end
    assert split_reading("@centred") == ("@centred", Reading())
    assert split_reading("transformers:/a@centre") == ("transformers:/a@centre", Reading())
    assert Reading(3, "image-mean", True).suffix == "@layer3@image-mean@centred"
    for wrong in ("x@centred@centred", "x@layer1@layer2", "x@layer0"):
        with pytest.raises(BackboneError, match="layers count from 1"):
            split_reading(wrong)


def test_what_cannot_be_read(name):
    with pytest.raises(BackboneError, match="has 2 layers, and @layer3 asks for layer 3"):
        load_backbone(f"{name}@layer3")
    with pytest.raises(BackboneError, match="@centred says where"):
        load_backbone("mini@centred")
