"""MMRL against a plain computation of its sheet; what is computed once, what is made anew, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.base import BackboneSpec, Preprocessing
from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.backbones.tokenizing import ClipTokenizer
from adaptkit.backbones.tower import BlockShape, ImageShape, ImageTower
from adaptkit.errors import AdapterError, BackboneError, ConfigError, DataError
from adaptkit.methods.base import total_loss
from adaptkit.methods.prompts.mmrl import MMRL, MMRLConfig
from adaptkit.methods.reference import read_reference_checkpoint
from adaptkit.training.loop import fit_method
from tests.methods.test_reference import dassl_file
from tests.methods.tiny import (
    CONTEXT,
    DIM,
    NAMES,
    NOVEL,
    SIZE,
    _fill,
    closed_text,
    image_tower,
    make_task,
    query,
    text_tower,
)

TEMPLATE = "a photo of a {}, a type of thing."
SMALL = MMRLConfig(num_tokens=3, width=12)


def uneven_clip(image: ImageTower | None = None) -> DualEncoder:
    """Four image layers, three text layers."""
    spec = BackboneSpec("uneven", "open_clip", "0" * 64, DIM, Preprocessing(SIZE), CONTEXT)
    image = image or image_tower(layers=4)
    return DualEncoder(spec, image, text_tower(layers=3), ClipTokenizer(), logit_scale=20.0)


BACKBONE = uneven_clip()


def make(config=SMALL, names=NAMES, templates=(TEMPLATE,), seed=3, **more):
    return MMRL(BACKBONE, names, templates=templates, config=config, seed=seed, **more)


# --- the sheet's forward pass, every token of every row in every block ------------------------------------------------


def first_layer(method, tower):
    """Counted from 0."""
    return (method.config.first_layer or tower.layers // 2) - 1


def plain_blocks(x: Tensor, tower, tokens: list[Tensor], first: int, share: float, causal: bool) -> Tensor:
    count = tokens[0].shape[0]
    for layer, block in enumerate(tower.blocks):
        place = layer - first
        if 0 <= place < len(tokens):
            new, rest = tokens[place].expand(len(x), -1, -1), x[:, 1:]
            if place:
                new, rest = share * new + (1 - share) * x[:, 1 : 1 + count], x[:, 1 + count :]
            x = torch.cat([x[:, :1], new, rest], dim=1)
        x = block(x, mask=torch.ones(x.shape[1], x.shape[1]).tril().bool() if causal else None)
    return x


def plain_texts(method, text_tokens, share=1.0, names=NAMES, template=TEMPLATE) -> Tensor:
    """Unit text features: 77 tokens, 77 + K from the first layer with tokens on, mask rebuilt."""
    text = BACKBONE.text_tower
    ids = BACKBONE.tokenize([template.format(name.replace("_", " ")) for name in names]).ids
    x = text.token_embedding(ids) + text.positional_embedding
    assert x.shape[1] == 77
    x = plain_blocks(x, text, text_tokens, first_layer(method, text), share, causal=True)
    assert x.shape[1] == 77 + method.config.num_tokens
    pooled = text.ln_final(x)[torch.arange(len(x)), ids.argmax(dim=1) + method.config.num_tokens]
    return F.normalize(text.projection(pooled), dim=-1)


def plain_images(method, pixels, image_tokens, share=1.0) -> tuple[Tensor, Tensor]:
    """Class feature, and the mean of the normalised token outputs (not yet projected)."""
    image = BACKBONE.image_tower
    x = image.ln_pre(image.embed(pixels))
    x = image.ln_post(plain_blocks(x, image, image_tokens, first_layer(method, image), share, causal=False))
    return image.projection(x[:, 0]), x[:, 1 : 1 + method.config.num_tokens].mean(dim=1)


def plain_results(method, pixels, labels, text_tokens, image_tokens, project, share=1.0):
    """The three logits and the loss."""
    config = method.config
    weights = plain_texts(method, text_tokens, share)
    of_class, pooled = plain_images(method, pixels, image_tokens, share)
    z, z_r = (100 * F.normalize(feature, dim=-1) @ weights.T for feature in (of_class, project(pooled)))
    frozen = F.normalize(BACKBONE.encode_image(pixels), dim=-1)
    prompts = [TEMPLATE.format(name.replace("_", " ")) for name in NAMES]
    anchors = F.normalize(BACKBONE.text_features(prompts), dim=-1)
    loss = config.alpha * F.cross_entropy(z, labels) + (1 - config.alpha) * F.cross_entropy(z_r, labels)
    loss = loss + config.consistency_weight * (1 - (F.normalize(of_class, dim=-1) * frozen).sum(-1).mean())
    loss = loss + config.consistency_weight * (1 - (weights * anchors).sum(-1).mean())
    return z, z_r, config.alpha * z + (1 - config.alpha) * z_r, loss


def assert_same_gradients(ours: Tensor, plain: Tensor, method) -> None:
    parameters = dict(method.named_parameters())
    got = torch.autograd.grad(ours, list(parameters.values()))
    wanted = torch.autograd.grad(plain, list(parameters.values()))
    for name, mine, theirs in zip(parameters, got, wanted, strict=True):
        size = float(theirs.abs().max())
        assert size > 0, name
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * max(1.0, size), msg=name)


def assert_same_results(method, tokens, project, share=1.0):
    pixels, labels = query(BACKBONE, "images"), torch.arange(9) % 4
    z, z_r, fused, loss = plain_results(method, pixels, labels, *tokens, project, share)
    ours = method.branch_logits(pixels)
    for mine, theirs in ((ours["class"], z), (ours["representation"], z_r), (ours["fused"], fused)):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-3)  # 1e-5 of 100
    torch.testing.assert_close(method(pixels), fused, rtol=1e-5, atol=1e-3)
    terms = method.losses(pixels, labels)
    assert list(terms) == [
        "class_cross_entropy", "representation_cross_entropy", "image_consistency", "text_consistency",
    ]  # fmt: skip
    assert_same_gradients(total_loss(terms), loss, method)
    with torch.no_grad():
        stored = method.losses(pixels, labels, 3.0 * BACKBONE.encode_image(pixels))
        torch.testing.assert_close(total_loss(stored), total_loss(method.losses(pixels, labels)))


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        MMRLConfig(2, 8, first_layer=1, last_layer=2, alpha=0.4, consistency_weight=3.0),
        MMRLConfig(1, 8, first_layer=3, last_layer=3),
    ],
)
def test_equals_the_plain_way(config):
    method = make(config)
    with torch.no_grad():
        for value in method.parameters():  # maps that differ, and tokens that matter
            value += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))

    def tokens(maps):
        return [method.tokens @ layer.weight.T + layer.bias for layer in maps]

    both = tokens(method.text_maps), tokens(method.image_maps)
    assert_same_results(method, both, lambda pooled: pooled @ method.projection)


def test_start():
    method = make()
    assert [len(method.text_maps), len(method.image_maps)] == [3, 3]  # layers 1-3 of three and 2-4 of four
    assert float(make(MMRLConfig(40, 50)).tokens.detach().std()) == pytest.approx(0.02, rel=0.1)
    for maps in (method.text_maps, method.image_maps):
        assert all(torch.equal(maps[0].weight, layer.weight) for layer in maps)
        assert all(torch.equal(maps[0].bias, layer.bias) for layer in maps)
        assert maps[0].weight is not maps[1].weight
        assert 0.8 * 12**-0.5 < float(maps[0].weight.detach().abs().max()) <= 12**-0.5
    assert float(method.projection.detach().std()) == pytest.approx(24**-0.5, rel=0.15)
    assert method.num_trained() == 3 * 12 + 3 * (16 * 12 + 16) + 3 * (24 * 12 + 24) + 24 * 16
    assert method.context_vectors() == {}  # none stands among the word embeddings


def test_several_templates_are_averaged():
    templates = ("a photo of a {}.", "{} texture.")
    method = make(templates=templates)
    tokens = method.text_maps(method.tokens)
    each = torch.stack([plain_texts(method, tokens, template=template) for template in templates])
    torch.testing.assert_close(method.class_weights(), F.normalize(each.mean(0), dim=-1), rtol=1e-5, atol=1e-5)


# --- once, and anew ---------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Which text block was run how often."""
    runs: list[int] = []
    text = BACKBONE.text_tower
    for index, block in enumerate(text.blocks):
        forward = block.attn.forward
        monkeypatch.setattr(
            block.attn, "forward", lambda *a, _i=index, _f=forward, **k: (runs.append(_i), _f(*a, **k))[1]
        )
    return runs


