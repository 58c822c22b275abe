"""The embedded datasets: real handwritten digits, and pictures drawn by code. No files, no network.

    digits               ten handwritten digits (real; see adaptkit.data.digits)
    shapes               24 of colour x pattern x shape, such as "red striped circle"
    textures             24 surfaces, eight of which the embedded backbone `mini` never saw or read of
    species              24 creatures whose names say nothing; their descriptions tell them apart
    shapes-sketch        `shapes` as coloured pencil outlines
    shapes-noise         `shapes` under heavy noise
    shapes-inverted      `shapes` with light and dark exchanged (hues stay)
    shapes-lowcontrast   `shapes` in thick fog

Every drawn picture depends on (dataset, split, seed, index) alone: each split has its own generator. `VERSION` changes
whenever any of them would look different.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptkit.data import drawing
from adaptkit.data.digits import DIGIT_NAMES, load_digit_splits
from adaptkit.data.drawing import Indices, Picture
from adaptkit.errors import UnknownNameError

VERSION = "1"
SPLITS = ("train", "val", "test")
IMAGES_PER_CLASS = {"train": 40, "val": 10, "test": 40}

SHAPE_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPE_CLASSES = (
    "red striped circle", "red dotted circle", "red plain heart", "red checkered square",
    "green striped circle", "green plain triangle", "green dotted star", "green checkered square",
    "blue plain hexagon", "blue striped square", "blue dotted ring", "blue checkered diamond",
    "yellow plain star", "yellow striped triangle", "yellow dotted hexagon", "yellow checkered ring",
    "purple plain diamond", "purple striped heart", "purple dotted circle", "purple checkered cross",
    "orange plain cross", "orange striped crescent", "orange dotted square", "orange checkered hexagon",
)  # fmt: skip
"""Neighbours share two of three attributes, so that no attribute is enough alone."""

UNSEEN_SHAPES = ("ring", "hexagon", "diamond", "crescent")
"""Left out of `mini`'s training, pictures and words: eight of the 24 classes have one of these forms."""

SHAPE_GROUNDS = ("white", "grey", "black", "green", "blue", "orange")

TEXTURE_CLASSES = tuple(sorted(drawing.TEXTURES))
UNSEEN_TEXTURES = tuple(drawing.TEXTURES)[-8:]
"""Left out of `mini`'s training, pictures and words: for these, only images can teach. In alphabetical order four of
them are among the base classes and four among the novel ones."""

_SPECIES_TABLE = """
vorlim  red    round      striped pointed  four bare-tail one
dakset  red    round      spotted pointed  two  long-tail two
quimbo  red    tall       plain   antennae two  bare-tail one
zaprel  red    square     striped horned   four long-tail two
mirdok  green  round      plain   antennae four long-tail one
felgat  green  flat       spotted horned   four bare-tail two
tunvik  green  flat       striped round    two  long-tail two
brosku  green  triangular plain   bare     none bare-tail one
hexalu  blue   tall       striped pointed  two  bare-tail two
jorpin  blue   tall       spotted round    none bare-tail one
wendra  blue   square     plain   antennae four long-tail two
cluvox  blue   round      spotted horned   two  long-tail one
nimsar  yellow square     plain   round    two  bare-tail two
potrek  yellow square     spotted pointed  four long-tail one
glaive  yellow triangular striped antennae none long-tail two
sulbor  yellow flat       plain   horned   four bare-tail one
yendix  purple triangular spotted horned   two  bare-tail two
ormket  purple triangular plain   round    four long-tail one
fasbul  purple round      striped bare     none long-tail two
threon  purple flat       spotted antennae two  bare-tail one
kalvup  orange tall       plain   horned   four long-tail two
rudgem  orange tall       striped bare     two  bare-tail one
ximtor  orange flat       spotted pointed  none long-tail one
beflan  orange square     striped round    four bare-tail two
"""

PHRASES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "marking": ("a body of one colour", "stripes on its body", "spots on its body"),
        "head": ("nothing on its head", "pointed ears", "round ears", "two horns", "long antennae"),
        "legs": ("no legs", "two legs", "four legs"),
        "tail": ("no tail", "a long tail"),
        "eyes": ("one big eye", "two eyes"),
    }
)
"""What each value of a creature's attributes is called, in species' descriptions and in `mini`'s captions."""

DESCRIPTION_TEMPLATE = "{name}, which has {description}."
"""The prompt that `species`' descriptions are written for. Average the normalised text features of a class."""


