"""Drawing small pictures with numpy: signed distances, patterns, textures, creatures, light.

Everything works on batches. A shape is a signed distance in its own coordinates (negative inside, the unit square
around
it), so that one clipped ramp gives its coverage, with smooth edges and no supersampling. `adaptkit.data.synthetic`
turns these pieces into datasets; `benchmarks/pretrain_mini` draws its training stream with them.

Shapes used throughout: n pictures of SIZE x SIZE pixels; "plane" is float32 [n, SIZE, SIZE], "picture" float32
[n, SIZE, SIZE, 3] in 0..1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.floating[Any]]
Picture = NDArray[np.floating[Any]]
Indices = NDArray[np.integer[Any]]

SIZE = 32

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.13, 0.12),
    "green": (0.16, 0.62, 0.20),
    "blue": (0.14, 0.28, 0.85),
    "yellow": (0.94, 0.84, 0.14),
    "purple": (0.55, 0.16, 0.70),
    "orange": (0.96, 0.52, 0.08),
    "white": (0.96, 0.96, 0.96),
    "black": (0.06, 0.06, 0.06),
    "grey": (0.50, 0.50, 0.50),
}
"""Colour words and what they look like before jitter and light."""


def plane(values: NDArray[Any] | float) -> Plane:
    """Per-picture numbers [n] as [n, 1, 1], ready to combine with planes."""
    return np.asarray(values, dtype=np.float32).reshape(-1, 1, 1)


def uniform(rng: np.random.Generator, low: float, high: float, n: int) -> Plane:
    """One float per picture, [n, 1, 1]."""
    return plane(rng.uniform(low, high, n))


def coordinates(n: int, x: Plane | float = 0.0, y: Plane | float = 0.0) -> tuple[Plane, Plane]:
    """Pixel centres in -1..1 (y grows downwards), moved so that (x, y) is the origin."""
    axis = (np.arange(SIZE, dtype=np.float32) + 0.5) * (2.0 / SIZE) - 1.0
    across = np.broadcast_to(axis[None, None, :], (n, SIZE, SIZE))
    down = np.broadcast_to(axis[None, :, None], (n, SIZE, SIZE))
    return across - plane(x), down - plane(y)


def turn(u: Plane, v: Plane, angle: Plane | float) -> tuple[Plane, Plane]:
    """Rotate coordinates by `angle` radians."""
    cos, sin = np.cos(plane(angle)), np.sin(plane(angle))
    return u * cos + v * sin, v * cos - u * sin


def coverage(distance: Plane, scale: Plane | float = 1.0) -> Plane:
    """Signed distance (in units of `scale` picture halves) to 0..1 coverage, one pixel of ramp."""
    return np.clip(0.5 - distance * plane(scale) * (SIZE / 2), 0.0, 1.0)


def paint(picture: Picture, cover: Plane, colour: NDArray[Any]) -> Picture:
    """Lay `colour` ([n, 3] or a picture) over `picture` where `cover` is 1."""
    ink = np.asarray(colour, dtype=np.float32)
    if ink.ndim == 2:
        ink = ink[:, None, None, :]
    return picture + cover[..., None] * (ink - picture)


def jittered(
    rng: np.random.Generator, names: Sequence[str], picks: Indices, amount: float = 0.07
) -> NDArray[np.float32]:
    """A variation of each named colour, [n, 3]."""
    table = np.array([COLOURS[name] for name in names], dtype=np.float32)
    return np.clip(table[picks] + rng.normal(0, amount, (len(picks), 3)), 0, 1).astype(np.float32)


def by_kind(kinds: Indices, painters: Sequence[Callable[..., Plane]], *planes: Plane) -> Plane:
    """Run each painter on the pictures of its kind only, [n, SIZE, SIZE]."""
    out = np.empty((len(kinds), SIZE, SIZE), dtype=np.float32)
    for kind in np.unique(kinds):
        rows = np.flatnonzero(kinds == kind)
        out[rows] = painters[kind](*(p[rows] for p in planes))
    return out


# --- Shapes: signed distances in a unit square ------------------------------------------------------------------------


def box(u: Plane, v: Plane, half_width: Plane | float, half_height: Plane | float) -> Plane:
    """A rectangle around the origin."""
    return np.maximum(np.abs(u) - plane(half_width), np.abs(v) - plane(half_height))


def disc(u: Plane, v: Plane, radius: Plane | float) -> Plane:
    """A circle around the origin."""
    return np.hypot(u, v) - plane(radius)


def segment(u: Plane, v: Plane, start: tuple[Any, Any], end: tuple[Any, Any], thickness: Plane | float) -> Plane:
    """A line with round ends from `start` to `end`."""
    x0, y0, x1, y1 = (plane(value) for value in (*start, *end))
    dx, dy = x1 - x0, y1 - y0
    along = np.clip(((u - x0) * dx + (v - y0) * dy) / (dx * dx + dy * dy + 1e-6), 0, 1)
    return np.hypot(u - x0 - along * dx, v - y0 - along * dy) - plane(thickness)


def polygon(u: Plane, v: Plane, sides: int, inradius: float) -> Plane:
    """A regular polygon with one corner up."""
    angle = np.arctan2(u, -v)
    step = 2 * np.pi / sides
    folded = np.mod(angle, step) - step / 2
    return np.hypot(u, v) * np.cos(folded) - inradius


def _star(u: Plane, v: Plane) -> Plane:
    radius, step = np.hypot(u, v), 2 * np.pi / 5
    folded = np.abs(np.mod(np.arctan2(u, -v) + step / 2, step) - step / 2)  # 0 at a tip, step/2 at a dent
    x, y = radius * np.cos(folded), radius * np.sin(folded)
    tip, dent = (0.95, 0.0), (0.40 * np.cos(step / 2), 0.40 * np.sin(step / 2))
    normal = np.array([dent[1] - tip[1], tip[0] - dent[0]])
    normal /= np.linalg.norm(normal)
    return ((x - tip[0]) * normal[0] + (y - tip[1]) * normal[1]).astype(np.float32)


def _heart(u: Plane, v: Plane) -> Plane:
    x, y = np.abs(u), v + 0.15
    lobes = np.hypot(x - 0.40, y + 0.20) - 0.44
    point = np.maximum((x + y - 0.80) * 0.7071, -y - 0.10)
    return np.minimum(lobes, point)


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": lambda u, v: disc(u, v, 0.80),
    "square": lambda u, v: box(u, v, 0.70, 0.70),
    "triangle": lambda u, v: polygon(u, v + -0.15, 3, 0.48),
    "star": _star,
    "cross": lambda u, v: np.minimum(box(u, v, 0.27, 0.85), box(u, v, 0.85, 0.27)),
    "heart": _heart,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.60) - 0.24,
    "hexagon": lambda u, v: polygon(u, v, 6, 0.74),
    "diamond": lambda u, v: (np.abs(u) * 1.35 + np.abs(v) * 0.85) * 0.75 - 0.62,
    "crescent": lambda u, v: np.maximum(disc(u, v, 0.85), -disc(u - 0.42, v, 0.68)),
}


# --- Patterns: 0..1 masks of a second colour inside a shape -----------------------------------------------------------


def _soft(wave: Plane, sharpness: float = 3.0) -> Plane:
    return np.clip(0.5 + wave * sharpness, 0, 1)


PATTERNS: dict[str, Callable[[Plane, Plane], Plane]] = {
    "plain": lambda u, v: np.zeros_like(u),
    "striped": lambda u, v: _soft(np.sin(u * 8.5 + 1.0)),
    "dotted": lambda u, v: _soft(np.cos(u * 8.0) + np.cos(v * 8.0) - 0.75, 2.0),
    "checkered": lambda u, v: _soft(np.sin(u * 5.5) * np.sin(v * 5.5), 5.0),
}


# --- Textures: 0..1 masks over the whole picture; f is a lattice of 0..1 noise per picture ----------------------------


def smooth_noise(rng: np.random.Generator, n: int, cells: int) -> Plane:
    """Smooth 0..1 noise with `cells` bumps across."""
    knots = rng.random((n, cells + 1, cells + 1), dtype=np.float32)
    position = (np.arange(SIZE, dtype=np.float32) + 0.5) * cells / SIZE
    low = position.astype(int)
    t = position - low
    t = t * t * (3 - 2 * t)
    weights = np.zeros((SIZE, cells + 1), dtype=np.float32)
    weights[np.arange(SIZE), low], weights[np.arange(SIZE), low + 1] = 1 - t, t
    return np.asarray(weights @ knots @ weights.T, dtype=np.float32)


def _cell(u: Plane, v: Plane, size: float) -> tuple[Plane, Plane, Plane, Plane]:
    """Position inside a square cell (-1..1 both ways) and the cell's indices."""
    column, row = np.floor(u / size), np.floor(v / size)
    return 2 * (u / size - column) - 1, 2 * (v / size - row) - 1, column, row


