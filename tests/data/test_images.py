"""Every kind of picture opens as upright 8-bit RGB, and every damaged one gives one clear sentence."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from adaptkit.data.images import IMAGE_SUFFIXES, load_rgb, rgb_from_array, stack_rgb
from adaptkit.errors import DataError, MissingPathError
from tests.data.pictures import save_picture

RED, GREEN, WHITE = (255, 0, 0), (0, 128, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corners(image: Image.Image) -> list[tuple[int, int, int]]:
    """Top left, top right, bottom left, bottom right."""
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(place) for place in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


def near(pixel, wanted, tolerance=6):
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, wanted, strict=True))


# --- kinds of pictures ---------------------------------------------------------------------------------------------


def test_plain_pictures_are_unchanged(tmp_path):
    path = save_picture(tmp_path / "a.png", size=(9, 7))
    wanted = np.asarray(Image.open(path))
    opened = [load_rgb(source) for source in (path, str(path), path.read_bytes(), BytesIO(path.read_bytes()))]
    with open(path, "rb") as file:
        opened.append(load_rgb(file))
    assert len(opened) == 5
    for image in opened:
        assert (image.mode, image.size) == ("RGB", (9, 7))
        assert np.array_equal(np.asarray(image), wanted)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_formats(kind):
    image = load_rgb(encoded(Image.new("RGB", (8, 6), RED), kind))
    assert (image.mode, image.size) == ("RGB", (8, 6))
    assert near(image.getpixel((4, 3)), RED)
    assert ".jpg" in IMAGE_SUFFIXES


def test_grey_and_one_bit():
    assert load_rgb(encoded(Image.new("L", (4, 4), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert load_rgb(encoded(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == WHITE


def test_palette():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *GREEN])
    assert load_rgb(encoded(image)).getpixel((2, 2)) == GREEN


def test_palette_with_a_transparent_entry():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([*RED, *GREEN])
    image.putpixel((0, 0), 0)
    opened = load_rgb(encoded(image, transparency=0))
    assert opened.getpixel((0, 0)) == WHITE
    assert opened.getpixel((1, 1)) == GREEN


def test_alpha_is_laid_on_white():
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 255, 51)):  # 51 / 255 = 20 %
        image.putpixel((x, 0), (*RED, alpha))
    opened = load_rgb(encoded(image))
    assert opened.getpixel((0, 0)) == WHITE
    assert opened.getpixel((1, 0)) == RED
    assert near(opened.getpixel((2, 0)), (255, 204, 204), 1)


def test_grey_with_alpha_and_a_transparent_colour():
    assert load_rgb(encoded(Image.new("LA", (2, 2), (10, 0)))).getpixel((0, 0)) == WHITE
    image = Image.new("RGB", (2, 1), GREEN)
    image.putpixel((0, 0), RED)
    opened = load_rgb(encoded(image, transparency=RED))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [WHITE, GREEN]


def test_cmyk():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    opened = load_rgb(encoded(image, "JPEG", quality=95))
    assert opened.mode == "RGB"
    assert near(opened.getpixel((8, 8)), RED, 12)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind):
    values = np.array([[0, 256, 257, 32768, 65535]], dtype=np.uint16)
    opened = load_rgb(encoded(Image.fromarray(values), kind))
    assert [opened.getpixel((x, 0))[0] for x in range(5)] == [0, 1, 1, 128, 255]


def test_floats_in_a_file_are_refused(tmp_path):
    path = tmp_path / "float.tif"
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(path)
    with pytest.raises(DataError, match=r"float\.tif holds 'F' values"):
        load_rgb(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation(kind):
    upright = Image.new("RGB", (32, 16), WHITE)
    upright.paste(RED, (0, 0, 16, 8))  # top left
    turns = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for orientation, undo in turns.items():
        stored = upright if undo is None else upright.transpose(undo)
        exif = Image.Exif()
        exif[0x0112] = orientation
        opened = load_rgb(encoded(stored, kind, exif=exif))
        assert opened.size == (32, 16)
        assert near(corners(opened)[0], RED), orientation
        assert all(near(pixel, WHITE) for pixel in corners(opened)[1:]), orientation


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_ignored():
    data = encoded(
        Image.new("RGB", (16, 16), GREEN), "JPEG", exif=b"Exif\0\0" + b"II*\0\xff\xff\xff\xff" + b"\xff" * 20
    )
    assert near(load_rgb(data).getpixel((8, 8)), GREEN)


def test_first_picture_of_many():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    for kind in ("GIF", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert load_rgb(data).getpixel((0, 0)) == RED


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated(kind, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    path = tmp_path / "cut.bin"
    refused = 0
    for share in (0.02, 0.3, 0.6, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(DataError, match=r"cut\.bin"):
            load_rgb(path)
        refused += 1
    assert refused == 4


def test_no_image(tmp_path):
    for content in (b"", b"plain text", b"<svg></svg>", b"%!PS-Adobe-3.0 EPSF-3.0\n", bytes(1000)):
        path = tmp_path / "no.jpg"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"no\.jpg isn't an image of a known kind"):
            load_rgb(path)


def test_missing(tmp_path):
    with pytest.raises(MissingPathError, match=r"There is no image file .*gone\.png"):
        load_rgb(tmp_path / "gone.png")
    with pytest.raises(MissingPathError):
        load_rgb(tmp_path)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 50)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [12_000, 60_000])  # Pillow itself warns at the first and refuses the second
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bomb(side):
    with pytest.raises(DataError, match=r"bomb\.png is too large"):
        load_rgb(png_claiming(side, side), name="bomb.png")


def test_pixel_limit():
    data = encoded(Image.new("RGB", (20, 10)))
    assert load_rgb(data, max_pixels=200).size == (20, 10)
    with pytest.raises(DataError, match="the image is too large: 20 × 10 pixels; at most 199"):
        load_rgb(data, max_pixels=199)


# --- arrays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4), (1, 5, 7), (3, 5, 7), (4, 5, 7)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_array_shapes(shape, dtype):
    values = np.ones(shape) if dtype != np.uint8 else np.full(shape, 255)
    image = rgb_from_array(values.astype(dtype))
    assert (image.mode, image.size) == ("RGB", (7, 5))
    assert np.asarray(image).min() == 255


def test_array_values():
    values = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    assert np.array_equal(np.asarray(rgb_from_array(values)), values)
    assert np.array_equal(np.asarray(rgb_from_array(values.transpose(2, 0, 1))), values)
    assert np.array_equal(np.asarray(rgb_from_array(values / 255)), values)
    assert np.array_equal(stack_rgb([rgb_from_array(values)] * 2), np.stack([values, values]))


@pytest.mark.parametrize(
    ("array", "part"),
    [
        (np.zeros((2, 2, 2), np.uint8), "has shape"),
        (np.zeros(4, np.uint8), "has shape"),
        (np.zeros((0, 4, 3), np.uint8), "has shape"),
        (np.zeros((2, 2, 3), np.int64), "dtype int64"),
        (np.full((2, 2, 3), 1.01), "aren't normalised"),
        (np.full((2, 2, 3), np.nan), "aren't normalised"),
        (np.full((2, 2, 3), -0.1), "aren't normalised"),
    ],
)
def test_refused_arrays(array, part):
    with pytest.raises(DataError, match=part):
        rgb_from_array(array)