@dataclass(frozen=True)
class EmbeddedImages:
    """One embedded dataset, drawn.

    Attributes:
        name: One of EMBEDDED.
        class_names: In label order.
        templates: Prompts with `{}` for the class name.
        descriptions: Class name to noun phrases, for DESCRIPTION_TEMPLATE; empty where there are none.
        images: Split ("train", "val", "test") to uint8 [n, 32, 32, 3].
        labels: Split to int64 [n].
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    images: Mapping[str, NDArray[np.uint8]] = field(repr=False)
    labels: Mapping[str, NDArray[np.int64]] = field(repr=False)
    descriptions: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)


# --- How each drawn dataset draws the pictures of given classes -------------------------------------------------------


def draw_shapes(
    rng: np.random.Generator, colours: Indices, patterns: Indices, shapes: Indices, clutter: float = 0.7
) -> tuple[Picture, Picture]:
    """Coloured, patterned shapes on a ground with distractors.

    Args:
        rng: Where position, size, turn, ground, distractors and pattern colour come from.
        colours: Indices into SHAPE_COLOURS, [n].
        patterns: Indices into drawing.PATTERNS, [n].
        shapes: Indices into drawing.SHAPES, [n].
        clutter: The share of pictures with a small distractor in a corner.

    Returns:
        Pictures [n, 32, 32, 3], and signed distances (in picture halves) to the shape's edge with the pattern's mask
        behind it, [n, 32, 32, 2], for restyling.
    """
    n = len(colours)
    colour = drawing.jittered(rng, SHAPE_COLOURS, colours)
    ground = drawing.jittered(rng, SHAPE_GROUNDS, rng.integers(len(SHAPE_GROUNDS), size=n), 0.10)
    alike = np.abs(ground - colour).sum(1) < 0.6  # a red shape on a red ground would be no shape
    ground[alike] = 0.9 - 0.6 * (colour[alike].mean(1, keepdims=True) > 0.45)
    picture = drawing.draw_ground(rng, ground, 0.25)
    picture = _distract(rng, picture, clutter)
    scale = drawing.uniform(rng, 0.50, 0.85, n)
    u, v = drawing.coordinates(n, drawing.uniform(rng, -0.22, 0.22, n), drawing.uniform(rng, -0.22, 0.22, n))
    u, v = drawing.turn(u, v, drawing.uniform(rng, -0.35, 0.35, n))
    u, v = u / scale * drawing.uniform(rng, 0.88, 1.12, n), v / scale
    distance = drawing.by_kind(shapes, list(drawing.SHAPES.values()), u, v)
    pu, pv = drawing.turn(u, v, drawing.uniform(rng, -0.8, 0.8, n))
    mask = drawing.by_kind(patterns, list(drawing.PATTERNS.values()), pu + drawing.uniform(rng, -1, 1, n), pv)
    second = np.where(rng.random((n, 1)) < 0.5, 0.3 * colour, 0.35 * colour + 0.62).astype(np.float32)
    inside = drawing.coverage(distance, scale)
    picture = drawing.paint(picture, inside, colour)
    picture = drawing.paint(picture, inside * mask, second)
    return drawing.light(rng, picture), np.stack([distance * scale, mask], axis=-1)


def _distract(rng: np.random.Generator, picture: Picture, share: float) -> Picture:
    """A small round blot of any colour near a corner, on `share` of the pictures."""
    n = len(picture)
    corner = rng.choice([-0.78, 0.78], (2, n)) + rng.normal(0, 0.1, (2, n))
    u, v = drawing.coordinates(n, drawing.plane(corner[0]), drawing.plane(corner[1]))
    blot = drawing.disc(u, v, drawing.uniform(rng, 0.12, 0.26, n))
    wanted = drawing.plane(rng.random(n) < share)
    return drawing.paint(picture, drawing.coverage(blot) * wanted, rng.random((n, 3)))


def draw_textures(rng: np.random.Generator, kinds: Indices) -> Picture:
    """Textures in two colours; `kinds` indexes drawing.TEXTURES, [n]."""
    n = len(kinds)
    dark = rng.uniform(0.02, 0.45, (n, 3)).astype(np.float32)
    bright = np.clip(dark + rng.uniform(0.30, 0.60, (n, 1)) + rng.normal(0, 0.12, (n, 3)), 0, 1).astype(np.float32)
    flip = rng.random((n, 1)) < 0.5
    scale = drawing.uniform(rng, 0.75, 1.35, n)
    u, v = drawing.coordinates(n, drawing.uniform(rng, -0.5, 0.5, n), drawing.uniform(rng, -0.5, 0.5, n))
    u, v = drawing.turn(u, v, drawing.uniform(rng, -0.5, 0.5, n) + drawing.plane(rng.choice([0, np.pi / 2], n)))
    bend = drawing.smooth_noise(rng, n, 3) - 0.5
    rough = drawing.smooth_noise(rng, n, 7)
    warp = drawing.uniform(rng, 0.0, 0.30, n)
    u, v = u / scale + bend * warp, v / scale + bend * warp
    mask = drawing.by_kind(kinds, list(drawing.TEXTURES.values()), u, v, rough)
    picture = drawing.paint(
        drawing.draw_ground(rng, np.where(flip, bright, dark), 0.2), mask, np.where(flip, dark, bright)
    )
    return drawing.light(rng, picture, 1.5)


def draw_species_of(rng: np.random.Generator, kind: dict[str, Indices]) -> Picture:
    """Creatures of given attributes (see drawing.CREATURE) on grounds that say nothing."""
    n = len(kind["colour"])
    muted = np.clip(rng.uniform(0.25, 0.95, (n, 1)) + rng.normal(0, 0.06, (n, 3)), 0, 1).astype(np.float32)
    picture = _distract(rng, drawing.draw_ground(rng, muted, 0.3), 0.3)
    return drawing.light(rng, drawing.draw_creatures(rng, kind, picture))


# --- Shifts of `shapes` -----------------------------------------------------------------------------------------------


def _sketch(rng: np.random.Generator, picture: Picture, form: Picture, colour: NDArray[np.float32]) -> Picture:
    n = len(picture)
    paper = drawing.draw_ground(rng, drawing.jittered(rng, ("white",), np.zeros(n, dtype=int), 0.02), 0.06)
    wobble = (drawing.smooth_noise(rng, n, 9) - 0.5) * 0.10
    outline = drawing.coverage(np.abs(form[..., 0] + wobble) - 0.055)
    hatch = drawing.coverage(form[..., 0]) * (1 - np.abs(2 * form[..., 1] - 1)) * (form[..., 1] > 0)
    shading = drawing.coverage(form[..., 0]) * 0.28 * drawing.smooth_noise(rng, n, 12)
    return drawing.paint(paper, np.clip(np.maximum(outline, hatch) * 0.9 + shading, 0, 1), colour * 0.8)


def _noise(rng: np.random.Generator, picture: Picture, form: Picture, colour: NDArray[np.float32]) -> Picture:
    noisy = picture + rng.standard_normal(picture.shape, dtype=np.float32) * 0.20
    dead = rng.random(picture.shape[:3]) < 0.08
    return np.where(dead[..., None], rng.integers(0, 2, picture.shape[:3])[..., None], np.clip(noisy, 0, 1))


def _inverted(rng: np.random.Generator, picture: Picture, form: Picture, colour: NDArray[np.float32]) -> Picture:
    return np.clip(picture + 1 - picture.max(3, keepdims=True) - picture.min(3, keepdims=True), 0, 1)


def _lowcontrast(rng: np.random.Generator, picture: Picture, form: Picture, colour: NDArray[np.float32]) -> Picture:
    n = len(picture)
    fog = rng.uniform(0.45, 0.85, (n, 1, 1, 3)).astype(np.float32)
    thickness = drawing.uniform(rng, 0.62, 0.80, n)[..., None]
    return picture + thickness * (fog - picture)


SHIFTS: Mapping[str, Callable[..., Picture]] = MappingProxyType(
    {
        "shapes-sketch": _sketch,
        "shapes-noise": _noise,
        "shapes-inverted": _inverted,
        "shapes-lowcontrast": _lowcontrast,
    }
)


# --- The datasets -----------------------------------------------------------------------------------------------------


def shape_attributes(name: str) -> tuple[int, int, int]:
    """Indices of a shapes class's colour, pattern and shape."""
    colour, pattern, shape = name.split()
    return SHAPE_COLOURS.index(colour), list(drawing.PATTERNS).index(pattern), list(drawing.SHAPES).index(shape)