def test_texts_below_the_first_layer_are_computed_once_for_a_class_list(counted):
    method = make(MMRLConfig(3, 12, first_layer=3))
    pixels, labels = query(BACKBONE, "images"), torch.arange(9) % 4
    method.zero_shot()
    counted.clear()
    for _ in range(3):
        total_loss(method.losses(pixels, labels)).backward()
    assert (counted.count(0), counted.count(1)) == (2, 2)  # once what all classes share, once their own
    assert counted.count(2) >= 3
    kept = method.text_below()
    assert kept.block == 2
    assert not kept.prefix.requires_grad
    assert not kept.suffix.requires_grad
    method.set_classes(NOVEL)
    method.class_weights()
    assert counted.count(0) == 4
    assert method.text_below().suffix.shape[1] == len(NOVEL)


def test_nothing_below_the_first_layer_is_kept_for_backward():
    method, kept = make(MMRLConfig(3, 12, first_layer=3)), []
    below = method.image_below(query(BACKBONE, "images"))
    assert not below.requires_grad
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        method.image_below(query(BACKBONE, "images"))
    assert kept == []
    asked = query(BACKBONE, "images").requires_grad_()  # unless the pixels' own gradient is asked for
    assert torch.autograd.grad(method(asked).sum(), asked)[0].abs().max() > 0


