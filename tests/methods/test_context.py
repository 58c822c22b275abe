"""What the methods with one learned context share: CoOp, KgCoOp, ProGrad."""

from __future__ import annotations

import pytest
import torch

from adaptkit.errors import BackboneError, DataError
from adaptkit.methods.prompts.coop import CoOp
from adaptkit.methods.prompts.kgcoop import KgCoOp
from adaptkit.methods.prompts.prograd import ProGrad
from tests.methods.tiny import NAMES, closed_text, tiny_clip

BACKBONE = tiny_clip()


@pytest.fixture(params=[CoOp, KgCoOp, ProGrad])
def kind(request):
    return request.param


def test_a_name_that_overflows_is_named(kind):
    with pytest.raises(
        DataError, match=r"Class name '(very )+long' \(71 tokens\) doesn't fit beside \d+ context vecto"
    ):
        kind(BACKBONE, ["cat", "very " * 70 + "long"])


def test_a_closed_text_tower_is_refused(kind):
    with pytest.raises(BackboneError, match=rf"{kind.__name__} must reach inside the text tower.*it is a test's"):
        kind(closed_text(), NAMES)


def test_context_vectors(kind):
    method = kind(BACKBONE, NAMES)
    found = method.context_vectors()
    assert list(found) == ["context"]
    assert torch.equal(found["context"], method.context)
    assert not found["context"].requires_grad
