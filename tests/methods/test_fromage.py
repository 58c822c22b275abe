"""FROMAGe: counts, what changes, both modes against plain versions, concatenated labels, retrieval, bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.errors import BackboneError, ConfigError
from adaptkit.methods.adapter import AdaptedModel, load_adapter, save_adapter
from adaptkit.methods.mllm._tuning import IGNORED
from adaptkit.methods.mllm.fromage import RET, Fromage, FromageConfig
from adaptkit.training.loop import fit_method
from tests.backbones import tiny_mllm as tiny
from tests.methods.tiny import DESCRIPTIONS, NAMES, ask, make_task, query, trained

WIDTH, INPUTS = tiny.WIDTH, 64
LABELS = torch.tensor([0, 3, 1])


@pytest.fixture(scope="module")
def llava():
    return tiny.load("llava")


def make(backbone, descriptions=None, seed=0, **settings):
    return Fromage(backbone, NAMES, config=FromageConfig(**settings), seed=seed, descriptions=descriptions)


def test_how_much_it_trains(llava):
    def formula(inputs, width, tokens, dim):
        return tokens * width * (inputs + 1) + dim * (inputs + 1) + dim * (width + 1) + width + 1

    assert formula(1024, 4096, 1, 256) == 5_513_729
    for tokens, dim in ((1, 256), (4, 32)):
        assert make(llava, tokens=tokens, dim=dim).num_trained() == formula(INPUTS, WIDTH, tokens, dim)
    assert make(llava).log_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_only_the_retrieval_row_changes_beside_the_maps(llava):
    before = {key: value.clone() for key, value in llava.state_dict().items()}
    method = make(llava)
    row = method.ret.detach().clone()
    trained(method)
    assert {name for name, _ in method.named_parameters()} == {
        *("ret", "log_scale", "prefix_map.linear.weight", "prefix_map.linear.bias"),
        *(f"{which}_map.{kind}" for which in ("image", "text") for kind in ("weight", "bias")),
    }
    assert not torch.equal(method.ret, row)
    norm = llava.model.get_input_embeddings().weight.norm(dim=1).mean()
    torch.testing.assert_close(method.ret.norm(), norm)
    assert all(torch.equal(before[key], value) for key, value in llava.state_dict().items())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_family_learns(kind):
    backbone = tiny.load(kind)
    method = make(backbone)
    pixels = query(backbone, "images", 2)
    logits = ask(method, pixels)
    assert (logits[0] - logits[1]).abs().max() > 1e-4
    losses = trained(method, epochs=4)["losses"]
    assert losses[-1] < losses[0]
    by_likelihood = make(backbone, answer="likelihood")
    by_likelihood.load_adapter_state(method.adapter_state())
    assert torch.isfinite(ask(by_likelihood, pixels)).all()


def test_retrieval_mode_ignores_pixels(llava):
    """Texts are read without images: their loss and points are the same for any."""
    method = make(llava, captioning=0.0)
    one, two = (torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    first, second = method.losses(one, LABELS), method.losses(two, LABELS)
    assert set(first) == {"retrieval", "contrast"}
    assert torch.equal(first["retrieval"], second["retrieval"])
    assert not torch.equal(first["contrast"], second["contrast"])


def extended(method, row, features=None):
    """Log-probabilities [length, vocabulary + 1] of one row, from embeddings put together by hand."""
    batch = method.mllm.batch([row], features, [1])
    vectors = method.mllm.embed(batch.ids.clamp(min=0))
    vectors = torch.where((batch.ids == RET)[..., None], method.ret, vectors)
    hidden = method.mllm.hidden(batch, features, embeds=vectors)[0]
    own = hidden @ method.ret
    return hidden, torch.cat([method.mllm.logits(hidden), own[:, None]], dim=1).log_softmax(dim=1)


def test_losses_are_those_of_a_plain_version(llava):
    method, prompter = make(llava, concatenate=0.0), llava.prompter
    pixels = query(llava, "images", 3)
    captions = method.candidate_texts([NAMES[label] for label in LABELS])
    losses = method.losses(pixels, LABELS)
    tails = [row[:-1] for row in prompter.answers([Turn("")], captions)]
    with_image, alone = prompter.ids([Turn("")], [1]), prompter.ids([Turn("", 0)])
    vocabulary, caption, retrieval, points = tiny.VOCABULARY, [], [], []
    for place, tail in enumerate(tails):
        features = method.features(pixels[place : place + 1])
        _, scores = extended(method, [*with_image, *tail, RET], features)
        caption += [-scores[len(with_image) + k - 1, token] for k, token in enumerate(tail)]
        hidden, scores = extended(method, [*alone, *tail, RET])
        retrieval += [-scores[len(alone) + k - 1, token] for k, token in enumerate([*tail, vocabulary])]
        points.append(method.text_map(hidden[-1]))
    torch.testing.assert_close(losses["captioning"], torch.stack(caption).mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses["retrieval"], torch.stack(retrieval).mean(), rtol=1e-5, atol=1e-5)
    texts = F.normalize(torch.stack(points), dim=1)
    images = F.normalize(method.encode_image(pixels), dim=1)
    similarity = (1 / 0.07) * texts @ images.T
    target = torch.arange(3)
    wanted = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
    torch.testing.assert_close(losses["contrast"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "paligemma", "idefics2"])
def test_concatenated_captions_keep_their_labels(kind, monkeypatch):
    backbone = tiny.load(kind)
    method, seen = make(backbone), []
    loss = method._language_loss
    monkeypatch.setattr(method, "_language_loss", lambda hidden, labels: seen.append(labels) or loss(hidden, labels))
    batches, batch = [], method.mllm.batch
    monkeypatch.setattr(method.mllm, "batch", lambda rows, *more: batches.append((rows, *more)) or batch(rows, *more))
    features = method.features(query(backbone, "images", 3))
    captions = method.candidate_texts([NAMES[label] for label in LABELS])
    method.captioning_loss(captions, features, pairs=True)
    (rows, _, answers), (labels,) = batches[-1], seen
    assert len(rows) == len(labels) == 2
    for row, marks in zip(rows, labels, strict=True):
        assert len(row) == len(marks)
        assert all(mark in (IGNORED, token) for token, mark in zip(row, marks, strict=True))
        assert all(
            mark == IGNORED for token, mark in zip(row, marks, strict=True) if token in (RET, backbone.image_token)
        )
    text = [[mark for mark in marks if mark != IGNORED] for marks in labels]
    decoded = [backbone.prompter.tokenizer.decode(marks) for marks in text]
    assert [part in decoded[0] for part in captions] == [True, True, False]
    assert captions[2] in decoded[1]
    assert rows[0].count(RET) == 2
    bos = backbone.prompter.tokenizer.bos_token_id
    assert rows[0].count(bos) == rows[1].count(bos)
    begin = next(place for place, mark in enumerate(labels[0]) if mark != IGNORED)
    assert answers[0] == len(rows[0]) - begin


def test_pairs_that_do_not_fit_stay_apart(llava, monkeypatch):
    method = make(llava, dict.fromkeys(NAMES, ("long " * 55,)))
    batches, batch = [], method.mllm.batch
    monkeypatch.setattr(method.mllm, "batch", lambda rows, *more: batches.append(rows) or batch(rows, *more))
    method.captioning_loss(["long " * 55] * 2, method.features(query(llava, "images", 2)), pairs=True)
    assert len(batches[-1]) == 2


def test_a_planted_pair_is_found_in_a_gallery(llava):
    """After overfitting 4 pairs, each caption's [RET] finds its own image, and no other one as near."""
    method = make(llava)
    task = make_task(llava, "images", shots=1)
    fit_method(method, task, replace(method.default_training, epochs=30, lr=1e-2))
    with torch.no_grad():
        gallery = F.normalize(method.encode_image(task.train.select(torch.arange(4))), dim=1)
        points = F.normalize(method.encode_captions(method.candidate_texts(NAMES)), dim=1)
    assert (points @ gallery.T).argmax(dim=1).tolist() == [0, 1, 2, 3]
    assert ask(method, task.train.select(torch.arange(4))).argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_classes_are_the_mean_of_their_templates(llava):
    method = Fromage(llava, NAMES, templates=("a photo of {}", "{}!"), config=FromageConfig())
    pixels = query(llava, "images", 2)
    with torch.no_grad():
        parts = [F.normalize(method.encode_captions([t.format(n.replace("_", " ")) for n in NAMES]), dim=1)
                 for t in ("a photo of {}", "{}!")]  # fmt: skip
        wanted = (
            method.similarity_scale * F.normalize(method.encode_image(pixels), dim=1) @ F.normalize(sum(parts), dim=1).T
        )
    torch.testing.assert_close(ask(method, pixels), wanted, rtol=1e-4, atol=1e-4)


def test_on_disk(llava, tmp_path):
    method = make(llava, DESCRIPTIONS, dim=16)
    trained(method)
    save_adapter(tmp_path / "out", AdaptedModel(method))
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size < 4 * method.num_trained() + 4096
    pixels = query(llava, "images", 3)
    assert torch.equal(ask(load_adapter(tmp_path / "out", llava).method, pixels), ask(method, pixels))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dim": 0, "captioning": -1}, "dim is 0, but must be at least 1; captioning is -1"),
        ({"captioning": 0, "retrieval": 0}, "there is no loss"),
        ({"concatenate": 1.5}, "concatenate is 1.5"),
        ({"variant": "softmax"}, "variant is 'softmax', but must be sft"),
        ({"answers": "names"}, "must be captions"),
        ({"micro_batch": 2}, "whole batch"),
    ],
)
def test_settings_that_cannot_be_used(settings, says):
    with pytest.raises(ConfigError, match=says):
        FromageConfig(**settings)


def test_captions_longer_than_the_context(llava):
    with pytest.raises(BackboneError, match="more than the 512"):
        trained(make(llava, {NAMES[0]: ("word " * 110,)}))