def test_the_image_tower_runs_once_in_a_step(monkeypatch):
    method, calls = make(), []
    hidden = ImageTower.hidden
    monkeypatch.setattr(ImageTower, "hidden", lambda *a, **k: (calls.append(1), hidden(*a, **k))[1])
    method.losses(query(BACKBONE, "images"), torch.arange(9) % 4)
    assert calls == [1]


def test_no_answer_is_stale_after_more_training():
    task = make_task(BACKBONE, "images")
    pixels, settings = query(BACKBONE, "images"), replace(MMRL.default_training, epochs=2, batch_size=8, lr=1e-2)

    def answer(some):
        with torch.no_grad():
            return some(pixels)

    method, report = make(), {}
    for _ in range(2):  # evaluated before and between
        before = answer(method)
        report = fit_method(method, task, settings)
        after = answer(method)
        assert not torch.equal(before, after)
        assert torch.equal(after, answer(make_like(method)))
        answer(method.set_classes(NOVEL))
        assert torch.equal(answer(method.set_classes(NAMES)), after)
    method.load_adapter_state(make(seed=8).adapter_state())
    assert torch.equal(answer(method), answer(make_like(method)))
    assert not torch.equal(answer(method), after)
    assert report["accuracies"][-1] is not None  # of the logits the loss came from


def make_like(method):
    other = make()
    other.load_adapter_state({key: value.clone() for key, value in method.adapter_state().items()})
    return other


def test_autocast_leaves_nothing_in_half_precision():
    task, method = make_task(BACKBONE, "images"), make()
    settings = replace(MMRL.default_training, epochs=1, batch_size=8, precision="bf16")
    fit_method(method, task, settings)
    assert method.text_below().suffix.dtype == torch.float32
    with torch.no_grad():
        pixels = query(BACKBONE, "images")
        assert torch.equal(method(pixels), make_like(method)(pixels))
    assert torch.equal(method.zero_shot(), make().zero_shot())


# --- which logits -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_which_logits_it_answers_with():
    method, pixels = make(), query(BACKBONE, "images")
    full = method.branch_logits(pixels)
    assert torch.equal(method(pixels), full["fused"])
    method.set_classes((NAMES[2], NAMES[0]))  # fitted ones: still both features
    torch.testing.assert_close(method(pixels), full["fused"][:, [2, 0]])
    for names in (NOVEL, (NAMES[0], NOVEL[0])):
        method.set_classes(names)
        torch.testing.assert_close(method(pixels), method.branch_logits(pixels)["class"], rtol=1e-5, atol=1e-4)
    method.branch = "fused"
    assert torch.equal(method(pixels), method.branch_logits(pixels)["fused"])
    method.set_classes(NAMES)
    method.branch = "class"
    torch.testing.assert_close(method(pixels), full["class"], rtol=1e-5, atol=1e-4)
    assert not torch.equal(full["class"], full["fused"])
    with pytest.raises(ConfigError, match="branch 'imagenet' is unknown: choose by-classes, class, fused"):
        method.branch = "imagenet"
    assert method.branch == "class"


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"width": 0}, "width is 0"),
        ({"first_layer": -1}, "first_layer is -1"),
        ({"first_layer": 3, "last_layer": 2}, "first_layer is 3 and last_layer 2"),
        ({"alpha": 1.5}, "alpha is 1.5, but must be between 0 and 1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"consistency_weight": -1.0}, "consistency_weight is -1.0"),
        ({"scale": 0.0}, "scale is 0.0"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(ConfigError, match=said):
        MMRLConfig(**settings)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MMRLConfig(first_layer=4), "first_layer is 4, but the text tower of 'uneven' has 3 layers"),
        (MMRLConfig(last_layer=4), "last_layer is 4, but the text tower of 'uneven' has 3 layers"),
        (MMRLConfig(last_layer=1), "begin in layer 2 of the image tower of 'uneven' and end in layer 1"),
    ],
)
def test_layers_that_do_not_fit_the_backbone(config, said):
    with pytest.raises(ConfigError, match=said):
        make(config)


