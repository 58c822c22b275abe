"""How tokens are drawn, against transformers' own processors of logits."""

from __future__ import annotations

import pytest
import torch

from adaptkit.backbones.mllm.sampling import GREEDY, Sampling, chosen, said_before

VOCABULARY, DRAWS = 12, 20_000
LOGITS = 2 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(4))


def shares(sampling, said=None):
    """How often each token is drawn by numbers that lie evenly in [0, 1)."""
    draws = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    seen = None if said is None else said_before([said] * DRAWS, VOCABULARY, torch.device("cpu"))
    tokens = chosen(LOGITS.expand(DRAWS, -1), sampling, draws, seen)
    return torch.bincount(tokens, minlength=VOCABULARY) / DRAWS


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [0.3, 0.95, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.1, 0.7])
def test_tokens_are_drawn_as_transformers_would(temperature, top_p, penalty):
    from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

    said = [2, 5, 7, 7]
    ids, wanted = torch.tensor([said]), LOGITS.clone()
    for step in (
        RepetitionPenaltyLogitsProcessor(penalty),
        TemperatureLogitsWarper(temperature),
        TopPLogitsWarper(top_p),
    ):
        wanted = step(ids, wanted)
    found = shares(Sampling(temperature, top_p, penalty), said)
    torch.testing.assert_close(found, wanted.softmax(dim=-1)[0], atol=2 / DRAWS, rtol=0)


def test_the_likeliest_token_needs_no_draw():
    assert chosen(LOGITS, GREEDY).tolist() == [int(LOGITS.argmax())]
    assert chosen(LOGITS, Sampling(0.0, 0.5, 1.0), torch.tensor([0.99])).tolist() == [int(LOGITS.argmax())]


def test_what_cannot_be_said_is_never_drawn():
    """Neither by the smallest number nor by the largest below 1."""
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 1.0, float("-inf")]]).expand(2, -1)
    draws = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for top_p in (1.0, 0.99999):
        assert set(chosen(logits, Sampling(1.0, top_p), draws).tolist()) == {1, 3}


def test_which_tokens_were_said():
    said = said_before([[1, 1, 3], []], 4, torch.device("cpu"))
    assert said.tolist() == [[False, True, False, True], [False] * 4]
