"""CoOp against a plain 77-token computation, its settings, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.errors import BackboneError, ConfigError, DataError, UnsupportedError
from adaptkit.methods.prompts.coop import CoOp, CoOpConfig
from tests.methods.tiny import NAMES, NOVEL, closed_text, query, tiny_clip

BACKBONE = tiny_clip()
WORDS = (
    "cat",
    "golden retriever",
    "black-footed albatross",
    "7-series sedan",
    "river",
    "St. Bernard (dog)",
    "dial_phone",
)


def plain_weights(names, context, position):
    """Class weights the reference's way: all 77 tokens of every class, no prefix shared, nothing cut.

    context: [M, width] or [classes, M, width].
    """
    tower, m = BACKBONE.text_tower, context.shape[-2]
    features = []
    for row, name in enumerate(names):
        name = name.replace("_", " ")
        tokens = BACKBONE.tokenize([" ".join(["X"] * m) + f" {name}."])
        x = tower.token_embedding(tokens.ids[0])  # [77, width]
        own = context if context.dim() == 2 else context[row]
        length = len(BACKBONE.word_pieces(name))
        kept = {"end": m, "middle": m // 2, "front": 0}[position]
        name_rows = x[1 + m : 1 + m + length]
        x = torch.cat([x[:1], own[:kept], name_rows, own[kept:], x[1 + m + length :]]) + tower.positional_embedding
        mask = torch.ones(77, 77).tril().bool()
        for block in tower.blocks:
            x = block(x[None], mask=mask)[0]
        features.append(tower.projection(tower.ln_final(x))[int(tokens.ids[0].argmax())])
    return F.normalize(torch.stack(features), dim=-1)


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.sampled_from(WORDS), min_size=1, max_size=5, unique=True),
    num_context=st.integers(1, 7),
    position=st.sampled_from(["end", "middle", "front"]),
    class_specific=st.booleans(),
    seed=st.integers(0, 9),
)
def test_equals_the_plain_way(names, num_context, position, class_specific, seed):
    config = CoOpConfig(num_context=num_context, class_specific=class_specific, class_position=position)
    method = CoOp(BACKBONE, names, config=config, seed=seed)
    context = method.context.detach().clone().requires_grad_()
    wanted, ours = plain_weights(names, context, position), method.class_weights()
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    mix = torch.randn(ours.shape, generator=torch.Generator().manual_seed(seed))
    (ours * mix).sum().backward()
    (wanted * mix).sum().backward()
    torch.testing.assert_close(method.context.grad, context.grad, rtol=1e-4, atol=1e-5)


def test_words_set_the_number_of_contexts_and_their_start():
    method = CoOp(BACKBONE, NAMES, config=CoOpConfig(num_context=16, context_init="a_photo of a"))
    ids = BACKBONE.word_pieces("a photo of a")
    assert torch.equal(method.context, BACKBONE.text.token_embedding.weight[ids])
    features = query(BACKBONE, "image_features")
    with torch.no_grad():  # before training these are the words themselves
        wanted = 20.0 * F.normalize(features, dim=-1) @ plain_prompt_weights().T
        torch.testing.assert_close(method(features), wanted, rtol=1e-4, atol=1e-4)


def plain_prompt_weights():
    texts = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
    return F.normalize(BACKBONE.encode_text(BACKBONE.tokenize(texts)), dim=-1)


def test_random_start():
    method = CoOp(BACKBONE, NAMES, seed=1)
    assert method.context.shape == (16, 16)
    assert float(method.context.detach().std()) == pytest.approx(0.02, rel=0.15)
    assert not torch.equal(method.context, CoOp(BACKBONE, NAMES, seed=2).context)
    assert torch.equal(method.context, CoOp(BACKBONE, NAMES, seed=1).context)


def test_class_specific_contexts_refuse_novel_classes_and_serve_subsets():
    method = CoOp(BACKBONE, NAMES, config=CoOpConfig(num_context=3, class_specific=True))
    assert method.novel_classes == "refused"
    assert not method.open_vocabulary
    assert CoOp.novel_classes == "open"
    with pytest.raises(UnsupportedError, match="can't predict 'snow leopard': fit it on these classes"):
        method.set_classes(NOVEL)
    features = query(BACKBONE, "image_features")
    with torch.no_grad():
        full = method(features)
        part = method.set_classes([NAMES[2], NAMES[0]])(features)
    torch.testing.assert_close(part, full[:, [2, 0]], rtol=1e-4, atol=1e-4)


def test_context_vectors():
    method = CoOp(BACKBONE, NAMES)
    assert list(method.context_vectors()) == ["context"]
    assert torch.equal(method.context_vectors()["context"], method.context)
    method = CoOp(BACKBONE, NAMES, config=CoOpConfig(num_context=3, class_specific=True))
    found = method.set_classes([NAMES[2], NAMES[0]]).context_vectors()
    assert list(found) == [f"context of {NAMES[2]}", f"context of {NAMES[0]}"]
    assert torch.equal(found[f"context of {NAMES[2]}"], method.context[2])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_context": 0}, "num_context is 0, but must be at least 1"),
        ({"class_position": "back"}, "class_position 'back' is unknown: choose end, middle or front"),
        ({"class_specific": True, "context_init": "a photo"}, "can't be combined"),
    ],
)
def test_bad_settings(config, said):
    with pytest.raises(ConfigError, match=said):
        CoOpConfig(**config)


def test_words_of_several_tokens_are_refused():
    with pytest.raises(ConfigError, match=r"'albatrosses' is \d tokens, and each word must be exactly one"):
        CoOp(BACKBONE, NAMES, config=CoOpConfig(context_init="a albatrosses of"))
    with pytest.raises(ConfigError, match=r"'photo,' is 2 tokens"):
        CoOp(BACKBONE, NAMES, config=CoOpConfig(context_init="a photo, of"))


def test_a_name_that_overflows_is_named():
    with pytest.raises(
        DataError, match=r"Class name '(very )+long' \(61 tokens\) doesn't fit beside 16 context vectors"
    ):
        CoOp(BACKBONE, ["cat", "very " * 60 + "long"])
    with pytest.raises(DataError, match="doesn't fit beside 100 context vectors"):
        CoOp(BACKBONE, NAMES, config=CoOpConfig(num_context=100))


def test_a_closed_text_tower_is_refused():
    with pytest.raises(BackboneError, match=r"CoOp must reach inside the text tower.*it is a test's"):
        CoOp(closed_text(), NAMES)


def test_a_tokenizer_without_a_start_token():
    """SigLIP-like: the context begins at position 0, and nothing is causal."""
    from dataclasses import replace

    from adaptkit.backbones.dual_encoder import DualEncoder
    from adaptkit.backbones.tower import BlockShape, TextShape, TextTower
    from tests.methods.tiny import Letters, _fill, image_tower

    tower = TextTower(TextShape(BlockShape(16, 2, 2, 32), 92, 12, 16, causal=False))
    _fill(tower, 4)
    backbone = DualEncoder(replace(BACKBONE.spec, context_length=12), image_tower(), tower, Letters(), logit_scale=10.0)
    method = CoOp(backbone, ["one bird", "dog"], config=CoOpConfig(num_context=2, class_position="front"))
    assert method._rows.symbols[0, :5].tolist() == [
        *Letters().word_pieces("one bird"),
        -1,
        -2,
        *Letters().word_pieces("."),
    ]
    method.class_weights().sum().backward()
    assert float(method.context.grad.norm()) > 0
