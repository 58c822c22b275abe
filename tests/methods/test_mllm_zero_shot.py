"""MLLM zero-shot: every route and normalisation against what it means, computed the long way round."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.errors import AdaptKitError, ConfigError, DataError, UnsupportedError
from adaptkit.methods import methods
from adaptkit.methods.mllm._credit import Credit, includes, lineage
from adaptkit.methods.mllm._decoding import constrained_beams
from adaptkit.methods.mllm._letters import LetterTally, shifted, spread
from adaptkit.methods.mllm._likelihood import fit_calibration
from adaptkit.methods.mllm.mllm_zero_shot import NOT_FOUND, MllmZeroShot, MllmZeroShotConfig
from adaptkit.types import FitTask, TensorInputs
from tests.backbones import tiny_mllm as tiny
from tests.backbones.test_mllm import brute_force
from tests.methods.tiny import tiny_clip

NAMES = ("ship", "ship_wreck", "cat", "hot dog")


@pytest.fixture(scope="module")
def backbone():
    return tiny.load("llava")


@pytest.fixture(scope="module")
def pixels():
    return tiny.pixels(3)


def make(backbone, names=NAMES, **settings):
    return MllmZeroShot(backbone, names, config=MllmZeroShotConfig(**settings))


def ask(method, pixels):
    with torch.no_grad():
        return method(pixels)


def long_way(method, pixels, *, end=True):
    """Sums over tokens [images, classes], one pass per image and class, and the candidates' lengths."""
    backbone, shown = method.mllm, [name.replace("_", " ") for name in method.class_names]
    answers = backbone.prompter.answers([Turn(method.question)], shown, end=end)
    with torch.no_grad():
        features = backbone.image_features(pixels, method.question)
    rows = [backbone.prompter.ids([Turn(method.question)], [count]) for count in features.counts]
    return brute_force(backbone, rows, features, answers), torch.tensor([len(answer) for answer in answers])


@pytest.mark.parametrize("end", [True, False])
def test_sum_and_mean(backbone, pixels, end):
    method = make(backbone, normalisation="sum", end_token=end)
    sums, lengths = long_way(method, pixels, end=end)
    torch.testing.assert_close(ask(method, pixels), sums, rtol=1e-5, atol=1e-4)
    mean = make(backbone, end_token=end)
    torch.testing.assert_close(ask(mean, pixels), sums / lengths, rtol=1e-5, atol=1e-5)


def test_pmi_takes_off_what_is_said_without_the_image(backbone, pixels):
    method = make(backbone, normalisation="pmi")
    sums, _ = long_way(method, pixels)
    answers = backbone.prompter.answers([Turn(method.question)], ["ship", "ship wreck", "cat", "hot dog"])
    blind = brute_force(backbone, [backbone.prompter.ids([Turn(method.question, 0)])], None, answers)
    torch.testing.assert_close(ask(method, pixels), sums - blind, rtol=1e-4, atol=1e-4)


def test_pmi_is_zero_without_an_image(backbone, pixels, monkeypatch):
    method = make(backbone, normalisation="pmi")
    blind = backbone.prompter.ids([Turn(method.question, 0)])
    monkeypatch.setattr(method, "asked", lambda features: backbone.prefix([blind] * len(features)))
    assert ask(method, pixels).abs().max() < 1e-4  # of sums near 100


def test_pmi_null_takes_off_blank_images(backbone, pixels):
    method = make(backbone, normalisation="pmi-null")
    sums, _ = long_way(method, pixels)
    blank, _ = long_way(method, method.blank_images())
    torch.testing.assert_close(ask(method, pixels), sums - blank.mean(dim=0), rtol=1e-4, atol=1e-4)


def task_of(labels, pixels):
    return FitTask(NAMES, TensorInputs(pixels[None], torch.tensor(labels)))


