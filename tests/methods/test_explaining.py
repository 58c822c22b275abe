"""The words near learned vectors, what they started from, and methods that have none."""

from __future__ import annotations

import pytest
import torch

from adaptkit.errors import UnsupportedError
from adaptkit.methods import methods
from adaptkit.methods.adapters.clip_adapter import CLIPAdapter
from adaptkit.methods.adapters.zero_shot import ZeroShot
from adaptkit.methods.explaining import explain_contexts, explainable
from adaptkit.methods.prompts.coop import CoOp, CoOpConfig
from adaptkit.methods.prompts.maple import MaPLe, MaPLeConfig
from tests.methods.tiny import NAMES, tiny_clip

BACKBONE = tiny_clip()
EMBEDDING = BACKBONE.text_tower.token_embedding.weight.detach()


def test_an_untouched_context_of_words_reads_as_them():
    found = explain_contexts(CoOp(BACKBONE, NAMES, config=CoOpConfig(context_init="a photo of a")), top=2)
    assert [vector.nearest[0].word for vector in found.vectors] == ["a", "photo", "of", "a"]
    assert [vector.start for vector in found.vectors] == ["a", "photo", "of", "a"]
    for vector in found.vectors:
        assert vector.nearest[0].distance == vector.moved == 0
        assert vector.nearest[0].cosine == pytest.approx(1)
        assert vector.nearest[1].distance > 0
    assert found.left_out == 0


def test_what_moved_and_where_to():
    method = CoOp(BACKBONE, NAMES, config=CoOpConfig(context_init="a photo"))
    (cat,) = BACKBONE.word_pieces("cat")
    step = torch.zeros(16)
    step[3] = 1e-3
    with torch.no_grad():
        method.context[1] = EMBEDDING[cat] + step
    first, second = explain_contexts(method).vectors
    assert (first.moved, second.start) == (0, "photo")
    assert (second.group, second.index) == ("context", 2)
    assert (second.nearest[0].word, second.nearest[0].token) == ("cat", cat)
    assert second.nearest[0].distance == pytest.approx(1e-3, rel=1e-4)
    (photo,) = BACKBONE.word_pieces("photo")
    assert second.moved == pytest.approx(float((EMBEDDING[cat] + step - EMBEDDING[photo]).norm()), rel=1e-5)
    assert second.norm == pytest.approx(float(method.context[1].detach().norm()), rel=1e-6)


def test_class_specific_contexts_are_shown_as_far_as_asked():
    method = CoOp(BACKBONE, NAMES, config=CoOpConfig(num_context=3, class_specific=True))
    found = explain_contexts(method, limit=5)
    assert [(vector.group, vector.index) for vector in found.vectors] == [
        *((f"context of {NAMES[0]}", place) for place in (1, 2, 3)),
        *((f"context of {NAMES[1]}", place) for place in (1, 2)),
    ]
    assert found.left_out == 12 - 5
    assert all(vector.start is None and vector.moved is None for vector in found.vectors)
    assert len(explain_contexts(method).vectors) == 12


def test_the_first_layer_of_maple():
    found = explain_contexts(MaPLe(BACKBONE, NAMES, config=MaPLeConfig(depth=3)))
    assert [vector.start for vector in found.vectors] == ["a", "photo"]
    random = explain_contexts(MaPLe(BACKBONE, NAMES, config=MaPLeConfig(depth=3, context_init="")))
    assert [vector.start for vector in random.vectors] == [None, None]


def test_methods_without_such_vectors_say_what_they_learned():
    with pytest.raises(UnsupportedError, match=r"clip-adapter learns no vectors.*down.weight \[4 × 16\].*: .*coop"):
        explain_contexts(CLIPAdapter(BACKBONE, NAMES))
    with pytest.raises(UnsupportedError, match=r"zero-shot learns no vectors .* it learned nothing"):
        explain_contexts(ZeroShot(BACKBONE, NAMES))
    can = explainable()
    assert {"coop", "maple"} <= set(can) < set(methods)
