"""Fewer image tokens: exact counts, merging, attention against transformers' own maps, positions, every family."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from adaptkit.backbones.load import load_backbone
from adaptkit.backbones.mllm.attention import class_row, pooled, received, watching
from adaptkit.backbones.mllm.images import ImageFeatures
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.backbones.mllm.reduction import (
    Reduction,
    even_choice,
    local_choice,
    merged,
    reduced,
    thinned,
    window_of,
)
from adaptkit.errors import AdaptKitError, BackboneError, ConfigError, UnsupportedError
from tests.backbones import tiny_mllm as tiny

RULES = ("vscan", "attention", "merge", "norm", "uniform", "random")
GRID = ("llava", "qwen2_vl", "qwen2_5_vl", "smolvlm", "idefics3", "internvl", "gemma3", "paligemma")
OTHERS = tuple(kind for kind in tiny.KINDS if kind not in GRID)
SIDE = 112


@lru_cache(maxsize=1)
def _folder() -> Path:
    return Path(mkdtemp(prefix="wide-mllm-"))


@lru_cache(maxsize=4)
def wide(kind: str):
    """A tiny model that sees 8 x 8 patches; Qwen2.5-VL's windows hold 2 x 2 merged tokens."""
    with mock.patch.object(tiny, "SIDE", SIDE):
        folder = tiny.save(kind, _folder() / kind)
    if kind.startswith("qwen"):
        processor, config = (json.loads((folder / f"{name}.json").read_text()) for name in _FILES)
        processor["size"] = {"shortest_edge": 28 * 28, "longest_edge": SIDE * SIDE}
        config["vision_config"]["window_size"] = 56
        for name, content in zip(_FILES, (processor, config), strict=True):
            (folder / f"{name}.json").write_text(json.dumps(content))
    return load_backbone(f"transformers:{folder}")


_FILES = ("preprocessor_config", "config")


def pixels_of(backbone, count=2, seed=0):
    return tiny.pixels(count, backbone.spec.preprocessing.image_size, seed)


def rows_of(backbone, features, text="What is it?"):
    return [backbone.prompter.ids([Turn(text)], [count]) for count in features.counts]


# --- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("lead", [0, 1])
def test_every_count_is_exact(side, lead):
    """Also where half of it isn't a multiple of the windows, and where windows have remainders."""
    numbers = torch.Generator().manual_seed(side)
    tokens = torch.randn(side * side + lead, 6, generator=numbers)
    maps = torch.rand(side * side, generator=numbers), torch.rand(side * side, generator=numbers)
    done = 0
    for rule in RULES:
        for keep in range(1, len(tokens) + 1):
            vectors, places = reduced(tokens, keep, rule, maps, window=3)
            assert len(vectors) == len(places) == keep
            assert places.tolist() == sorted(set(places.tolist()))
            assert places[:lead].tolist() == list(range(lead))[:keep]  # a class token is never left out
            assert set(places.tolist()) <= set(range(len(tokens)))
            done += 1
    assert done == len(RULES) * len(tokens)


def test_the_sheets_case_of_a_lost_token():
    """100 of 24 x 24 in 16 windows: a plain quota of 50 // 16 would leave 98."""
    maps = torch.rand(576, generator=torch.Generator().manual_seed(0)), torch.rand(576)
    _, places = reduced(torch.randn(576, 4), 100, "vscan", maps, window=6)
    assert len(places) == 100


def test_local_and_global_by_hand():
    """A 4 x 4 grid, windows of 2 x 2, 8 kept: one of every window by shallow attention, then the deepest others."""
    shallow = torch.tensor([[9, 1, 2, 3], [0, 0, 0, 0], [1, 0, 8, 9], [5, 4, 7, 6]]).flatten().float()
    deep = torch.tensor([[99, 50, 40, 1], [2, 3, 4, 5], [6, 30, 7, 8], [9, 10, 11, 60]]).flatten().float()
    local = local_choice(shallow, 4, 4, 2)
    assert sorted(local.tolist()) == [0, 3, 11, 12]
    _, places = reduced(torch.randn(16, 3), 8, "vscan", (shallow, deep), window=2)
    assert places.tolist() == sorted([0, 3, 11, 12, 15, 1, 2, 9])  # 0 is in once, though the deepest too
    _, places = reduced(torch.randn(16, 3), 3, "attention", (shallow, deep), window=2)
    assert places.tolist() == [0, 1, 15]