def test_calibration_learns_and_serves_new_classes(backbone):
    images = tiny.pixels(8)
    method = make(backbone, normalisation="calibrated")
    before = ask(method, images)
    torch.testing.assert_close(before, ask(make(backbone), images))
    labels = [0, 0, 1, 1, 2, 2, 3, 3]
    method.fit(task_of(labels, images))
    after = ask(method, images)
    wanted = torch.tensor(labels)
    assert torch.nn.functional.cross_entropy(after, wanted) < torch.nn.functional.cross_entropy(before, wanted)
    assert not torch.equal(method.scale, torch.ones(4))
    torch.testing.assert_close(
        ask(method.set_classes(["a bird"]), images), ask(make(backbone, ("a bird",)), images)
    )  # fmt: skip
    torch.testing.assert_close(ask(method.set_classes(["cat", "ship"]), images), after[:, [2, 0]])
    with pytest.raises(DataError, match="at least 2 images of every class"):
        method.fit(task_of([0, 0, 1, 1, 2, 2, 3, 2], images))


def test_calibration_stays_near_one_where_nothing_is_to_be_learned():
    scores = torch.eye(3).repeat(4, 1) * 20
    scale, shift = fit_calibration(scores, torch.arange(3).repeat(4))
    torch.testing.assert_close(scale, torch.ones(3), rtol=0.01, atol=0.01)
    torch.testing.assert_close(shift, torch.zeros(3), rtol=0.01, atol=0.01)


def test_small_groups_change_nothing(backbone, pixels, monkeypatch):
    from adaptkit.backbones.mllm import language

    wanted = {route: ask(make(backbone, route=route), pixels) for route in ("likelihood", "letters")}
    monkeypatch.setattr(language, "KEYS_BYTES", 1)
    assert make(backbone).at_once() == 1
    for route, logits in wanted.items():
        torch.testing.assert_close(ask(make(backbone, route=route), pixels), logits, rtol=1e-4, atol=1e-5)


# --- letters ----------------------------------------------------------------------------------------------------------


def test_letters_do_not_depend_on_the_order_of_the_options(backbone, pixels):
    """With one shift per option every rotation of the list asks the same questions."""
    method = make(backbone, route="letters")
    logits = ask(method, pixels)
    facts = method.answer_facts()
    assert sum(facts["letters"].values()) == 4 * len(pixels)
    assert 0 <= facts["letter_bias"] <= 1
    assert method.answer_facts() == {}
    for turn in range(1, 4):
        order = [*NAMES[turn:], *NAMES[:turn]]
        rotated = ask(method.set_classes(order), pixels)
        torch.testing.assert_close(rotated, logits[:, [NAMES.index(name) for name in order]], rtol=1e-4, atol=1e-4)


def test_letters_of_more_classes_than_options(backbone, pixels):
    names = ("ship", "cat", "dog", "bird", "cow")
    likely = ask(make(backbone, names), pixels).topk(2, dim=1).indices
    logits = ask(make(backbone, names, route="letters", options=2), pixels)
    assert logits.topk(2, dim=1).indices.sort(dim=1).values.tolist() == likely.sort(dim=1).values.tolist()


def test_a_dual_encoder_can_choose_the_options(backbone):
    """The options are the classes that `mini` itself, on its own pixels of the image, finds nearest."""
    from adaptkit.backbones.load import load_backbone

    names = ("ship", "cat", "dog", "bird", "cow")
    square = tiny.pixels(3, 32)
    method = make(backbone, names, route="letters", options=2, shortlist="mini")
    logits = ask(method, square)
    mini = load_backbone("mini")
    plan = mini.spec.preprocessing
    assert plan.image_size == 32
    plain = (square - torch.tensor(plan.mean)[:, None, None]) / torch.tensor(plan.std)[:, None, None]
    with torch.no_grad():
        wanted = methods.get("zero-shot")(mini, names)(mini.encode_image(plain))
    assert (
        logits.topk(2, dim=1).indices.sort(dim=1).values.tolist()
        == wanted.topk(2, dim=1).indices.sort(dim=1).values.tolist()
    )
    for row, scores in zip(logits, wanted, strict=True):  # the others come in the order of its scores
        rest = scores.topk(5).indices[2:]
        assert row[rest].tolist() == sorted(row[rest].tolist(), reverse=True)
    assert make(backbone, names, shortlist="mini")._shortlister is None  # another route