def _bricks(u: Plane, v: Plane, f: Plane) -> Plane:
    row = np.floor(v / 0.36)
    x = np.mod(u / 0.72 + 0.5 * np.mod(row, 2), 1.0)
    return ((x > 0.1) & (np.mod(v / 0.36, 1.0) > 0.2)).astype(np.float32)


def _herringbone(u: Plane, v: Plane, f: Plane) -> Plane:
    column = np.floor(u / 0.5)
    sign = 1 - 2 * np.mod(column, 2)
    return _soft(np.sin((v + sign * (u - column * 0.5)) * 14))


def _hexes(u: Plane, v: Plane) -> Plane:
    """Distance to the nearest centre of a triangular lattice, minus that to the second nearest."""
    best = second = np.full_like(u, 9.0)
    for shift_u, shift_v in ((0.0, 0.0), (0.25, 0.433)):
        x = np.mod(u + shift_u + 0.25, 0.5) - 0.25
        y = np.mod(v + shift_v + 0.433, 0.866) - 0.433
        for extra in (-0.5, 0.0, 0.5):
            d = np.hypot(x + extra, y)
            second = np.minimum(second, np.maximum(best, d))
            best = np.minimum(best, d)
    return best - second


def _scales(u: Plane, v: Plane, f: Plane) -> Plane:
    row = np.floor(v / 0.26)
    x = (np.mod(u / 0.5 + 0.5 * np.mod(row, 2), 1.0) - 0.5) * 0.5
    y = (v / 0.26 - row) * 0.26
    return _soft(np.hypot(x, y) - 0.19, 20)


