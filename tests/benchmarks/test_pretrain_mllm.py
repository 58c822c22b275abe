"""How `mini-mllm` is trained: its questions, its tokenizer, its layout, and one short training."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from adaptkit.backbones.load import load_backbone
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.backbones.mllm.trie import Trie
from adaptkit.data import synthetic
from benchmarks.pretrain_mini import mllm, stream
from benchmarks.pretrain_mini import mllm_layout as layout
from benchmarks.pretrain_mini import mllm_questions as asking

NAMES = [
    "red striped circle",
    "zaprel",
    "Übergrößenträger",
    "日本の 城",
    "🦜 parrot",
    "a-b_c/d (e)",
    "\u0000\u200d",
    "Ġ",
    "ʼn",
]


@pytest.fixture(scope="module", autouse=True)
def fonts():
    if not len(stream.glyph_masks()):
        pytest.skip("no printed font is installed, so glyphs can't be drawn")


@pytest.fixture(scope="module")
def tokenizer():
    return layout.make_tokenizer()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three steps of a training."""
    out = tmp_path_factory.mktemp("mllm")
    words = ["--steps", "3", "--batch-size", "8", "--width", "64", "--layers", "3", "--inner", "64", "--out", str(out)]
    outcome = CliRunner().invoke(mllm.main, words)
    assert outcome.exit_code == 0, outcome.output
    assert json.loads((out / "training.json").read_text())["steps"] == 3
    again = CliRunner().invoke(mllm.main, [*words, "--steps", "4", "--resume"])
    assert again.exit_code == 0, again.output
    assert json.loads((out / "training.json").read_text())["steps"] == 4
    return out


def test_what_is_kept_out_is_neither_shown_nor_said():
    rng = np.random.default_rng(0)
    pictures, known = asking.draw_pictures(rng, 400)
    assert pictures.shape == (400, 32, 32, 3)
    texts = [f"{item.question} {item.answer}" for picture in known for item in asking.questions(rng, picture)]
    assert len(texts) == 1200
    barred = {*synthetic.UNSEEN_SHAPES, *synthetic.UNSEEN_TEXTURES, *synthetic.species_attributes()}
    assert not [text for text in texts if barred & set(text.replace(".", " ").replace("?", " ").split())]
    combinations = re.compile(f"({'|'.join(synthetic.SHAPE_CLASSES)})(?! creature)")  # a creature isn't one
    assert not [text for text in texts if combinations.search(text)]
    assert {picture.kind for picture in known} == set(asking.SHARES)


def test_every_lettered_choice_has_one_right_option():
    rng = np.random.default_rng(1)
    known = asking.draw_pictures(rng, 200)[1]
    items = [asking.lettered(rng, picture) for picture in known]
    for picture, item in zip(known, items, strict=True):
        assert len(set(item.options)) == len(item.options) >= 2
        assert item.options["ABCDEF".index(item.answer)] == picture.name
        assert f"{item.answer}. {picture.name}\n" in item.question
    assert {item.answer for item in items} == set("ABCDEF")


@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_written(tokenizer, name):
    ids = tokenizer(name, add_special_tokens=False).input_ids
    assert min(ids) >= len(layout.SPECIAL)
    assert tokenizer.decode(ids).split() == name.split()


def test_words_never_melt_together(tokenizer):
    words, rng = mllm.Words(tokenizer), np.random.default_rng(2)
    known = asking.draw_pictures(rng, 40)[1]
    texts = [item.question for picture in known for item in asking.questions(rng, picture)]
    texts += [" ".join(NAMES)]
    assert len(texts) == 121
    for text in texts:
        assert words(text) == tokenizer(text, add_special_tokens=False).input_ids


def test_questions_side_by_side_are_as_if_asked_alone(trained, tokenizer):
    """The sum of a row's log-likelihoods equals what the loaded model gives for each question by itself."""
    backbone = load_backbone(f"transformers:{trained / 'model'}")
    words, rng = mllm.Words(tokenizer), np.random.default_rng(3)
    pictures, known = asking.draw_pictures(rng, 5)
    asked = [[*asking.questions(rng, picture), asking.sentence(rng), asking.yes_no(rng, picture)] for picture in known]
    model = mllm.Trainee(0, width=64, layers=3, inner=64)
    model.llava.load_state_dict(backbone.model.state_dict())
    rows = [mllm.make_row(picture, items, words, 17) for picture, items in zip(known, asked, strict=True)]
    batch = mllm.collate(pictures, rows)
    with torch.no_grad():
        hidden = model.states(batch)[-1]
        scores = model.llava.lm_head(model.llava.model.language_model.norm(hidden)).log_softmax(-1)
        features = backbone.image_features(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255)
        compared = 0
        for place, (row, items) in enumerate(zip(rows, asked, strict=True)):
            for number, item in enumerate(items, start=2):
                at = [i for i, t in enumerate(row.targets) if t != mllm.IGNORED and row.block[i] == number]
                packed = sum(float(scores[place, i, row.targets[i]]) for i in at)
                turn, shown = Turn(item.question, int(item.image)), [place] if item.image else []
                prompt = backbone.prompter.ids([turn], [17] * len(shown))
                trie = Trie.build(backbone.prompter.answers([turn], [item.answer]))
                alone = backbone.candidate_scores(backbone.prefix([prompt], features.select(shown)), trie)
                assert packed == pytest.approx(float(alone), abs=1e-4)
                compared += 1
    assert compared == 25


def test_the_readers_look_at_the_ends_of_words_and_options(tokenizer):
    words, picture = mllm.Words(tokenizer), asking.Picture("shapes", "red plain star", {})
    text = "What?\nA. red dotted star\nB. red plain star\nAnswer."
    item = asking.Asked(text, "B", options=("red dotted star", "red plain star"))
    row = mllm.make_row(picture, [item], words, 17)
    kept = {name: [mark for mark in marks if mark != mllm.IGNORED] for name, marks in row.marks.items()}
    assert kept == {"word": [1, 0, 1, 1, 1, 1], "option": [0, 1], "place": [0, 1]}
    assert [target for target in row.targets if target != mllm.IGNORED] == [*words("B"), layout.END]
    assert row.positions == list(range(len(row.ids)))