def test_shortlists_that_cannot_be_made(backbone):
    for name, message in ((f"transformers:{tiny.save('llava')}", "isn't a CLIP-like"), ("minni", "mini")):
        with pytest.raises(AdaptKitError, match=message):
            make(backbone, route="letters", shortlist=name)


def test_letter_pieces():
    assert shifted([0, 1, 2], 2) == [2, 0, 1]
    tally = LetterTally()
    tally.add(torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]).log_softmax(dim=1))
    assert tally.counts == [1, 2]
    assert tally.bias == pytest.approx(1 / 3)
    assert LetterTally().bias == 0
    logits = spread(torch.tensor([[2, 0]]), torch.tensor([[-0.5, -1.0]]), torch.tensor([[9.0, 3.0, 8.0, 5.0]]))
    assert logits.tolist() == [[-1.0, -4.0, -0.5, -2.0]]


# --- constrained ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_constrained_decoding_is_the_librarys(backbone, pixels, beams):
    """`generate(prefix_allowed_tokens_fn=…)` over the same tree, from the same pixels."""
    names = ("ship", "ship wreck", "cat", "car", "cow", "shop")
    method = make(backbone, names, route="constrained", beams=beams)
    ours = ask(method, pixels)
    turns = [Turn(method.question)]
    answers = backbone.prompter.answers(turns, names)
    prompt = backbone.prompter.ids(turns, [method.placeholders])
    made = backbone._processor(images=list((pixels * 255).round().to(torch.uint8)), return_tensors="pt")

    def allowed(_row, ids):
        done = ids.tolist()[len(prompt) :]
        following = {answer[len(done)] for answer in answers if answer[: len(done)] == done and len(answer) > len(done)}
        return sorted(following) or [tiny.IDS["</s>"]]

    out = backbone.model.generate(
        input_ids=torch.tensor([prompt] * len(pixels)),
        attention_mask=torch.ones(len(pixels), len(prompt), dtype=torch.int64),
        pixel_values=made["pixel_values"],
        prefix_allowed_tokens_fn=allowed,
        num_beams=beams,
        do_sample=False,
        max_new_tokens=16,
        length_penalty=0.0,
        eos_token_id=tiny.IDS["</s>"],
        pad_token_id=tiny.IDS["<pad>"],
    )
    for row, ids in enumerate(out.tolist()):
        text = ids[len(prompt) :]
        named = next(i for i, answer in enumerate(answers) if text[: len(answer)] == answer)
        assert int(ours[row].argmax()) == named
        assert int((ours[row] > NOT_FOUND).sum()) <= beams


def test_wide_beams_are_the_exact_sums(backbone, pixels):
    torch.testing.assert_close(
        ask(make(backbone, route="constrained", beams=50), pixels), ask(make(backbone, normalisation="sum"), pixels)
    )


def test_greedy_is_short_sighted():
    from adaptkit.backbones.mllm.trie import Trie

    trie = Trie.build([[1, 2], [1, 3], [4, 5]])
    scores = torch.tensor([[0.6, 0.5, 0.5, 0.4, 1.0]]).log()
    assert constrained_beams(scores, trie, 1).isfinite().tolist() in ([[True, False, False]], [[False, True, False]])
    assert int(constrained_beams(scores, trie, 3).argmax()) == 2


# --- free answers -----------------------------------------------------------------------------------------------------


def test_free_answers_are_matched_and_counted(backbone, pixels, monkeypatch):
    said = iter(["A cat.", "<answer>Hot-dog</answer>", "no idea"])
    monkeypatch.setattr(backbone.prompter, "text", lambda ids: next(said))
    method = make(backbone, route="open", max_tokens=2, aliases={"hot dog": ("hot-dog", "frankfurter")})
    logits = ask(method, pixels)
    assert logits[0].argmax() == 2
    assert logits[1].argmax() == 3
    assert logits[2].isnan().all()
    facts = method.answer_facts()
    assert facts["share_exact"] == facts["share_alias"] == facts["share_none"] == pytest.approx(1 / 3)