def _woven(u: Plane, v: Plane, f: Plane) -> Plane:
    x, y, column, row = _cell(u, v, 0.34)
    over = np.mod(column + row, 2) > 0.5
    return np.where(over, np.abs(x) < 0.62, np.abs(y) < 0.62) * np.where(over, 1.0, 0.55).astype(np.float32)


def _cracked(u: Plane, v: Plane, f: Plane) -> Plane:
    """Ridges of two noises: thin wandering lines."""
    wander = np.sin(u * 5 + f * 9) + np.cos(v * 5 - f * 8)
    return 1 - _soft(np.abs(wander) - 0.25, 4)


def _sparse_marks(u: Plane, v: Plane, f: Plane, size: float, arms: int) -> Plane:
    """One mark per cell, wandering by a hash of the cell: discs (arms 0) or stars."""
    x, y, column, row = _cell(u, v, size)
    jitter = np.mod(np.sin(column * 12.99 + row * 78.23 + f[:, :1, :1] * 40) * 437.5, 1.0)
    x, y = x + (jitter - 0.5) * 0.9, y + (np.mod(jitter * 7.3, 1.0) - 0.5) * 0.9
    radius = np.hypot(x, y)
    if arms:
        radius = radius / (0.55 + 0.45 * np.cos(arms * np.arctan2(y, x)))
    return (radius < 0.30 + 0.35 * np.mod(jitter * 3.1, 1.0)).astype(np.float32)


TEXTURES: dict[str, Callable[[Plane, Plane, Plane], Plane]] = {
    "striped": lambda u, v, f: _soft(np.sin(u * 11)),
    "checkered": lambda u, v, f: _soft(np.sin(u * 7) * np.sin(v * 7), 5),
    "dotted": lambda u, v, f: _soft(np.cos(u * 9) + np.cos(v * 9) - 0.6, 2),
    "wavy": lambda u, v, f: _soft(np.sin(v * 11 + 1.6 * np.sin(u * 5))),
    "zigzag": lambda u, v, f: _soft(np.sin(v * 11 + 6 * np.abs(np.mod(u * 1.3, 1.0) - 0.5))),
    "grid": lambda u, v, f: np.maximum(_soft(np.cos(u * 10) - 0.8, 4), _soft(np.cos(v * 10) - 0.8, 4)),
    "bricks": _bricks,
    "spiral": lambda u, v, f: _soft(np.sin(np.hypot(u, v) * 12 + np.arctan2(v, u))),
    "rings": lambda u, v, f: _soft(np.sin(np.hypot(u, v) * 13)),
    "honeycomb": lambda u, v, f: _soft(_hexes(u, v) + 0.10, 14),
    "scales": _scales,
    "woven": _woven,
    "cracked": _cracked,
    "marbled": lambda u, v, f: _soft(np.sin(u * 4 + v * 3 + f * 14), 0.7),
    "cloudy": lambda u, v, f: np.clip(f * 1.6 - 0.3, 0, 1),
    "speckled": lambda u, v, f: (
        (np.mod(np.sin(np.floor(u * 12) * 12.99 + np.floor(v * 12) * 78.23) * 437.5, 1) > 0.8) * np.float32(1)
    ),
    "sunburst": lambda u, v, f: _soft(np.sin(np.arctan2(v, u) * 8)),
    "triangles": lambda u, v, f: (np.abs(2 * np.mod(u * 1.6, 1.0) - 1) < np.mod(v * 1.6, 1.0)) * np.float32(1),
    "plaid": lambda u, v, f: 0.5 * _soft(np.sin(u * 8)) + 0.35 * _soft(np.sin(v * 8)) + 0.15 * _soft(np.sin(v * 24)),
    "herringbone": _herringbone,
    "rippled": lambda u, v, f: _soft(np.sin(np.hypot(u - 0.7, v) * 12) + np.sin(np.hypot(u + 0.7, v) * 12), 1),
    "bubbly": lambda u, v, f: _sparse_marks(u, v, f, 0.42, 0),
    "starry": lambda u, v, f: _sparse_marks(u, v, f, 0.5, 4),
    "camouflage": lambda u, v, f: np.digitize(f, (0.42, 0.56)).astype(np.float32) / 2,
}


