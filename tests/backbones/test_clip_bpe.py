"""Our reading of CLIP's vocabulary gives the ids that open_clip's tokenizer gives."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer, bytes_to_unicode

from adaptkit.backbones import clip_bpe
from adaptkit.backbones.clip_bpe import CLEANERS, END, START, ClipBpe, byte_characters
from adaptkit.errors import BackboneError

TEXTS = [
    "a photo of a cat.",
    "",
    " ",
    "A Photo  of\ta\nCAT",
    "it's we're I'm don't you'll he'd they've IT'S",
    "numbers 123 4,567.89 x2",
    "...!!! ?!,;:-_=+ #hash @at $5 50% a/b\\c",
    "snake_case_class_name, Boeing 737-200, C-130",
    "naïve café Zürich Łódź São Paulo smörgåsbord",
    "北京烤鸭 寿司 김치 пельмени μουσακάς שווארמה शाकाहारी ข้าวผัด",
    "🦊 🐈‍⬛ 👩🏽‍🚀 🇩🇪",
    "fix &amp;amp; these &lt;b&gt; &eacute; &nbsp; entities",
    "broken schÃ¶n Ã© â€œquotesâ€\x9d",  # ftfy mends it
    "“curly” ‘quotes’ — dash… ﬁ ligature ½ ² №",
    "zero\u200bwidth non\u00a0breaking soft\u00adhyphen \ufeffmark",
    "e\u0301 combining A\u030a",
    "İstanbul ẞ ǅ",  # lower case changes the length
    "control \x00 \x07 \x1b[31m red",
    "lone \ud800 surrogate \udcff",
    "<start_of_text> a photo <end_of_text>",
    "<START_OF_TEXT> not special <End_Of_Text>",
    "<|startoftext|> also not <|endoftext|>",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "a" * 300,
    "the " * 100,
    "ab" * 50 + "!" * 40,
    "aaabbb ababab xyxyx abcabcabc",  # pairs that overlap when merged
]


@pytest.fixture(scope="module")
def theirs():
    return {clean: SimpleTokenizer(clean=clean) for clean in CLEANERS}


def test_ids_are_open_clips(theirs):
    compared = 0
    for clean, tokenizer in theirs.items():
        ours = ClipBpe(clean)
        for text in TEXTS:
            assert ours.encode(text) == tokenizer.encode(text), (clean, text)
            compared += 1
    assert compared == 3 * 27


@settings(deadline=None, max_examples=120)
@given(
    text=st.text(max_size=30) | st.text("ab cde'st.,_&;<>0123é ", max_size=60), clean=st.sampled_from(sorted(CLEANERS))
)
def test_ids_are_open_clips_for_any_text(theirs, text, clean):
    assert ClipBpe(clean).encode(text) == theirs[clean].encode(text)


def test_vocabulary_is_open_clips(theirs):
    ours = ClipBpe()
    assert len(ours.vocabulary) == 49408
    assert ours.vocabulary == theirs["lower"].encoder
    assert (ours.start, ours.end) == (49406, 49407)
    assert (ours.vocabulary[START], ours.vocabulary[END]) == (ours.start, ours.end)
    assert byte_characters() == bytes_to_unicode()
    assert list(byte_characters()) == list(bytes_to_unicode())  # their order gives the ids
    assert len(set(byte_characters().values())) == 256


def test_known_ids():
    assert ClipBpe().encode("a photo of a cat.") == [320, 1125, 539, 320, 2368, 269]
    assert ClipBpe().encode("") == []
    assert ClipBpe("canonicalize").encode("A photo_of a Cat!") == ClipBpe().encode("a photo of a cat")
    assert ClipBpe("whitespace").encode("CAT") != ClipBpe().encode("CAT")


def test_copies_and_pickles_work_after_use():
    for clean in CLEANERS:
        bpe = ClipBpe(clean)
        ids = bpe.encode("A photo_of a tabby CAT")
        for again in (pickle.loads(pickle.dumps(bpe)), copy.deepcopy(bpe), copy.copy(bpe)):
            assert type(again) is ClipBpe
            assert again.clean == clean
            assert again.encode("A photo_of a tabby CAT") == ids
        assert len(pickle.dumps(bpe)) < 200  # neither the vocabulary nor what is remembered of words
    assert len(CLEANERS) == 3


def test_an_unknown_cleaning_is_refused():
    with pytest.raises(
        BackboneError, match="Unknown text cleaning 'upper': it must be one of canonicalize, lower, white"
    ):
        ClipBpe("upper")


def test_a_missing_vocabulary_file_is_said_plainly(monkeypatch):
    monkeypatch.setattr(clip_bpe.importlib.util, "find_spec", lambda name: None)
    clip_bpe._merges.cache_clear()
    try:
        with pytest.raises(BackboneError, match="install open_clip_torch"):
            ClipBpe().encode("a")
    finally:
        clip_bpe._merges.cache_clear()


def test_open_clip_is_not_imported():
    """That is what this module is for: importing open_clip takes seconds."""
    code = (
        "import sys\nfrom adaptkit.backbones.clip_bpe import ClipBpe\nassert ClipBpe().encode('cat') == [2368]\n"
        "assert not {'open_clip', 'torchvision', 'timm', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
