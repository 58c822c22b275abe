"""Prompt templates and display names: from a stored class name to the sentence a text tower reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from adaptkit.config import check_templates
from adaptkit.data.catalogue import CATALOGUE
from adaptkit.data.lists import read_lines
from adaptkit.types import DEFAULT_TEMPLATES

if TYPE_CHECKING:
    from adaptkit.data.splits import Dataset

IMAGENET_ENSEMBLE = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""OpenAI's selected seven of the 80 ImageNet templates. Source: datasets sheet, section 6."""


def templates_for(name: str) -> tuple[str, ...]:
    """The templates of a known dataset by its name, the default ones for any other."""
    known = CATALOGUE.get(name)
    return DEFAULT_TEMPLATES if known is None else known.templates


def read_templates(templates: Iterable[str]) -> tuple[str, ...]:
    """Templates as they were given, an "@FILE" among them replaced by the file's lines.

    Raises:
        MissingPathError: No such file.
        DataError: It can't be read, or holds nothing.
        ConfigError: A template without exactly one `{}`.
    """
    found: list[str] = []
    for text in templates:
        found += read_lines(text[1:], "template") if text.startswith("@") and "{" not in text else [text]
    return check_templates(found) if found else ()


def display_name(stored: str) -> str:
    """A stored class name as it is read: underscores are spaces, and spaces are single.

    Example:
        >>> display_name("yorkshire_terrier")
        'yorkshire terrier'
    """
    return " ".join(stored.replace("_", " ").split())


def render(template: str, name: str) -> str:
    """The sentence for one class.

    Example:
        >>> render("a photo of a {}.", "yorkshire_terrier")
        'a photo of a yorkshire terrier.'
    """
    return check_templates(template)[0].replace("{}", display_name(name))


def preview(dataset: Dataset, n: int = 5) -> list[str]:
    """The first `n` sentences a text tower will read: every template for a class, then the next class."""
    sentences = [render(template, name) for name in dataset.class_names[:n] for template in dataset.templates]
    return sentences[:n]


def render_all(templates: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """Sentences [classes][templates]."""
    return [[render(template, name) for template in templates] for name in names]