def test_windows_and_their_remainders():
    assert window_of(5, 2).reshape(5, 5).tolist() == [[0, 0, 1, 1, 1]] * 2 + [[2, 2, 3, 3, 3]] * 3
    assert window_of(3, 8).tolist() == [0] * 9
    quota = local_choice(torch.arange(64.0), 8, 8, 2)
    counts = torch.bincount(window_of(8, 2)[quota], minlength=16)
    assert int(counts.max()) == 1


def test_a_window_smaller_than_its_quota_is_made_up_for():
    """23 x 23 in windows of 8: one has 64 places and a quota of 66."""
    assert len(set(local_choice(torch.rand(529), 23, 264, 8).tolist())) == 264


def test_even_choices_are_spread():
    for side in (4, 7, 24):
        for count in range(1, side * side + 1):
            places = even_choice(side, count)
            assert len(set(places.tolist())) == count
            assert places.tolist() == sorted(places.tolist())
    rows = torch.bincount(even_choice(24, 64) // 24, minlength=24)
    assert sorted(rows.tolist()) == [0] * 16 + [8] * 8


# --- merging ----------------------------------------------------------------------------------------------------------


def test_merging_by_hand():
    tokens = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.3], [0.0, 5.0], [2.0, 0.0]])
    before = tokens.clone()
    assert torch.allclose(merged(tokens, torch.tensor([0, 1])), torch.tensor([[2.0, 0.1], [0.0, 3.0]]))
    assert torch.equal(tokens, before)  # cached features aren't written to


def test_merging_equal_tokens_keeps_their_mean():
    tokens = torch.ones(9, 4) * 0.7
    torch.testing.assert_close(merged(tokens, torch.tensor([2, 5, 8])), tokens[:3])
    tokens = torch.randn(9, 4)
    assert torch.equal(merged(tokens, torch.arange(9)), tokens)


def test_the_order_of_dropped_tokens_does_not_matter():
    tokens, chosen = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 4, 7])
    others = [place for place in range(12) if place not in chosen.tolist()]
    moved = tokens.clone()
    moved[others] = tokens[others[::-1]]
    torch.testing.assert_close(merged(tokens, chosen), merged(moved, chosen))


def test_gradients_reach_kept_and_dropped():
    tokens = torch.randn(6, 4, requires_grad=True)
    merged(tokens, torch.tensor([1, 3])).sum().backward()
    assert bool((tokens.grad.abs().sum(dim=1) > 0).all())