@lru_cache(maxsize=1)
def species_attributes() -> Mapping[str, dict[str, int]]:
    """Species name to the index of each attribute in drawing.CREATURE."""
    out: dict[str, dict[str, int]] = {}
    for line in _SPECIES_TABLE.split("\n"):
        name, *words = line.replace("bare-tail", "none").replace("long-tail", "long").split() or [""]
        if name:
            keys = drawing.CREATURE.items()
            out[name] = {key: values.index(word) for (key, values), word in zip(keys, words, strict=True)}
    return MappingProxyType(out)


def describe_creature(kind: Mapping[str, int]) -> tuple[str, ...]:
    """The noun phrases that are true of a creature, one per thing to see."""
    shape, colour = (drawing.CREATURE[key][kind[key]] for key in ("shape", "colour"))
    body = f"a {shape} body", f"{'an' if colour == 'orange' else 'a'} {colour} body"
    return *body, *(PHRASES[key][kind[key]] for key in PHRASES)


def _draw(name: str, rng: np.random.Generator, labels: NDArray[np.int64]) -> Picture:
    if name == "textures":
        return draw_textures(rng, np.array([list(drawing.TEXTURES).index(name) for name in TEXTURE_CLASSES])[labels])
    if name == "species":
        table = list(species_attributes().values())
        return draw_species_of(rng, {key: np.array([row[key] for row in table])[labels] for key in drawing.CREATURE})
    colours, patterns, shapes = np.array([shape_attributes(name) for name in SHAPE_CLASSES]).T[:, labels]
    picture, form = draw_shapes(rng, colours, patterns, shapes)
    if name in SHIFTS:
        return SHIFTS[name](rng, picture, form, drawing.jittered(rng, SHAPE_COLOURS, colours, 0.05))
    return picture


