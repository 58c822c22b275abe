"""CLIP's byte-pair encoding, read from the vocabulary file that open_clip ships, without importing open_clip.

Importing open_clip takes seconds (torchvision, timm); the embedded backbone needs only this file's few lines of it.

Source: openai/CLIP, clip/simple_tokenizer.py; open_clip, tokenizer.py (which adds `clean`). A test compares ids.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import string
from collections.abc import Callable
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path

import ftfy
import regex  # type: ignore[import-untyped]  # it has no stubs here

from adaptkit.errors import BackboneError

VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
START, END = "<start_of_text>", "<end_of_text>"
NUM_MERGES = 49152 - 256 - 2  # the vocabulary's size without bytes (twice 256, once counted in 49152) and start/end
WORDS = regex.compile(
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
)


def _basic(text: str) -> str:
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _whitespace(text: str) -> str:
    return " ".join(_basic(text).split())


def _lower(text: str) -> str:
    return _whitespace(text).lower()


def _canonical(text: str) -> str:
    bare = _basic(text).replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    return " ".join(bare.lower().split())


CLEANERS: dict[str, Callable[[str], str]] = {"lower": _lower, "whitespace": _whitespace, "canonicalize": _canonical}
"""Ways of cleaning a text before it is split, by open_clip's names."""


def byte_characters() -> dict[int, str]:
    """A printable character for each byte: itself where it is printable, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@lru_cache(maxsize=1)
def _bytes_of_characters() -> dict[str, int]:
    return {character: byte for byte, character in byte_characters().items()}


def readable(text: str) -> str:
    """A text whose invisible characters are written as escapes, and blanks alone too."""
    if text.isspace():
        return "".join(f"\\x{ord(character):02x}" for character in text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class ClipBpe:
    """Splits a text into CLIP's word pieces.

    Args:
        clean: How a text is cleaned first: "lower" (CLIP), "whitespace" or "canonicalize".

    Example:
        >>> ClipBpe().encode("a photo")
        [320, 1125]
    """

    def __init__(self, clean: str = "lower") -> None:
        if clean not in CLEANERS:
            raise BackboneError(f"Unknown text cleaning {clean!r}: it must be one of {', '.join(sorted(CLEANERS))}.")
        self.clean = clean

    def __reduce__(self) -> tuple[type[ClipBpe], tuple[str]]:
        """What is remembered of words isn't pickled: it can't be, and is made again on first use."""
        return ClipBpe, (self.clean,)

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {merge: rank for rank, merge in enumerate(_merges())}

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Piece to id: bytes, bytes that end a word, merged pieces, start, end."""
        characters = list(byte_characters().values())
        pieces = [*characters, *(c + "</w>" for c in characters), *("".join(merge) for merge in _merges()), START, END]
        return {piece: index for index, piece in enumerate(pieces)}

    @property
    def start(self) -> int:
        return self.vocabulary[START]

    @property
    def end(self) -> int:
        return self.vocabulary[END]

    def encode(self, text: str) -> list[int]:
        """Ids of the text's pieces, without start and end tokens."""
        characters = byte_characters()
        ids: list[int] = []
        for word in WORDS.findall(CLEANERS[self.clean](text)):
            if word in (START, END):
                ids.append(self.vocabulary[word])
                continue
            spelled = "".join(characters[byte] for byte in word.encode("utf-8"))
            ids.extend(self.vocabulary[piece] for piece in self._pieces(spelled))
        return ids

    @cached_property
    def _spellings(self) -> list[str]:
        return list(self.vocabulary)

    def decode(self, token: int) -> str:
        """One piece as it reads: without the mark of a word's end; bytes that are no character alone as \\xe2.

        Pieces that end a word and pieces that don't read alike ("cat" is two of them).

        Raises:
            BackboneError: There is no such piece.

        Example:
            >>> ClipBpe().decode(1125)
            'photo'
        """
        if not 0 <= token < len(self._spellings):
            raise BackboneError(f"CLIP's vocabulary has pieces 0 to {len(self._spellings) - 1}, and no piece {token}.")
        piece = self._spellings[token]
        if piece in (START, END):
            return piece
        spelled = bytes(_bytes_of_characters()[character] for character in piece.removesuffix("</w>"))
        return readable(spelled.decode("utf-8", "backslashreplace"))

    @cached_property
    def _pieces(self) -> Callable[[str], tuple[str, ...]]:
        return lru_cache(maxsize=65536)(self._merge)  # words repeat across templates and class names

    def _merge(self, word: str) -> tuple[str, ...]:
        """Join the pair that was merged earliest in training, everywhere it occurs, until no known pair is left."""
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = min(pairwise(pieces), key=lambda p: self._ranks.get(p, len(self._ranks)))
            if pair not in self._ranks:
                break
            joined, i = [], 0
            while i < len(pieces):
                if tuple(pieces[i : i + 2]) == pair:
                    joined.append(pieces[i] + pieces[i + 1])
                    i += 2
                else:
                    joined.append(pieces[i])
                    i += 1
            pieces = joined
        return tuple(pieces)


@lru_cache(maxsize=1)
def _merges() -> tuple[tuple[str, str], ...]:
    found = importlib.util.find_spec("open_clip")  # finds the folder without running the package
    folders = list(found.submodule_search_locations or ()) if found else []
    for folder in folders:
        path = Path(folder) / VOCABULARY_FILE
        if path.is_file():
            lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : NUM_MERGES + 1]
            return tuple((first, second) for first, second in (line.split() for line in lines))
    raise BackboneError(f"open_clip's vocabulary file {VOCABULARY_FILE} wasn't found: install open_clip_torch.")