def test_unmatched_answers_can_count_as_the_nearest_class(backbone, pixels, monkeypatch):
    monkeypatch.setattr(backbone.prompter, "text", lambda ids: "shi wreck")
    method = make(backbone, route="open", max_tokens=2, unmatched="nearest")
    logits = ask(method, pixels)
    assert torch.isfinite(logits).all()
    assert method.answer_facts()["share_embedding"] == 1
    monkeypatch.setattr(backbone.prompter, "text", lambda ids: "")
    assert ask(method, pixels).isnan().all()


def test_unanswered_images_are_counted_wrong():
    from adaptkit.evaluation.metrics import compute_metrics
    from adaptkit.evaluation.protocols import counted_wrong

    logits, labels = np.array([[2.0, 0, 0], [np.nan] * 3, [np.nan] * 3]), np.array([0, 0, 2])
    filled, answered = counted_wrong(logits, labels)
    assert answered.tolist() == [True, False, False]
    metrics = compute_metrics(filled, labels, 3)
    assert (metrics.correct, metrics.total) == (1, 3)
    assert np.isnan(logits[1]).all()
    assert counted_wrong(filled, labels)[0] is filled
    filled, answered = counted_wrong(np.array([[np.nan], [3.0]]), np.array([0, 0]))
    assert answered.tolist() == [False, True]
    assert (compute_metrics(filled, np.array([0, 0]), 2).correct, filled.shape) == (1, (2, 2))


# --- questions and refusals -------------------------------------------------------------------------------------------


def test_the_noun_comes_from_the_setting_the_template_or_nowhere(backbone):
    assert make(backbone).noun == "object"
    assert make(backbone, noun="vessel").question.startswith("What vessel is")
    pets = MllmZeroShot(backbone, NAMES, templates=("a photo of a {}, a type of pet.",))
    assert pets.noun == "pet"
    assert pets.fit(FitTask(NAMES, TensorInputs(tiny.pixels(4)[None], torch.arange(4))))["prompt"] == pets.question


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"options": 1}, "from 2 to 26"),
        ({"options": 27}, "from 2 to 26"),
        ({"beams": 0}, "at least 1"),
        ({"route": "constrained", "end_token": False}, "needs it"),
    ],
)
def test_settings_that_cannot_be_used(settings, says):
    with pytest.raises(ConfigError, match=says):
        MllmZeroShotConfig(**settings)


def test_bad_questions_and_names_are_refused(backbone):
    with pytest.raises(ConfigError, match=r"no other field than \{noun\}"):
        make(backbone, prompt="What {thing} is it?")
    with pytest.raises(DataError, match="control token"):
        make(backbone, prompt="<image> What is it?")
    with pytest.raises(DataError, match="class name 'a <image>' holds"):
        make(backbone, ("cat", "a <image>"))
    method = make(backbone)
    with pytest.raises(DataError, match="control token"):
        method.set_classes(["cat", "</s>"])
    assert method.class_names == NAMES
    with pytest.raises(UnsupportedError, match="isn't one"):
        MllmZeroShot(tiny_clip(), NAMES)


@pytest.mark.parametrize("kind", [kind for kind in tiny.KINDS if kind != "llava"])
def test_every_family(kind):
    backbone = tiny.load(kind)
    images = tiny.pixels(2, backbone.spec.preprocessing.image_size)
    method = make(backbone, normalisation="sum")
    sums, _ = long_way(method, images)
    torch.testing.assert_close(ask(method, images), sums, rtol=1e-5, atol=1e-4)
    assert torch.isfinite(ask(make(backbone, route="letters"), images)).all()
    names = methods.get("tip-adapter")(backbone, NAMES).class_names
    assert names == NAMES


# --- partial credit ---------------------------------------------------------------------------------------------------