_GENERIC = ("a photo of a {}.",)
_CLASSES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = MappingProxyType(
    {
        "digits": (DIGIT_NAMES, ("a photo of the digit {}.",)),
        "shapes": (SHAPE_CLASSES, _GENERIC),
        "textures": (TEXTURE_CLASSES, ("a photo of a {} texture.",)),
        "species": (tuple(species_attributes()), ("a photo of a {}, a type of creature.",)),
        **dict.fromkeys(SHIFTS, (SHAPE_CLASSES, _GENERIC)),
    }
)

EMBEDDED: tuple[str, ...] = tuple(_CLASSES)
"""The embedded datasets' names."""

SUMMARIES: Mapping[str, str] = MappingProxyType(
    {
        "digits": "1,797 real handwritten digits from scikit-learn, enlarged from 8x8 to 32x32 (10 classes)",
        "shapes": "drawn: colour x pattern x shape, such as 'red striped circle' (24 classes)",
        "textures": "drawn: surfaces such as 'woven' and 'cracked', eight of them unknown to mini (24 classes)",
        "species": "drawn: creatures whose names say nothing and whose descriptions tell them apart (24 classes)",
        "shapes-sketch": "shift of shapes: coloured pencil outlines (24 classes)",
        "shapes-noise": "shift of shapes: heavy noise and dead pixels (24 classes)",
        "shapes-inverted": "shift of shapes: light and dark exchanged, hues kept (24 classes)",
        "shapes-lowcontrast": "shift of shapes: thick coloured fog (24 classes)",
    }
)
"""One line on each, without drawing anything."""


def is_embedded(name: str) -> bool:
    """Whether `name` is an embedded dataset."""
    return name in _CLASSES


@lru_cache(maxsize=8)
def load_embedded(name: str, seed: int = 0) -> EmbeddedImages:
    """Draw (or, for digits, load) an embedded dataset.

    Args:
        name: One of EMBEDDED.
        seed: Another seed, other pictures of the same classes. `digits` is real and has one split: it ignores this.

    Returns:
        All splits. Treat the arrays as read-only (they are marked so): the result is kept for the next call.

    Raises:
        UnknownNameError: The name isn't in EMBEDDED.

    Example:
        >>> data = load_embedded("shapes")
        >>> data.class_names[0], data.images["test"].shape
        ('red striped circle', (960, 32, 32, 3))
    """
    if not is_embedded(name):
        raise UnknownNameError.for_name("embedded dataset", name, EMBEDDED)
    class_names, templates = _CLASSES[name]
    images: dict[str, NDArray[np.uint8]]
    if name == "digits":
        images, labels = load_digit_splits()
    else:
        labels = {split: np.repeat(np.arange(len(class_names)), IMAGES_PER_CLASS[split]) for split in SPLITS}
        images = {
            split: drawing.to_bytes(_draw(name, _generator(name, split, seed), labels[split])) for split in SPLITS
        }
    arrays: tuple[NDArray[Any], ...] = (*images.values(), *labels.values())
    for array in arrays:
        array.setflags(write=False)
    known = species_attributes() if name == "species" else {}
    descriptions = {species: describe_creature(kind) for species, kind in known.items()}
    return EmbeddedImages(name, class_names, templates, images, labels, descriptions)


def _generator(name: str, split: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(f"{name}/{split}".encode())])


def contact_sheet(name: str, path: str | Path, columns: int = 12, enlarge: int = 3, seed: int = 0) -> None:
    """Save a PNG with one row of training images per class."""
    from PIL import Image

    data = load_embedded(name, seed)
    rows = [data.images["train"][data.labels["train"] == label][:columns] for label in range(len(data.class_names))]
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    Image.fromarray(sheet.repeat(enlarge, axis=0).repeat(enlarge, axis=1)).save(path)
