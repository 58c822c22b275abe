"""Questions about drawn pictures with their answers: what `mini-mllm` is trained on.

The forms are those that adaptkit's methods use: the name alone, lettered choice, yes or no, attributes, and the two
"in one word" questions behind its features. Pictures come from `stream`, so what that keeps out is kept out here too:
forms, textures, class combinations and species, as pictures and as words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from adaptkit.backbones.mllm.model import IMAGE_PROMPT, TEXT_PROMPT
from adaptkit.data import drawing, synthetic
from adaptkit.methods.mllm._asking import QUESTION
from adaptkit.methods.mllm._letters import LETTERS, options_text
from benchmarks.pretrain_mini import stream

COLOURS = synthetic.SHAPE_COLOURS
PATTERNS = tuple(drawing.PATTERNS)
FORMS = tuple(name for name in drawing.SHAPES if name not in synthetic.UNSEEN_SHAPES)
TEXTURES = tuple(name for name in drawing.TEXTURES if name not in synthetic.UNSEEN_TEXTURES)
HEADS = synthetic.PHRASES["head"]
YES_NO = "Answer yes or no."
ONE_WORD = "Answer with one word."
SHARES = {"shapes": 0.42, "glyphs": 0.24, "textures": 0.14, "creatures": 0.2}

SENTENCES = (
    *("a photo of a {}.", "{}", "a {}.", "a photo of the {}.", "a picture of a {}.", "an image of a {}."),
    *("a photo of the digit {}.", "a photo of a {} texture.", "a photo of a {}, a type of creature."),
)


@dataclass(frozen=True)
class Picture:
    """What is true of a picture.

    Args:
        kind: One of SHARES.
        name: Its full name.
        facts: Attribute to value.
    """

    kind: str
    name: str
    facts: dict[str, str]


@dataclass(frozen=True)
class Asked:
    """One question and its answer.

    Args:
        question: The question.
        answer: The answer.
        image: Whether it is about the picture.
        options: The options of a lettered choice.
    """

    question: str
    answer: str
    image: bool = True
    options: tuple[str, ...] = ()


def draw_pictures(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[Picture]]:
    """Pictures uint8 [size, 32, 32, 3] of all kinds in fixed shares, and what is true of each."""
    drawn, known = [], []
    counts = {kind: round(share * size) for kind, share in SHARES.items()}
    counts["shapes"] += size - sum(counts.values())
    for kind, count in counts.items():
        pictures, targets, _ = getattr(stream, f"_draw_{kind}")(rng, count)
        drawn.append(drawing.to_bytes(pictures))
        known += [_DESCRIBE[kind]({key: int(values[row]) for key, values in targets.items()}) for row in range(count)]
    return np.concatenate(drawn), known


def _glyph(target: dict[str, int]) -> Picture:
    name = stream.GLYPH_NAMES[target["glyph"]].removeprefix("the digit ").removeprefix("the ")
    ink, paper = (stream.COLOUR_NAMES[target[key]] for key in ("ink", "paper"))
    return Picture("glyphs", name, {"colour": ink, "background": paper})


def _shape(target: dict[str, int]) -> Picture:
    form = list(drawing.SHAPES)[target["shape"]]
    facts = {"colour": COLOURS[target["shape_colour"]], "pattern": PATTERNS[target["pattern"]], "shape": form}
    return Picture("shapes", " ".join(facts.values()), facts)


def _texture(target: dict[str, int]) -> Picture:
    return Picture("textures", list(drawing.TEXTURES)[target["texture"]], {})


def _creature(target: dict[str, int]) -> Picture:
    words = {key: drawing.CREATURE[key][target[f"creature_{key}"]] for key in ("colour", "marking", "shape")}
    seen = {key: synthetic.PHRASES[key][target[f"creature_{key}"]] for key in ("head", "legs", "tail", "eyes")}
    return Picture("creatures", _creature_name(words, target["creature_head"]), words | seen)


def _creature_name(facts: dict[str, str], head: int) -> str:
    return f"{facts['colour']} {facts['marking']} {facts['shape']} creature with {HEADS[head]}"


_DESCRIBE: dict[str, Callable[[dict[str, int]], Picture]] = {
    "shapes": _shape,
    "glyphs": _glyph,
    "textures": _texture,
    "creatures": _creature,
}


# --- names that are not the picture's ---------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _shape_name(rng: np.random.Generator, near: dict[str, str] | None = None) -> str:
    """A shape's name that isn't kept out; most share one or two attributes with `near`."""
    while True:
        words = [_pick(rng, COLOURS), _pick(rng, PATTERNS), _pick(rng, FORMS)]
        if near is not None:
            own = [near["colour"], near["pattern"], near["shape"]]
            words = [mine if rng.random() < 0.5 else word for mine, word in zip(own, words, strict=True)]
        if " ".join(words) not in synthetic.SHAPE_CLASSES:
            return " ".join(words)


def _creature_of(rng: np.random.Generator, near: dict[str, str] | None = None) -> str:
    facts = {key: _pick(rng, drawing.CREATURE[key]) for key in ("colour", "marking", "shape")}
    if near is not None:
        facts = {key: near[key] if rng.random() < 0.5 else value for key, value in facts.items()}
    head = int(rng.integers(len(HEADS)))
    if near is not None and rng.random() < 0.5:
        head = HEADS.index(near["head"])
    return _creature_name(facts, head)


def _glyph_name(rng: np.random.Generator) -> str:
    share = 10 if rng.random() < 0.7 else len(stream.GLYPH_NAMES)
    return stream.GLYPH_NAMES[int(rng.integers(share))].removeprefix("the digit ").removeprefix("the ")


def other_name(rng: np.random.Generator, picture: Picture | None = None) -> str:
    """A name, usually of the picture's own kind; it can be the picture's by chance."""
    kind = picture.kind if picture is not None and rng.random() < 0.9 else _pick(rng, tuple(SHARES))
    near = picture.facts if picture is not None and picture.kind == kind else None
    if kind == "shapes":
        return _shape_name(rng, near)
    if kind == "creatures":
        return _creature_of(rng, near)
    return _glyph_name(rng) if kind == "glyphs" else _pick(rng, TEXTURES)


def wrong_names(rng: np.random.Generator, picture: Picture, count: int) -> list[str]:
    """Different names that aren't the picture's."""
    found: list[str] = []
    while len(found) < count:
        name = other_name(rng, picture)
        if name != picture.name and name not in found:
            found.append(name)
    return found


def invented(rng: np.random.Generator) -> str:
    """One or two made-up words, none of them a species."""
    return " ".join(stream._invented(rng) for _ in range(1 + int(rng.random() < 0.3)))


# --- the questions ----------------------------------------------------------------------------------------------------

_NOUNS = {
    "shapes": ("object", "object", "object", "shape", "thing", "figure"),
    "glyphs": ("object", "object", "object", "digit", "symbol", "number"),
    "textures": ("object", "object", "object", "texture", "surface", "material"),
    "creatures": ("creature", "creature", "creature", "object", "animal", "species"),
}
_ATTRIBUTES = {
    "colour": ("What colour is it?", "What is the colour of the object?"),
    "background": ("What colour is the background?",),
    "pattern": ("What pattern does it have?", "How is the object filled?"),
    "shape": ("What shape is it?", "What is the shape of the object?"),
    "marking": ("How is its body marked?",),
    "head": ("What is on its head?",),
    "legs": ("How many legs does it have?",),
    "tail": ("What tail does it have?",),
    "eyes": ("How many eyes does it have?",),
}


def question_of(rng: np.random.Generator, picture: Picture) -> str:
    """The question for the name."""
    return QUESTION.format(noun=_pick(rng, _NOUNS[picture.kind]))


def naming(rng: np.random.Generator, picture: Picture) -> Asked:
    question = IMAGE_PROMPT if rng.random() < 0.15 else question_of(rng, picture)
    return Asked(question, picture.name)


def lettered(rng: np.random.Generator, picture: Picture) -> Asked:
    count = int(rng.choice([2, 3, 4, 5, 6], p=[0.12, 0.12, 0.56, 0.1, 0.1]))
    if picture.kind == "creatures":
        count = min(count, 3)  # their names are long, and all rows are padded to the longest
    names = [picture.name, *wrong_names(rng, picture, count - 1)]
    order = rng.permutation(count)
    options = tuple(names[index] for index in order)
    letter = LETTERS[int(np.flatnonzero(order == 0)[0])]
    return Asked(options_text(question_of(rng, picture), options), letter, options=options)


def attribute(rng: np.random.Generator, picture: Picture) -> Asked:
    if not picture.facts:
        return naming(rng, picture)
    key = _pick(rng, tuple(picture.facts))
    return Asked(f"{_pick(rng, _ATTRIBUTES[key])} {ONE_WORD}", picture.facts[key])


def yes_no(rng: np.random.Generator, picture: Picture) -> Asked:
    name = picture.name if rng.random() < 0.5 else wrong_names(rng, picture, 1)[0]
    forms = ("Is this a {}?", "Does the image show a {}?", "Is a {} shown in the image?")
    answer = "yes" if name == picture.name else "no"
    return Asked(f"{_pick(rng, forms).format(name)} {YES_NO}", answer)


def sentence(rng: np.random.Generator, picture: Picture | None = None) -> Asked:
    """A text to be summarised: what its feature is made from."""
    name = invented(rng) if rng.random() < 0.4 else other_name(rng, picture)
    return Asked(TEXT_PROMPT.format(_pick(rng, SENTENCES).format(name)), name, image=False)


def questions(rng: np.random.Generator, picture: Picture) -> list[Asked]:
    """What is asked about one picture: its name, a lettered choice, and one thing more."""
    more = (attribute, yes_no, sentence)[int(rng.choice(3, p=[0.4, 0.35, 0.25]))]
    return [naming(rng, picture), lettered(rng, picture), more(rng, picture)]


def corpus(seed: int = 0, pictures: int = 4000) -> tuple[list[str], list[str]]:
    """Words of the questions and answers, each once and sorted, and made-up words."""
    rng = np.random.default_rng([seed, 9])
    words: set[str] = set()
    for picture in draw_pictures(rng, pictures)[1]:
        for item in (*questions(rng, picture), yes_no(rng, picture), attribute(rng, picture)):
            if item.image:
                words.update(f"{item.question} {item.answer}".split())
    for text in SENTENCES:
        words.update(text.split())
    return sorted(words), [invented(rng) for _ in range(1500)]
