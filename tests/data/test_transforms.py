"""The test transform equals torchvision's; augmented views are reproducible."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as reference
from torchvision.transforms import functional

from adaptkit.backbones.base import Preprocessing
from adaptkit.data.transforms import augment, to_pixels
from adaptkit.errors import ConfigError

MODES = {
    "bicubic": reference.InterpolationMode.BICUBIC,
    "bilinear": reference.InterpolationMode.BILINEAR,
}
PLAIN = Preprocessing(image_size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def picture(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def torchvision_pixels(image, preprocessing):
    size = preprocessing.image_size
    resize = (size, size) if preprocessing.resize == "squash" else preprocessing.resize_size or size
    return reference.Compose(
        [
            reference.Resize(resize, interpolation=MODES[preprocessing.interpolation]),
            reference.CenterCrop(size),
            reference.ToTensor(),
            reference.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )(image)


@pytest.mark.parametrize(
    "size", [(64, 64), (32, 32), (33, 47), (47, 33), (100, 31), (17, 90), (8, 9), (1, 5), (224, 225)]
)
@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(image_size=32),
        Preprocessing(image_size=32, resize_size=36),
        Preprocessing(image_size=33, interpolation="bilinear"),
        Preprocessing(image_size=32, resize="squash"),
        Preprocessing(image_size=24, resize="squash", interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3),
        Preprocessing(image_size=32, resize_size=20),
    ],
    ids=["shortest", "larger-first", "bilinear", "squash", "squash-bilinear", "smaller-first"],
)
def test_pixels_equal_torchvision(size, preprocessing):
    image = picture(*size)
    pixels = to_pixels(image, preprocessing)
    assert pixels.shape == (3, preprocessing.image_size, preprocessing.image_size)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, torchvision_pixels(image, preprocessing))


def test_pixels_do_not_share_memory():
    image = Image.new("RGB", (8, 8))
    to_pixels(image, PLAIN).fill_(1.0)
    assert image.getpixel((0, 0)) == (0, 0, 0)


def views(image, seed, n=6, **settings):
    numbers = torch.Generator().manual_seed(seed)
    return torch.stack([augment(image, PLAIN, numbers, **settings) for _ in range(n)])


@pytest.mark.parametrize("size", [(40, 30), (8, 8), (200, 5), (3, 90), (1, 1)])
def test_views_are_reproducible_and_in_range(size):
    image = picture(*size)
    first = views(image, 1)
    assert first.shape == (6, 3, 8, 8)
    assert torch.equal(first, views(image, 1))
    assert 0 <= first.min() <= first.max() <= 1
    if min(size) > 4:
        assert not torch.equal(first, views(image, 2))
        assert not torch.equal(first[0], first[1])


def test_global_generators_are_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = views(picture(40, 30), 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(views(picture(40, 30), 1), first)


def test_no_flip_and_no_crop_is_the_whole_picture():
    """A full-area crop of a square fits only with aspect 1; the fallback is the whole picture."""
    image = picture(8, 8)
    whole = to_pixels(image, PLAIN)
    seen = views(image, 0, n=20, crop_scale=1.0, flip=False)
    same = sum(torch.equal(view, whole) for view in seen)
    assert same > 10
    mirrored = views(image, 0, n=40, crop_scale=1.0, flip=True)
    flips = sum(torch.equal(view, whole.flip(2)) for view in mirrored)
    assert 5 < flips < 35
    assert not any(torch.equal(view, whole.flip(2)) for view in seen)


def test_crops_lie_inside_and_keep_their_area():
    """A picture whose red grows to the right and green downwards tells where a crop lay."""
    side = 250
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    image = Image.fromarray(np.stack([x, y, x * 0], axis=-1).astype(np.uint8))
    seen = views(image, 3, n=200, crop_scale=0.25, flip=False) * 255
    # the outermost of 8 pixels are centred 1/16 inside the crop
    width = (seen[:, 0, 4, 7] - seen[:, 0, 4, 0]) * 8 / 7
    height = (seen[:, 1, 7, 4] - seen[:, 1, 0, 4]) * 8 / 7
    area, aspect = width * height / side**2, width / height
    assert area.min() > 0.22
    assert area.max() < 1.05
    assert area.min() < 0.35
    assert aspect.min() > 0.70
    assert aspect.max() < 1.42


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.1, float("nan")])
def test_refused_crop_scale(scale):
    with pytest.raises(ConfigError, match="crop_scale"):
        augment(picture(8, 8), PLAIN, torch.Generator(), crop_scale=scale)


# --- colours ----------------------------------------------------------------------------------------------------------


def uncropped(image, seed, strength):
    """A view whose crop is the whole picture, and the generator right after the crop's draws."""
    numbers = torch.Generator().manual_seed(seed)
    augment(image, PLAIN, numbers, crop_scale=1.0, flip=False)
    view = augment(
        image, PLAIN, torch.Generator().manual_seed(seed), crop_scale=1.0, flip=False, colour_jitter=strength
    )
    return view, numbers


@pytest.mark.parametrize("strength", [0.1, 0.4, 1.0])
def test_colours_change_as_torchvisions_do(strength):
    adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    whole, compared, orders = picture(8, 8), 0, set()
    for seed in range(40):
        if not torch.equal(uncropped(whole, seed, 0.0)[0], to_pixels(whole, PLAIN)):
            continue  # a crop that isn't the whole picture
        view, numbers = uncropped(whole, seed, strength)
        order, wanted = torch.randperm(3, generator=numbers).tolist(), whole
        for place in order:
            factor = 1 + strength * (2 * float(torch.rand((), generator=numbers, dtype=torch.float64)) - 1)
            assert 1 - strength <= factor <= 1 + strength
            wanted = adjust[place](wanted, factor)
        assert torch.equal(view, to_pixels(wanted, PLAIN))
        compared += 1
        orders.add(tuple(order))
    assert compared > 20
    assert len(orders) > 3


def test_without_jitter_nothing_more_is_drawn():
    one, two = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    augment(picture(40, 30), PLAIN, one)
    augment(picture(40, 30), PLAIN, two, colour_jitter=0.0)
    assert torch.equal(one.get_state(), two.get_state())


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_refused_colour_jitter(strength):
    with pytest.raises(ConfigError, match="colour_jitter"):
        augment(picture(8, 8), PLAIN, torch.Generator(), colour_jitter=strength)
