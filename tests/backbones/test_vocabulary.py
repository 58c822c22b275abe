"""Nearest words are those of a plain computation, in any chunks; tokens read as words."""

from __future__ import annotations

import pytest
import torch

from adaptkit.backbones.clip_bpe import ClipBpe
from adaptkit.backbones.tokenizing import ClipTokenizer, OutsideTokenizer, Pooling
from adaptkit.backbones.vocabulary import nearest_words
from adaptkit.errors import BackboneError, ConfigError


def plainly(vectors, embedding, top):
    """One pair at a time, in double precision."""
    found = []
    for vector in vectors.double():
        far = sorted(((float((vector - word).norm()), index) for index, word in enumerate(embedding.double())))[:top]
        cosines = [float(vector @ embedding[i].double() / vector.norm() / embedding[i].double().norm()) for _, i in far]
        found.append(([i for _, i in far], [distance for distance, _ in far], cosines))
    return found


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("top", [1, 5])
def test_nearest_words_are_those_of_a_plain_computation(chunk, top):
    numbers = torch.Generator().manual_seed(chunk)
    embedding = torch.randn(200, 12, generator=numbers) * 0.02
    vectors = torch.randn(9, 12, generator=numbers) * 0.03
    found = nearest_words(vectors, embedding, top, chunk=chunk)
    expected = plainly(vectors, embedding, top)
    assert len(expected) == 9
    for row, (tokens, distances, cosines) in enumerate(expected):
        assert found.tokens[row].tolist() == tokens
        assert found.distances[row].tolist() == pytest.approx(distances, rel=1e-9)
        assert found.cosines[row].tolist() == pytest.approx(cosines, rel=1e-9)


def test_a_word_is_exactly_nearest_to_itself_and_ties_go_to_the_lower_token():
    embedding = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 30
    embedding[31] = embedding[17]
    for chunk in (4, 20, 50):
        found = nearest_words(embedding[[31, 3]], embedding, 2, chunk=chunk)
        assert found.tokens[0].tolist() == [17, 31]
        assert found.distances[:, 0].tolist() == [0, 0]
        assert found.tokens[1, 0] == 3


def test_edges():
    embedding = torch.eye(3)
    assert nearest_words(torch.zeros(0, 3), embedding, 2).tokens.shape == (0, 2)
    assert nearest_words(torch.ones(1, 3), embedding, 9).tokens.tolist() == [[0, 1, 2]]  # no more than there are
    assert nearest_words(torch.zeros(1, 3), embedding, 1).cosines.tolist() == [[0]]
    half = nearest_words(embedding.half(), embedding.half(), 1)
    assert half.tokens[:, 0].tolist() == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"one width"):
        nearest_words(torch.zeros(1, 4), embedding)
    with pytest.raises(ConfigError, match="at least 1"):
        nearest_words(torch.zeros(1, 3), embedding, 0)
    with pytest.raises(ConfigError, match="at least 1"):
        nearest_words(torch.zeros(1, 3), embedding, 1, chunk=0)


def test_pieces_read_as_words():
    bpe = ClipBpe()
    for word in ("photo", "cat", "a", "é", "."):
        (token,) = bpe.encode(word)
        assert bpe.decode(token) == word
    assert "".join(bpe.decode(token) for token in bpe.encode("pneumonoultramicroscopic")) == "pneumonoultramicroscopic"
    assert (bpe.decode(bpe.start), bpe.decode(bpe.end)) == ("<start_of_text>", "<end_of_text>")
    assert len(bpe.vocabulary) == 49408
    texts = [bpe.decode(token) for token in range(49408)]  # single bytes are there too
    assert all(text and text.isprintable() and not text.isspace() and "</w>" not in text for text in texts)
    assert bpe.decode(bpe.vocabulary["Ġ"]) == r"\x20"
    assert bpe.decode(bpe.vocabulary["â"]) == r"\xe2"
    for token in (-1, 49408):
        with pytest.raises(BackboneError, match="pieces 0 to 49407"):
            bpe.decode(token)


def test_rows_beyond_the_vocabulary_and_silent_libraries_show_their_number():
    assert ClipTokenizer().piece_text(49408) == "[49408]"
    fields = (lambda texts: torch.zeros(len(texts), 4), len, lambda text: [1], 4, Pooling("last"))
    assert OutsideTokenizer(*fields).piece_text(5) == "[5]"
    assert OutsideTokenizer(*fields, {}, {5: "red", 6: "", 7: "\n"}.get).piece_text(5) == "red"
    assert OutsideTokenizer(*fields, {}, {5: "red", 6: "", 7: "\n"}.get).piece_text(6) == "[6]"
    assert OutsideTokenizer(*fields, {}, {5: "red", 6: "", 7: "\n"}.get).piece_text(7) == r"\x0a"
