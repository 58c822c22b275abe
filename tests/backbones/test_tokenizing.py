"""Tokenizers never cut a text off silently, and pool the position they say."""

from __future__ import annotations

import pickle

import open_clip
import pytest
import torch

from adaptkit.backbones.tokenizing import ClipTokenizer, OutsideTokenizer, Pooling, check_length
from adaptkit.errors import BackboneError

TEXTS = ["a photo of a cat.", "", "Größe: 北京 🦊", "two words"]


def test_rows_are_open_clips():
    tokens = ClipTokenizer()(TEXTS)
    expected = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    assert tokens.ids.dtype == torch.int64
    assert tokens.ids.tolist() == expected.tolist()
    assert tokens.ends.tolist() == expected.argmax(dim=-1).tolist()
    assert tokens.ends.dtype == torch.int64
    for row, end in zip(tokens.ids, tokens.ends, strict=True):
        assert row[0] == 49406
        assert row[end] == 49407
        assert not row[end + 1 :].any()
    assert tokens.ends[1] == 1  # an empty text is start and end


@pytest.mark.parametrize("length", [8, 16, 77])
def test_context_lengths(length):
    tokenizer = ClipTokenizer(length)
    fits = " ".join(["cat"] * (length - 2))
    tokens = tokenizer([fits, "dog"])
    assert tokens.ids.shape == (2, length)
    assert tokens.ends.tolist() == [length - 1, 2]
    with pytest.raises(
        BackboneError, match=f"{length + 1} tokens with start and end, 1 more than the {length} that fit"
    ):
        tokenizer(["dog", fits + " cat"])


def test_a_text_that_is_too_long_is_named():
    with pytest.raises(BackboneError, match=r"The text 'the long one' is too long.*Shorten it by 3 or more") as caught:
        check_length("the long one", 80, 77)
    assert "80 tokens" in str(caught.value)
    check_length("just fits", 77, 77)


def test_no_texts_give_no_rows():
    tokens = ClipTokenizer()([])
    assert tokens.ids.shape == (0, 77)
    assert tokens.ends.shape == (0,)


def test_word_pieces_have_no_start_and_end():
    assert ClipTokenizer().word_pieces("tabby cat") == [36145, 2368]
    assert ClipTokenizer().word_pieces("") == []


def test_cleaning_is_passed_on():
    row = ClipTokenizer(clean="canonicalize")(["A_CAT!"]).ids[0, :4].tolist()
    assert row == [49406, 320, 2368, 49407]


IDS = torch.tensor([[5, 1, 9, 9, 0], [7, 7, 2, 0, 0], [9, 0, 0, 0, 9]])


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (Pooling("argmax"), [2, 0, 0]),  # the first of equal ones, as torch has it
        (Pooling("first"), [0, 0, 0]),
        (Pooling("last"), [4, 4, 4]),
        (Pooling("token", 9), [2, 0, 0]),  # a token that isn't there gives 0, as open_clip and transformers do
        (Pooling("token", 2), [0, 2, 0]),
        (Pooling("token", 0), [4, 3, 1]),
    ],
)
def test_pooled_positions(pooling, expected):
    ends = pooling.ends(IDS)
    assert ends.tolist() == expected
    assert ends.dtype == torch.int64
    assert pooling.ends(IDS[:0]).shape == (0,)


def test_facts_tell_tokenizers_apart():
    tokenizers = [
        ClipTokenizer(),
        ClipTokenizer(64),
        ClipTokenizer(clean="canonicalize"),
        ClipTokenizer(pooling=Pooling("last")),
        ClipTokenizer(pooling=Pooling("token", 5)),
        ClipTokenizer(pooling=Pooling("token", 6)),
    ]
    assert len({repr(tokenizer.facts) for tokenizer in tokenizers}) == len(tokenizers) == 6
    assert ClipTokenizer().facts == ClipTokenizer(77, Pooling("argmax"), "lower").facts


def test_tokenizers_survive_pickling():
    tokenizer = ClipTokenizer(16, Pooling("last"), "canonicalize")
    before = tokenizer(TEXTS)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.facts == tokenizer.facts
    assert torch.equal(again(TEXTS).ids, before.ids)
    assert torch.equal(again(TEXTS).ends, before.ends)


# --- other libraries' tokenizers --------------------------------------------------------------------------------------


def letters(text: str) -> list[int]:
    return [ord(letter) - 96 for letter in text]


def pad_and_cut(texts: list[str]) -> torch.Tensor:
    """Cuts off silently, as other libraries do."""
    rows = [[*letters(text), 99][:6] for text in texts]
    return torch.tensor([row + [0] * (6 - len(row)) for row in rows], dtype=torch.int32)


OUTSIDE = OutsideTokenizer(
    pad_and_cut, lambda text: len(text) + 1, letters, 6, Pooling("token", 99), {"kind": "letters"}
)


def test_outside_tokenizers_are_asked_for_the_length_first():
    tokens = OUTSIDE(("ab", "abcde"))
    assert tokens.ids.tolist() == [[1, 2, 99, 0, 0, 0], [1, 2, 3, 4, 5, 99]]
    assert tokens.ids.dtype == torch.int64
    assert tokens.ends.tolist() == [2, 5]
    assert OUTSIDE.word_pieces("abc") == [1, 2, 3]
    assert OUTSIDE.facts == {"kind": "letters"}
    with pytest.raises(
        BackboneError, match="'abcdef' is too long: it has 7 tokens with start and end, 1 more than the 6"
    ):
        OUTSIDE(["ab", "abcdef"])