# --- Creatures --------------------------------------------------------------------------------------------------------

BODY_SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "round": lambda u, v: disc(u, v, 0.52),
    "tall": lambda u, v: disc(u * 1.55, v * 0.92, 0.56) * 0.75,
    "flat": lambda u, v: disc(u * 0.80, v * 1.75, 0.55) * 0.65,
    "square": lambda u, v: box(u, v, 0.46, 0.46),
    "triangular": lambda u, v: polygon(u, v - 0.08, 3, 0.36),
}
_HALF_WIDTH = np.array([0.52, 0.36, 0.69, 0.46, 0.50], dtype=np.float32)  # of each body, where legs and ears attach
_TOP = np.array([0.52, 0.60, 0.31, 0.46, 0.58], dtype=np.float32)
_BOTTOM = np.array([0.50, 0.58, 0.31, 0.46, 0.42], dtype=np.float32)

CREATURE: dict[str, tuple[str, ...]] = {
    "colour": ("red", "green", "blue", "yellow", "purple", "orange"),
    "shape": tuple(BODY_SHAPES),
    "marking": ("plain", "striped", "spotted"),
    "head": ("bare", "pointed", "round", "horned", "antennae"),
    "legs": ("none", "two", "four"),
    "tail": ("none", "long"),
    "eyes": ("one", "two"),
}
"""What can vary in a creature, and the values of each attribute (arrays of indices into these are what is drawn)."""


def _limbs(u: Plane, v: Plane, kind: dict[str, Indices]) -> Plane:
    """Legs and tail, as one signed distance."""
    width, bottom = _HALF_WIDTH[kind["shape"]], _BOTTOM[kind["shape"]]
    far = np.full_like(u, 9.0)
    out = far
    for offset, inner in ((0.75, False), (0.28, True)):
        wanted = plane(kind["legs"] == 2) if inner else plane(kind["legs"] > 0)
        for side in (-1.0, 1.0):
            x = side * offset * width
            leg = segment(u, v, (x, bottom * 0.55), (x * 1.08, bottom + 0.34), 0.065)
            out = np.minimum(out, np.where(wanted > 0, leg, far))
    curl = segment(u, v, (width * 0.7, bottom * 0.4), (width + 0.28, 0.02), 0.06)
    curl = np.minimum(curl, segment(u, v, (width + 0.28, 0.02), (width + 0.24, -0.42), 0.06))
    return np.minimum(out, np.where(plane(kind["tail"]) > 0, curl, far))


def _head(u: Plane, v: Plane, kind: dict[str, Indices]) -> tuple[Plane, Plane]:
    """What grows on the head: a distance drawn in the body's colour and one drawn pale (horns)."""
    x = np.abs(u) - plane(_HALF_WIDTH[kind["shape"]]) * 0.62
    y = v + plane(_TOP[kind["shape"]]) * 0.86
    far = np.full_like(u, 9.0)
    pointed = np.maximum(np.abs(x) * 1.9 + (y * -0.9) - 0.34, y - 0.15) * 0.6
    rounded = disc(x - 0.02, y, 0.20)
    antennae = np.minimum(segment(x, y, (-0.1, 0.1), (0.06, -0.30), 0.035), disc(x - 0.06, y + 0.32, 0.095))
    horns = np.minimum(
        segment(x, y, (-0.02, 0.08), (0.12, -0.12), 0.075), segment(x, y, (0.12, -0.12), (0.04, -0.34), 0.055)
    )
    head = plane(kind["head"])
    body_coloured = np.where(head == 1, pointed, np.where(head == 2, rounded, np.where(head == 4, antennae, far)))
    return body_coloured, np.where(head == 3, horns, far)