def test_a_class_name_that_does_not_fit():
    with pytest.raises(DataError, match=r"Class name 'word word.* is too long: with its template it has \d+ tokens"):
        make(names=(*NAMES, "word " * 70 + "end"))
    make(names=(*NAMES, "word " * 60 + "end"))  # 77 with the template; the tokens of ours need no position
    method = make()
    before = method(query(BACKBONE, "images"))
    with pytest.raises(DataError):
        method.set_classes(("word " * 90,))
    assert torch.equal(method(query(BACKBONE, "images")), before)


def towers_that_pool(**kind):
    tower = ImageTower(ImageShape(BlockShape(24, 2, 4, 48, "quick_gelu"), SIZE, 8, DIM, **kind))
    _fill(tower, 1)
    return tower


def test_backbones_it_cannot_use():
    with pytest.raises(BackboneError, match="class token, and the image tower of 'uneven' takes the mean of its patch"):
        MMRL(uneven_clip(towers_that_pool(pool="mean")), NAMES)
    siglip = towers_that_pool(pool="attention", class_token=False, ln_pre=False, patch_bias=True)
    with pytest.raises(BackboneError, match="takes a learned query's view of its patches"):
        MMRL(uneven_clip(siglip), NAMES)
    with pytest.raises(BackboneError, match="MMRL must reach inside the text tower"):
        MMRL(closed_text(), NAMES)


def test_a_tokenizer_without_start_token(monkeypatch):
    tokenize = BACKBONE.tokenize

    def without_start(texts):
        tokens = tokenize(texts)
        return replace(tokens, ids=torch.cat([tokens.ids[:, 1:], tokens.ids[:, :1] * 0], 1), ends=tokens.ends - 1)

    monkeypatch.setattr(BACKBONE, "tokenize", without_start)
    with pytest.raises(BackboneError, match="behind the start token of a text, and the tokenizer of 'uneven' writes"):
        make()


def test_norm_after_the_class_token_is_picked():
    """The last norm may come before or after picking; both give the same numbers."""
    method = make()
    late = MMRL(uneven_clip(towers_that_pool(norm_after_pool=True)), NAMES, templates=(TEMPLATE,), config=SMALL, seed=3)
    with torch.no_grad():
        pixels = query(BACKBONE, "images")
        torch.testing.assert_close(late(pixels), method(pixels), rtol=1e-5, atol=1e-4)


# --- checkpoints of the official release ------------------------------------------------------------------------------


def official_state(layers=3, width=12, count=3):
    state = {"representation_learner.compound_rep_tokens": torch.randn(count, width)}
    for tower, outputs in (("t", 16), ("v", 24)):
        for layer in range(layers):
            name = f"representation_learner.compound_rep_tokens_r2{tower}proj.{layer}"
            state |= {f"{name}.weight": torch.randn(outputs, width), f"{name}.bias": torch.randn(outputs)}
    return state | {
        "image_encoder.proj_rep": torch.randn(24, 16),
        "image_encoder.class_embedding": torch.randn(24),  # the whole CLIP comes along
        "logit_scale": torch.tensor(4.6),
    }


def test_reference_checkpoint(tmp_path):
    state = official_state()
    read = read_reference_checkpoint(dassl_file(tmp_path / "model.pth.tar-10", state))
    assert MMRL.reference_settings(read) == {"num_tokens": 3, "width": 12}
    method = make()
    method.load_reference_state(read)
    assert torch.equal(method.tokens, state["representation_learner.compound_rep_tokens"])
    name = "representation_learner.compound_rep_tokens_r2vproj.2"
    assert torch.equal(method.image_maps[2].weight, state[f"{name}.weight"])
    assert torch.equal(method.text_maps[1].bias, state["representation_learner.compound_rep_tokens_r2tproj.1.bias"])
    assert torch.equal(method.projection, state["image_encoder.proj_rep"])


def test_checkpoints_of_other_layers_are_refused():
    for layers in (2, 4):  # one layer too many would be left out silently
        with pytest.raises(AdapterError, match=f"tokens for {layers} layers of the text tower, these settings for 3"):
            make().load_reference_state(official_state(layers))
    with pytest.raises(AdapterError, match="has no"):
        make().load_reference_state({"prompt_learner.ctx": torch.zeros(1)})
