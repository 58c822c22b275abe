"""The tree of candidate answers."""

from __future__ import annotations

import pytest
import torch

from adaptkit.backbones.mllm.trie import Trie
from adaptkit.errors import DataError

SEQUENCES = [[1, 2, 3], [1, 2], [1, 4], [5], [1, 2, 3, 6]]


def test_shared_beginnings_are_shared():
    trie = Trie.build(SEQUENCES)
    assert len(trie) == 6
    assert trie.lengths.tolist() == [3, 2, 2, 1, 4]
    assert trie.inner().tolist() == [0, 1, 2]
    paths = trie.paths()
    for row, sequence in zip(paths, SEQUENCES, strict=True):
        assert trie.tokens[row.bool()].tolist() == sequence


def test_the_same_sequence_twice_ends_in_one_node():
    trie = Trie.build([[1, 2], [1, 2]])
    assert trie.ends.tolist() == [1, 1]


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_groups_are_closed_under_parents(limit):
    trie = Trie.build([[a, b, c] for a in range(4) for b in range(2) for c in range(2)])
    seen: list[int] = []
    for group in trie.groups(limit):
        own = set(group.tolist())
        assert all(parent in own for parent in trie.parents[group].tolist() if parent >= 0)
        seen += group.tolist()
    assert sorted(seen) == trie.inner().tolist()


def test_empty_candidates_are_refused():
    for sequences in ([], [[1], []]):
        with pytest.raises(DataError):
            Trie.build(sequences)


def test_small_groups_and_small_pieces_change_nothing(monkeypatch):
    from adaptkit.backbones.mllm import language
    from adaptkit.backbones.mllm.prompts import Turn
    from tests.backbones import tiny_mllm as tiny

    backbone = tiny.load("llava")
    trie = Trie.build(backbone.prompter.answers([Turn("q")], ["cat", "car", "dog", "door", "a bird"]))
    with torch.no_grad():
        prefix = backbone.prefix([backbone.prompter.ids([Turn("q", 0)]), backbone.prompter.ids([Turn("why?", 0)])])
        whole = backbone.candidate_scores(prefix, trie)
        monkeypatch.setattr(language, "TREE_NODES", 3)
        monkeypatch.setattr(language, "HEAD_BYTES", 1)
        pieces = backbone.candidate_scores(prefix, trie)
        torch.testing.assert_close(pieces, whole)
        torch.testing.assert_close(backbone.candidate_scores(prefix.select([1, 1, 0]), trie), whole[[1, 1, 0]])