def _markings(u: Plane, v: Plane, kind: dict[str, Indices]) -> Plane:
    """0..1 mask of the marking colour."""
    stripes = _soft(np.sin(u * 13 + 0.8) - 0.2)
    spots = _soft(np.cos(u * 13) + np.cos(v * 13 + 1.2) - 0.9, 2)
    marking = plane(kind["marking"])
    return np.where(marking == 1, stripes, np.where(marking == 2, spots, 0.0)).astype(np.float32)


def draw_creatures(rng: np.random.Generator, kind: dict[str, Indices], ground: Picture) -> Picture:
    """Draw one creature on each picture of `ground`.

    Args:
        rng: Where position, size, tilt, colour jitter and posture come from.
        kind: An index array [n] per key of CREATURE.
        ground: What to draw on, [n, SIZE, SIZE, 3].
    """
    n = len(ground)
    scale = uniform(rng, 0.72, 1.02, n)
    u, v = coordinates(n, uniform(rng, -0.16, 0.12, n), uniform(rng, -0.10, 0.18, n))
    u, v = turn(u, v, uniform(rng, -0.22, 0.22, n))
    u = u * plane(rng.choice([-1.0, 1.0], n)) / scale  # some look the other way
    v = v / scale
    body_colour = jittered(rng, CREATURE["colour"], kind["colour"], 0.06)
    dark = plane(rng.random(n) < 0.75)[..., 0]
    mark_colour = np.where(dark > 0, body_colour * 0.25, 0.55 + 0.45 * body_colour)
    grown, horns = _head(u, v, kind)
    picture = paint(ground, coverage(_limbs(u, v, kind), scale), body_colour * 0.62)
    picture = paint(picture, coverage(horns, scale), np.full((n, 3), 0.93))
    picture = paint(picture, coverage(grown, scale), body_colour * 0.80)
    body = by_kind(kind["shape"], list(BODY_SHAPES.values()), u, v)
    inside = coverage(body, scale)
    picture = paint(picture, inside, body_colour)
    picture = paint(picture, inside * _markings(u, v, kind), mark_colour)
    return _draw_eyes(picture, u, v, scale, kind)


def _draw_eyes(picture: Picture, u: Plane, v: Plane, scale: Plane, kind: dict[str, Indices]) -> Picture:
    n, single = len(picture), plane(kind["eyes"] == 0)
    x = np.where(single > 0, u, np.abs(u) - 0.19)
    y = v + plane(_TOP[kind["shape"]]) * 0.28
    size = np.where(single > 0, 0.21, 0.145).astype(np.float32)
    picture = paint(picture, coverage(disc(x, y, size), scale), np.full((n, 3), 0.97))
    return paint(picture, coverage(disc(x, y, size * 0.55), scale), np.full((n, 3), 0.04))


# --- Grounds and light ------------------------------------------------------------------------------------------------


def draw_ground(rng: np.random.Generator, colours: NDArray[np.float32], busy: float = 0.15) -> Picture:
    """Backgrounds: a colour [n, 3] each, with a soft change across the picture."""
    n = len(colours)
    shade = (smooth_noise(rng, n, 2) - 0.5) * busy + (smooth_noise(rng, n, 6) - 0.5) * (busy * 0.6)
    return np.clip(colours[:, None, None, :] + shade[..., None], 0, 1)


def light(rng: np.random.Generator, picture: Picture, strength: float = 1.0) -> Picture:
    """Light from one side, exposure, a tint and a little sensor noise; `strength` scales them all."""
    n = len(picture)
    angle = rng.uniform(0, 2 * np.pi, n)
    u, v = coordinates(n)
    slope = (u * plane(np.cos(angle)) + v * plane(np.sin(angle))) * uniform(rng, 0, 0.22 * strength, n)
    exposure = 1 + uniform(rng, -0.22 * strength, 0.18 * strength, n) + slope
    tint = 1 + rng.normal(0, 0.04 * strength, (n, 1, 1, 3)).astype(np.float32)
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * (0.03 * strength)
    return np.clip(picture * exposure[..., None] * tint + noise, 0, 1)


def to_bytes(picture: Picture) -> NDArray[np.uint8]:
    """0..1 floats to uint8."""
    return np.asarray(np.rint(np.clip(picture, 0, 1) * 255), dtype=np.uint8)