def test_random_choices_depend_on_the_image_alone():
    features = ImageFeatures((torch.randn(64, 4), torch.randn(64, 4)))
    pixels = tiny.pixels(2)
    both = thinned(features, Reduction("random", 0.5), pixels)
    one = thinned(features.select([1]), Reduction("random", 0.5), pixels[1:])
    assert torch.equal(both.kept[1], one.kept[0])
    assert both.kept[0].tolist() != both.kept[1].tolist()
    assert both.whole == (64, 64)
    assert both.counts == (32, 32)
    assert both.select([1]).whole == (64,)
    joined = ImageFeatures.join([both.select([1]), both.select([0])])
    assert torch.equal(joined.kept[0], both.kept[1])


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llava", "internvl", "smolvlm", "gemma3", "qwen2_vl", "qwen2_5_vl"])
def test_attention_is_that_of_the_encoder(kind):
    """The recomputed maps against what transformers' eager kernel would have in every layer."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    backbone = wide(kind)
    pixels = pixels_of(backbone)
    tower = backbone.model.get_submodule(backbone.family.vision)
    with watching(tower) as watched:
        features = backbone.image_features(pixels)
    shallow, deep, class_token = watched.maps(2, features.grids)
    assert class_token == (kind in ("llava", "internvl"))
    weights = []

    def recording(module, query, key, value, attention_mask=None, scaling=1.0, **more):
        shares = (query @ key.transpose(-1, -2) * scaling).softmax(dim=-1)
        weights.append(shares)
        return (shares @ value).transpose(1, 2), shares

    known = type(ALL_ATTENTION_FUNCTIONS)
    with mock.patch.object(known, "get_interface", return_value=recording), torch.no_grad():
        theirs = backbone.image_features(pixels)
    torch.testing.assert_close(theirs.tokens[0], features.tokens[0], rtol=1e-4, atol=1e-4)
    if features.grids is None:
        maps = [layer.mean(dim=1)[:, 0, 1:] if class_token else layer.mean(dim=(1, 2)) for layer in weights]
        assert len(maps) == 2
        for ours, place in ((shallow, 0), (deep, 0 if class_token else 1)):
            torch.testing.assert_close(ours, maps[place], rtol=1e-4, atol=1e-6)
        return
    last = torch.cat([layer.mean(dim=(1, 2))[0] for layer in weights[-2:]])  # one per image, in the encoder's order
    units = last.reshape(-1, 4).mean(dim=1)
    if kind == "qwen2_5_vl":
        raster = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15])
        back = torch.empty(16, dtype=torch.int64)
        back[raster] = torch.arange(16)
        units = torch.cat([units[:16][back], units[16:][back]])
    torch.testing.assert_close(deep.flatten(), units, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["internvl", "smolvlm", "idefics3", "gemma3", "qwen2_vl"])
def test_a_vector_stands_for_the_patches_it_is_made_of(kind):
    """What the bridge makes of one patch shows where pooling expects it."""
    backbone = wide(kind)
    side, found = 8, 0
    for patch in (0, 5, 27, 63):
        hidden = torch.zeros(1, side * side, 64)
        hidden[0, patch] = 1.0 + torch.arange(64.0)
        before, after = _bridge(backbone, kind, torch.zeros_like(hidden)), _bridge(backbone, kind, hidden)
        changed = (after - before).abs().sum(dim=-1).reshape(-1)
        own = math.isqrt(len(changed))
        if kind == "qwen2_vl":  # its patches come unit by unit
            wanted = patch // 4
        else:
            step = side // own
            wanted = (patch // side // step) * own + patch % side // step
            mark = F.one_hot(torch.tensor(patch), 64)[None].float()
            assert int(pooled(mark, len(changed))[0].argmax()) == wanted
        assert int(changed.argmax()) == wanted
        assert int((changed > 1e-6).sum()) == 1
        found += 1
    assert found == 4


def _bridge(backbone, kind, hidden):
    model = backbone.model.model
    if kind == "internvl":
        return model.multi_modal_projector(model.pixel_shuffle(hidden.reshape(1, 8, 8, -1), 0.5).reshape(1, 16, -1))
    if kind == "gemma3":
        return model.multi_modal_projector(hidden)
    return model.visual.merger(hidden[0]) if kind == "qwen2_vl" else model.connector(hidden)


def test_rows_by_hand():
    class Layer(torch.nn.Module):
        num_heads = 2
        q_proj = k_proj = torch.nn.Identity()

    hidden = torch.randn(3, 5, 8)
    heads = hidden.unflatten(-1, (2, 4)).transpose(1, 2)
    shares = (heads @ heads.transpose(-1, -2) / 2).softmax(dim=-1)
    torch.testing.assert_close(class_row(Layer(), hidden, {}), shares[:, :, 0, 1:].mean(dim=1))
    torch.testing.assert_close(received(Layer(), hidden, {}), shares.mean(dim=(1, 2)))


def test_an_encoder_that_is_not_known_is_said():
    with watching(torch.nn.Linear(2, 2)) as watched:
        pass
    with pytest.raises(BackboneError, match="choose token_reduction merge"):
        watched.maps(1, None)


# --- in the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GRID)
def test_keeping_all_changes_nothing(kind):
    backbone = wide(kind)
    pixels = pixels_of(backbone)
    with torch.no_grad():
        plain = backbone.image_features(pixels)
        same = backbone.image_features(pixels, reduction=Reduction("vscan", 1.0))
        off = backbone.image_features(pixels, reduction=Reduction("none", 0.5))
        rows = rows_of(backbone, plain)
        for other in (same, off):
            assert other.counts == plain.counts
            assert not other.kept
            ours, theirs = (backbone.prefix(rows, features).hidden for features in (other, plain))
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", GRID)
@pytest.mark.parametrize("rule", RULES)
def test_every_family_by_every_rule(kind, rule):
    backbone = wide(kind)
    pixels = pixels_of(backbone, 3)
    with torch.no_grad():
        whole = backbone.image_features(pixels)
        some = backbone.image_features(pixels, reduction=Reduction(rule, 0.5))
        assert some.counts == (whole.counts[0] // 2,) * 3
        assert some.whole == whole.counts
        if rule not in ("vscan", "merge"):
            for kept, places, tokens in zip(some.tokens, some.kept, whole.tokens, strict=True):
                assert torch.equal(kept, tokens[places])
        one = backbone.image_features(pixels[1:2], reduction=Reduction(rule, 0.5))
        assert torch.equal(one.kept[0], some.kept[1])  # no other image has a part in it
        hidden = backbone.prefix(rows_of(backbone, some), some).hidden
    assert bool(torch.isfinite(hidden).all())


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen2_5_vl", "smolvlm", "internvl"])
def test_what_is_left_out_is_as_if_masked(kind):
    """The whole sequence with the dropped keys hidden, at its own positions: the same last states."""
    backbone = wide(kind)
    pixels = pixels_of(backbone)
    with torch.no_grad():
        whole = backbone.image_features(pixels)
        some = backbone.image_features(pixels, reduction=Reduction("vscan", 0.4))
        long, short = rows_of(backbone, whole), rows_of(backbone, some)
        long[1], short[1] = [*long[1], 70, 71, 72], [*short[1], 70, 71, 72]  # rows of two lengths
        batch, own = backbone.batch(long, whole), backbone.batch(short, some)
        mask = batch.mask.clone()
        image = batch.ids == backbone.image_token
        filled = []
        for row, (places, vectors, tokens) in enumerate(zip(some.kept, some.tokens, whole.tokens, strict=True)):
            gone = torch.ones(len(tokens), dtype=torch.bool)
            gone[places] = False
            mask[row, image[row].nonzero()[:, 0][gone]] = 0
            filled.append(tokens.index_copy(0, places, vectors))
        shown = ImageFeatures(tuple(filled), grids=whole.grids)
        masked = type(batch)(batch.ids, mask, batch.positions, batch.next_position, batch.types)
        theirs = backbone.hidden(masked, shown)[:, -1]
        ours = backbone.hidden(own, some)[:, -1]
    assert torch.equal(own.next_position, batch.next_position)
    for row in range(2):  # tokens behind the image are where they were
        assert torch.equal(own.positions[..., row, -8:], batch.positions[..., row, -8:])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_positions_of_several_images_by_hand():
    backbone = wide("llava")
    features = ImageFeatures(
        (torch.zeros(2, 64), torch.zeros(3, 64)), kept=(torch.tensor([1, 3]), torch.tensor([0, 2, 4])), whole=(4, 6)
    )
    image = backbone.image_token
    rows = [[7, image, image, image, image, image, 9], [7, 8]]
    batch = backbone.batch(rows, features)
    assert batch.positions[0].tolist() == [0, 2, 4, 5, 7, 9, 11]
    assert batch.next_position.tolist() == [12, 2]
    assert batch.positions[1, -2:].tolist() == [0, 1]
    three = wide("qwen2_vl")
    grids = torch.tensor([[1, 4, 4]])
    kept = ImageFeatures((torch.zeros(2, 64),), grids=grids, kept=(torch.tensor([1, 2]),), whole=(4,))
    batch = three.batch([[7, three.image_token, three.image_token, 9]], kept)
    assert batch.positions[:, 0].tolist() == [[0, 1, 1, 3], [0, 1, 2, 3], [0, 2, 1, 3]]
    assert batch.next_position.tolist() == [4]


@pytest.mark.parametrize("kind", OTHERS)
def test_families_without_a_grid_are_refused(kind):
    backbone = tiny.load(kind)
    with pytest.raises(UnsupportedError, match="set token_reduction to none"):
        backbone.image_features(pixels_of(backbone), "What?", Reduction("random", 0.5))


def test_a_prompt_that_would_not_fit_whole_is_refused():
    backbone = wide("llava")
    features = backbone.image_features(pixels_of(backbone, 1), reduction=Reduction("uniform", 0.1))
    rows = [backbone.prompter.ids([Turn("w" * 430)], features.counts)]
    with pytest.raises(AdaptKitError, match="with all of its image tokens"):
        backbone.batch(rows, features)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"keep": 0.0}, "token_keep is 0.0"), ({"keep": 1.2}, "at most 1"), ({"window": -1}, "token_window is -1")],
)
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(ConfigError, match=says):
        Reduction("vscan", **settings)


def test_tokens_without_a_grid_are_refused():
    with pytest.raises(BackboneError, match="12 tokens of an image are no square grid"):
        thinned(ImageFeatures((torch.zeros(12, 4),)), Reduction("uniform", 0.5), tiny.pixels(1))


def test_counts_from_shares():
    assert [Reduction("vscan", share).count(576) for share in (1.0, 0.333, 1 / 9, 1e-9)] == [576, 192, 64, 1]
    assert OTHERS == ("llava_next", "llava_onevision", "qwen3_vl", "idefics2", "blip2", "instructblip")
