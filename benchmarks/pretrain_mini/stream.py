"""The training stream of `mini`: drawn pictures with their attributes and captions. No photograph, no handwriting.

Four kinds of picture in every batch: printed glyphs in many fonts, shapes, textures, creatures. What the embedded
datasets test is kept out: the class combinations of `shapes` and four of its forms altogether, the last eight
`textures` (pictures and words), the 24 `species` (their attribute combinations and their names).
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from adaptkit.data import drawing, synthetic
from adaptkit.data.digits import DIGIT_NAMES

GLYPHS = (
    string.digits + string.ascii_uppercase + "abdefghnqrt"
)  # lower-case letters that don't look like their capitals
GLYPH_NAMES = [f"the digit {DIGIT_NAMES[int(g)]}" if g.isdigit() else f"the letter {g.lower()}" for g in GLYPHS]
COLOUR_NAMES = tuple(drawing.COLOURS)
CELL = 48
UNSEEN = [list(drawing.SHAPES).index(name) for name in synthetic.UNSEEN_SHAPES]

# Attribute heads: name to number of values.
HEADS = {
    "glyph": len(GLYPHS),
    "ink": len(COLOUR_NAMES),
    "paper": len(COLOUR_NAMES),
    "shape_colour": len(synthetic.SHAPE_COLOURS),
    "pattern": len(drawing.PATTERNS),
    "shape": len(drawing.SHAPES),
    "texture": len(synthetic.TEXTURE_CLASSES) - len(synthetic.UNSEEN_TEXTURES),
    **{f"creature_{key}": len(values) for key, values in drawing.CREATURE.items()},
}
IGNORED = -1


@dataclass
class Batch:
    """uint8-like floats [n, 3, 32, 32] in 0..1, attribute targets [n] per head (-1 where it isn't asked), captions."""

    pictures: torch.Tensor
    targets: dict[str, torch.Tensor]
    captions: list[str]


def font_files() -> list[str]:
    """Printed fonts on this machine, sorted by name; symbol and handwriting fonts are left out."""
    roots = [Path("/usr/share/fonts"), Path.home() / ".fonts", Path(".fonts")]
    files = sorted(
        {p for root in roots if root.is_dir() for p in root.rglob("*") if p.suffix.lower() in (".ttf", ".otf")}
    )
    barred = ("symbol", "emoji", "icon", "math", "dingbat", "hand", "script", "braille", "music", "tex", "initials")
    chosen = [str(p) for p in files if not any(word in p.name.lower() for word in barred)]
    return [f for f in chosen if _covers(f)]


def _covers(path: str) -> bool:
    try:
        font = ImageFont.truetype(path, 36)
        masks = {g: bytes(font.getmask(g)) for g in "0123456789AZagX"}
    except (OSError, ValueError):
        return False
    return len(set(masks.values())) == len(masks) and all(any(m) for m in masks.values())  # "missing" boxes are alike


@lru_cache(maxsize=1)
def glyph_masks() -> np.ndarray:
    """Glyphs in every font, float32 [fonts, glyphs, CELL, CELL], ink 1, scaled to fill the cell's height."""
    fonts = font_files()
    out = np.zeros((len(fonts), len(GLYPHS), CELL, CELL), dtype=np.float32)
    for f, path in enumerate(fonts):
        font = ImageFont.truetype(path, 80)
        for g, glyph in enumerate(GLYPHS):
            left, top, right, bottom = font.getbbox(glyph)
            picture = Image.new("L", (right - left + 2, bottom - top + 2))
            ImageDraw.Draw(picture).text((1 - left, 1 - top), glyph, fill=255, font=font)
            scale = (CELL - 8) / max(picture.size)
            picture = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
            x, y = (CELL - picture.width) // 2, (CELL - picture.height) // 2
            out[f, g, y : y + picture.height, x : x + picture.width] = np.asarray(picture, dtype=np.float32) / 255
    return out


def _warped(rng: np.random.Generator, masks: np.ndarray) -> np.ndarray:
    """Turned, sheared, scaled, moved and gently bent masks, [n, 32, 32]."""
    n = len(masks)
    angle, shear = rng.normal(0, 0.16, n), rng.normal(0, 0.22, n)
    wide = np.where(rng.random(n) < 0.6, rng.uniform(0.85, 1.2, n), rng.uniform(1.1, 2.0, n))
    tall = wide * rng.uniform(0.8, 1.12, n)
    cos, sin = np.cos(angle), np.sin(angle)
    theta = np.stack(
        [
            np.stack([cos * wide, (-sin + shear) * wide, rng.normal(0, 0.12, n) * wide], axis=1),
            np.stack([sin * tall, cos * tall, rng.normal(0, 0.1, n) * tall], axis=1),
        ],
        axis=1,
    )
    grid = F.affine_grid(torch.from_numpy(theta).float(), [n, 1, drawing.SIZE, drawing.SIZE], align_corners=False)
    knots = torch.from_numpy(rng.normal(0, 1, (n, 2, 4, 4)) * rng.uniform(0, 0.13, (n, 1, 1, 1))).float()
    bend = F.interpolate(knots, size=(drawing.SIZE, drawing.SIZE), mode="bicubic", align_corners=True)
    grid = grid + bend.permute(0, 2, 3, 1)
    return F.grid_sample(torch.from_numpy(masks)[:, None], grid, align_corners=False)[:, 0].numpy()


def _lowered(rng: np.random.Generator, masks: np.ndarray, share: float) -> np.ndarray:
    """A share of the masks through a low resolution and back, as scans and thumbnails are."""
    planes = torch.from_numpy(masks)[:, None]
    which = rng.random(len(masks))
    for side, low, high in ((8, 0.0, 0.55), (12, 0.55, 0.75), (16, 0.75, 1.0)):
        rows = np.flatnonzero((which >= low * share) & (which < high * share))
        if len(rows):
            small = F.interpolate(planes[rows], size=(side, side), mode="area")
            planes[rows] = F.interpolate(small, size=(drawing.SIZE,) * 2, mode="bicubic", align_corners=False).clamp(
                0, 1
            )
    return planes[:, 0].numpy()


def _draw_glyphs(rng: np.random.Generator, n: int) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
    fonts = glyph_masks()
    glyph = np.where(rng.random(n) < 0.62, rng.integers(0, 10, n), rng.integers(10, len(GLYPHS), n))
    masks = fonts[rng.integers(len(fonts), size=n), glyph].copy()
    masks = _lowered(rng, _warped(rng, masks), 0.6)
    gain = rng.uniform(0.75, 1.5, (n, 1, 1)).astype(np.float32)
    masks = np.clip(masks * gain, 0, 1)
    ink = rng.integers(len(COLOUR_NAMES), size=n)
    paper = (ink + rng.integers(1, len(COLOUR_NAMES), n)) % len(COLOUR_NAMES)
    plain = rng.random(n) < 0.3  # white on black and the reverse, as scans are
    white, black = COLOUR_NAMES.index("white"), COLOUR_NAMES.index("black")
    first = rng.random(n) < 0.7
    ink[plain], paper[plain] = np.where(first, white, black)[plain], np.where(first, black, white)[plain]
    ground = drawing.draw_ground(rng, drawing.jittered(rng, COLOUR_NAMES, paper, 0.05), 0.12)
    picture = drawing.paint(ground, masks, drawing.jittered(rng, COLOUR_NAMES, ink, 0.05))
    lit = drawing.light(rng, picture, 0.7)
    picture = np.where((rng.random(n) < 0.8)[:, None, None, None], lit, picture)
    captions = [_glyph_caption(rng, *row) for row in zip(glyph, ink, paper, strict=True)]
    return picture, {"glyph": glyph, "ink": ink, "paper": paper}, captions


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _glyph_caption(rng: np.random.Generator, glyph: int, ink: int, paper: int) -> str:
    name, colour, ground = GLYPH_NAMES[glyph], COLOUR_NAMES[ink], COLOUR_NAMES[paper]
    bare = name.split()[-1]
    forms = [f"a photo of {name}.", f"a photo of a {bare}.", f"{name}.", f"{bare}", f"a photo of the number {bare}."]
    if not GLYPHS[glyph].isdigit():
        forms[-1] = f"a photo of a {name.removeprefix('the ')}."
    if rng.random() < 0.3:
        return f"{name} in {colour} on {ground}."
    return _pick(rng, forms)


@lru_cache(maxsize=1)
def _held_out_shapes() -> frozenset[tuple[int, int, int]]:
    return frozenset(synthetic.shape_attributes(name) for name in synthetic.SHAPE_CLASSES)


def _draw_shapes(rng: np.random.Generator, n: int) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
    sizes = HEADS["shape_colour"], HEADS["pattern"], HEADS["shape"]
    kinds = np.stack([rng.integers(size, size=n) for size in sizes], axis=1)
    for row in range(n):
        while tuple(kinds[row]) in _held_out_shapes() or kinds[row, 2] in UNSEEN:
            kinds[row] = [rng.integers(size) for size in sizes]
    colour, pattern, shape = kinds.T
    picture, _ = synthetic.draw_shapes(rng, colour, pattern, shape)
    names = [synthetic.SHAPE_COLOURS, list(drawing.PATTERNS), list(drawing.SHAPES)]
    captions = []
    for row in kinds:
        words = [name[i] for name, i in zip(names, row, strict=True)]
        if rng.random() < 0.35:  # some attributes only
            keep = [rng.random() < 0.5, rng.random() < 0.5, True]
            words = [word for word, kept in zip(words, keep, strict=True) if kept]
        captions.append(_pick(rng, ("a photo of a {}.", "a {}.", "{}", "a drawing of a {}.")).format(" ".join(words)))
    return picture, {"shape_colour": colour, "pattern": pattern, "shape": shape}, captions


def _draw_textures(rng: np.random.Generator, n: int) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
    kinds = rng.integers(HEADS["texture"], size=n)
    picture = synthetic.draw_textures(rng, kinds)
    forms = ("a photo of a {} texture.", "{} texture.", "a {} surface.", "{}", "a photo of a {} surface.")
    names = list(drawing.TEXTURES)
    captions = [_pick(rng, forms).format(names[k]) for k in kinds]
    return picture, {"texture": kinds}, captions


@lru_cache(maxsize=1)
def _held_out_creatures() -> frozenset[tuple[int, ...]]:
    return frozenset(tuple(row[key] for key in drawing.CREATURE) for row in synthetic.species_attributes().values())


def _invented(rng: np.random.Generator) -> str:
    """A made-up word, none of the species' names; teaches the text tower that such names say nothing."""
    while True:
        word = "".join(_pick(rng, "bdfgklmnprstvz") + _pick(rng, "aeiou") for _ in range(2)) + _pick(rng, "klmnrst")
        if word not in synthetic.species_attributes():
            return word


def _draw_creatures(rng: np.random.Generator, n: int) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
    kind = {key: rng.integers(len(values), size=n) for key, values in drawing.CREATURE.items()}
    for row in range(n):
        while tuple(kind[key][row] for key in kind) in _held_out_creatures():
            kind["head"][row] = rng.integers(HEADS["creature_head"])
            kind["legs"][row] = rng.integers(HEADS["creature_legs"])
    captions = []
    for row in range(n):
        phrases = list(synthetic.describe_creature({key: int(values[row]) for key, values in kind.items()}))
        noun = _pick(rng, ("a creature", _invented(rng), f"a {_invented(rng)}", "a photo of a creature"))
        chosen = rng.permutation(len(phrases))[: 1 + int(rng.integers(4))]
        text = ", ".join(phrases[i] for i in chosen)
        if rng.random() < 0.15:
            captions.append(f"a photo of a {_invented(rng)}, a type of creature.")
        else:
            captions.append(f"{noun}, which has {text}.")
    return synthetic.draw_species_of(rng, kind), {f"creature_{key}": values for key, values in kind.items()}, captions


_KINDS = ((_draw_glyphs, 0.42), (_draw_shapes, 0.2), (_draw_textures, 0.14), (_draw_creatures, 0.24))


def draw_batch(rng: np.random.Generator, size: int) -> Batch:
    """One batch, all kinds of picture in fixed shares."""
    counts = [round(share * size) for _, share in _KINDS]
    counts[0] += size - sum(counts)
    targets = {head: np.full(size, IGNORED) for head in HEADS}
    pictures, captions, start = [], [], 0
    for (draw, _), count in zip(_KINDS, counts, strict=True):
        picture, values, texts = draw(rng, count)
        pictures.append(picture.astype(np.float32))
        captions += texts
        for head, value in values.items():
            targets[head][start : start + count] = value
        start += count
    stacked = torch.from_numpy(np.concatenate(pictures)).permute(0, 3, 1, 2).contiguous()
    return Batch(stacked, {head: torch.from_numpy(value) for head, value in targets.items()}, captions)