TAXONOMY = {"ship": "vehicle", "ship_wreck": "vehicle", "cat": "pet", "hot dog": "food", "pet": "animal"}


@pytest.mark.parametrize(
    ("text", "label", "credit"),
    [
        ("A cat.", 2, 1.0),
        ("<answer>pet</answer>", 2, 2 * 2 / 5),  # cat, pet, animal against pet, animal
        ("an animal", 2, 2 / 4),
        ("a ship", 1, 2 / 4),  # another class of its group
        ("vehicle", 1, 2 / 3),
        ("hot dog", 2, 0.0),
        ("no idea", 2, 0.0),
        ("", 2, 0.0),
        ("a kitty", 2, 1.0),
    ],
)
def test_hierarchical_credit(text, label, credit):
    assert Credit(NAMES, TAXONOMY, {"cat": ("kitty",)}).of(text, label) == pytest.approx(credit)


def test_taxonomies():
    assert lineage("cat", TAXONOMY) == ["cat", "pet", "animal"]
    assert lineage("stone", TAXONOMY) == ["stone"]
    assert Credit(NAMES, {}).of("cat", 2) == 1
    for wrong in ({"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "b"}):
        with pytest.raises(ConfigError, match="belongs to itself"):
            MllmZeroShotConfig(taxonomy=wrong)


def test_names_are_included_as_words():
    assert includes("It is a Ship-wreck, surely", "ship-wreck")
    assert not includes("shipping", "ship")
    assert not includes("", "ship")
    assert not includes("cat <answer>dog</answer>", "cat")


def test_free_answers_are_judged(backbone, pixels, monkeypatch):
    said = iter(["a cat", "the pet <image>", ""])
    monkeypatch.setattr(backbone.prompter, "text", lambda ids: next(said))
    method = make(backbone, route="open", max_tokens=2, taxonomy=TAXONOMY)
    ask(method, pixels)
    facts = method.judged_facts([2, 2, 0])
    assert facts["text_inclusion"] == pytest.approx(1 / 3)
    assert facts["hierarchical_credit"] == pytest.approx((1 + 0.8 + 0) / 3)
    words = torch.nn.functional.normalize(
        backbone.text_features(["a cat", "the pet", "nothing", "cat", "ship"]), dim=-1
    )
    wanted = (words[0] @ words[3] + words[1] @ words[3] + words[2] @ words[4]) / 3
    assert facts["embedding_similarity"] == pytest.approx(float(wanted), abs=1e-5)
    assert method.judged_facts([2, 2]) == {}  # other images
    method.answer_facts()
    assert method.judged_facts([2, 2, 0]) == {}
    assert "hierarchical_credit" not in make(backbone, route="open").judged_facts([])


def test_one_class_can_be_wrong(backbone, monkeypatch):
    """A run on one class: an answer that names nothing isn't right for want of another class."""
    from adaptkit.data.sources import load_dataset
    from adaptkit.evaluation.protocols import plan_run, run_method
    from adaptkit.evaluation.tasks import make_task

    data = load_dataset("digits")
    kept = {
        name: [i for i, label in enumerate(getattr(data, name).labels) if label == 0][:4] for name in ("train", "test")
    }
    one = replace(
        data,
        class_names=data.class_names[:1],
        train=replace(data.train.subset(kept["train"]), class_names=data.class_names[:1]),
        val=None,
        test=replace(data.test.subset(kept["test"]), class_names=data.class_names[:1]),
    )
    said = iter(["no idea", data.class_names[0], "no idea", "no idea"])
    monkeypatch.setattr(backbone.prompter, "text", lambda ids: next(said))
    task = make_task(one, "few-shot", 1, 0)
    plan = plan_run("mllm-zero-shot", backbone, task, overrides=["method.route=open", "method.max_tokens=2"])
    part = run_method(plan, backbone).result.parts[0]
    assert (part.correct, part.total, part.num_classes) == (1, 4, 1)
    assert part.metrics["answers"]["share_none"] == 0.75
