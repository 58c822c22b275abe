"""Preprocessing without adaptkit is adaptkit's, for every size, mode and file kind, and torchvision's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from adaptkit.backbones.base import Preprocessing
from adaptkit.data.images import load_rgb
from adaptkit.data.synthetic import load_embedded
from adaptkit.data.transforms import to_pixels
from adaptkit.export.probes import drawn_probes, own_probes
from adaptkit.export.standalone import read_rgb, to_input

WAYS = (
    Preprocessing(224),
    Preprocessing(32, interpolation="bilinear"),
    Preprocessing(64, resize="squash"),
    Preprocessing(48, (0.5,) * 3, (0.25,) * 3, resize_size=60),
)


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    return drawn_probes(tmp_path_factory.mktemp("probes"))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.image_size}-{way.resize}-{way.interpolation}")
def test_every_kind_of_file(probes, way):
    seen = set()
    for path in probes.files:
        ours, theirs = to_pixels(load_rgb(path), way).numpy(), to_input(read_rgb(path), way.to_dict())
        assert theirs.dtype == np.float32
        assert theirs.shape == (3, way.image_size, way.image_size)
        assert np.abs(ours - theirs).max() < 1e-6
        with Image.open(path) as opened:
            seen.add((opened.format, opened.mode))
    assert len(probes.files) == 32
    assert seen >= {("PNG", "RGB"), ("JPEG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("PNG", "RGBA"), ("JPEG", "CMYK")}
    assert any(mode.startswith("I") for _, mode in seen)


def test_embedded_images_and_torchvision():
    """Over the embedded pictures, enlarged: ours, the standalone one and torchvision's on PIL images are one."""
    transforms = pytest.importorskip("torchvision.transforms")
    way = Preprocessing(56)
    theirs = transforms.Compose(
        [
            transforms.Resize(56, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(56),
            transforms.ToTensor(),
            transforms.Normalize(way.mean, way.std),
        ]
    )
    compared, tensor_resize = 0, 0.0
    for name in ("shapes", "textures", "digits"):
        for place, array in enumerate(load_embedded(name).images["test"][::40]):
            image = Image.fromarray(array).resize((61 + 13 * (place % 7), 57 + 5 * (place % 11)))
            ours, wanted = to_pixels(image, way), theirs(image)
            assert torch.equal(ours, wanted)
            assert np.abs(to_input(image, way.to_dict()) - wanted.numpy()).max() < 1e-6
            on_tensor = theirs.transforms[0](theirs.transforms[2](image))  # resized as a tensor, with antialiasing
            on_image = theirs.transforms[2](theirs.transforms[0](image))
            tensor_resize = max(tensor_resize, float((on_tensor - on_image).abs().max()))
            compared += 1
    assert compared >= 50
    assert tensor_resize > 1 / 255  # what resizing elsewhere would have cost: more than a grey level


def test_own_images(tmp_path):
    for label in ("oak", "other"):
        (tmp_path / label).mkdir()
        Image.new("RGB", (4, 4), "red").save(tmp_path / label / "1.png")
    probes = own_probes(tmp_path, ("beech", "oak"))
    assert probes.labels == (1, -1)
    assert own_probes(tmp_path, (7, 8), ("other", "oak")).labels == (1, 0)
    assert own_probes(tmp_path, ("oak", "x"), ("y", "oak")).labels == (0, -1)
    assert [path.parent.name for path in probes.files] == ["oak", "other"]


def test_own_images_that_cannot_be_used(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        own_probes(tmp_path / "none", ("a",))
    with pytest.raises(ValueError, match="holds no images"):
        own_probes(tmp_path, ("a",))
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.png"):
        own_probes(tmp_path, ("a",))
