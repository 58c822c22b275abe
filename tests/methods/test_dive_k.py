"""DiVE-k and ViRFT: parsers, rewards, questions, answers in two steps and their baselines, bad input."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from adaptkit.backbones.load import load_backbone
from adaptkit.errors import BackboneError, ConfigError
from adaptkit.evaluation.leaks import check_leaks, leaked_names
from adaptkit.methods.adapter import AdaptedModel, load_adapter, save_adapter
from adaptkit.methods.mllm import dive_k
from adaptkit.methods.mllm._grpo import Question
from adaptkit.methods.mllm._mining import Mined
from adaptkit.methods.mllm._rewarded import keeps_format, letter_of
from adaptkit.methods.mllm.dive_k import DiveK, DiveKConfig
from adaptkit.methods.mllm.mllm_zero_shot import MllmZeroShot, MllmZeroShotConfig
from adaptkit.methods.mllm.virft import Virft, VirftConfig, holds_name
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, TensorInputs
from tests.backbones import tiny_mllm as tiny
from tests.methods.tiny import NAMES, NOVEL, make_task, query

pytest.importorskip("peft")
PLAIN = {"tags": False, "max_tokens": 8, "class_list": "never", "samples": 5}


@pytest.fixture(scope="module")
def llava():
    return tiny.load("llava")


def make(backbone, names=NAMES, seed=0, **settings):
    return DiveK(backbone, names, config=DiveKConfig(**(PLAIN | settings)), seed=seed)


def make_virft(backbone, **settings):
    return Virft(backbone, NAMES, config=VirftConfig(**({"tags": False, "max_tokens": 8} | settings)))


def scripted(monkeypatch, answers):
    """Samples that don't come from a model: for each image in turn, these texts."""
    given = iter(answers)
    monkeypatch.setattr(
        DiveK, "_sampled", lambda self, features, numbers, names: [next(given) for _ in range(len(features))]
    )


def ask(method, pixels):
    with torch.no_grad():
        return method(pixels)


# --- parsers and rewards ----------------------------------------------------------------------------------------------


LETTERS_OF = [
    ("A", "A"),
    ("B.", "B"),
    (" C \n", "C"),
    ("(D)", "D"),
    ("E", None),  # there were four options
    ("The answer is B", "B"),
    ("Answer: C, since it has wings.", "C"),
    ("A cat", None),
    ("I think it is D.", "D"),
    ("I'm not sure.", None),
    ("", None),
    ("b", None),
    ("B. tabby cat", "B"),
    ("A or B", "B"),
    ("Not A, but B.", None),  # two stand alone: it isn't guessed which is meant
    ("B, yes: B.", "B"),
    ("ABBA.", None),
    ("7-A.", None),
    ("<think>A. no, B.</think><answer>C</answer>", "C"),
    ("<answer>A</answer><answer>B</answer>", "B"),
    ("<answer>the second one</answer> A.", None),
    ("<answer>D", "D"),  # cut off
    ("**B**", "B"),
    ("I can't help with that.", None),
]


def test_letters_that_answers_choose():
    assert len(LETTERS_OF) >= 20
    assert [(text, letter_of(text, 4)) for text, _ in LETTERS_OF] == LETTERS_OF


FORMATS = [
    ("<think>it has wings</think><answer>B</answer>", True),
    ("<think>it has\nwings</think>\n\n<answer>\nB\n</answer>\n", True),
    ("<think></think><answer></answer>", True),
    ("<answer>B</answer>", False),
    ("B", False),
    ("", False),
    ("Well, <think>x</think><answer>B</answer>", False),
    ("<think>x</think> so <answer>B</answer>", False),
    ("<think>x</think><answer>B</answer>.", False),
    ("<think>x</think><answer>B</answer><answer>C</answer>", False),
    ("<think><think>x</think><answer>B</answer>", False),
    ("<think>x</think><answer>B", False),
]


def test_formats():
    assert [(text, keeps_format(text)) for text, _ in FORMATS] == FORMATS


def test_rewards(llava):
    question = Question((), (0,), ("B", 3))
    method = make(llava, tags=True, max_tokens=4)
    good, other = "<think>wings</think><answer>B</answer>", "<think>wings</think><answer>C</answer>"
    assert method.rewards(good, question) == {"format": 1.0, "choice": 1.0}
    assert method.rewards(other, question) == {"format": 1.0, "choice": 0.0}
    assert method.rewards("B", question) == {"format": 0.0, "choice": 1.0}
    assert method.rewards("I can't help with that.", question) == {"format": 0.0, "choice": 0.0}
    assert make(llava).rewards("B", question) == {"choice": 1.0}
    virft, question = make_virft(llava, tags=True, max_tokens=4), Question((), (0,), "tabby cat")
    assert virft.rewards("<think>x</think><answer>A Tabby Cat!</answer>", question) == {"format": 1.0, "accuracy": 1.0}
    assert virft.rewards("<think>tabby cat</think><answer>dog</answer>", question)["accuracy"] == 0.0
    assert make_virft(llava).rewards("a tabby cat, I'd say", question) == {"accuracy": 1.0}


def test_names_in_answers():
    assert holds_name("The Pallas's cat", "pallas cat")
    assert holds_name("<answer>7-Series sedan.</answer>", "7-series_sedan")
    assert not holds_name("series sedan", "7-series sedan")  # one way only
    assert not holds_name("", "river")
    assert not holds_name("a river", "!")


# --- questions --------------------------------------------------------------------------------------------------------


def test_questions_show_what_was_mined(llava, monkeypatch):
    """Image 0 is too easy, 1 is confused, 2 has only the truth's rivals; nothing is asked about the first."""
    scripted(monkeypatch, [["tabby cat"] * 5, ["river", "golden retriever"], ["7-series sedan"] * 5, ["?"]])
    method, asked = make(llava, options=3), []
    questions = method.questions
    monkeypatch.setattr(method, "questions", lambda *given: asked.append(questions(*given)) or asked[-1])
    task = make_task(llava, "images", shots=1)
    report = fit_method(method, task, replace(method.default_training, epochs=1, batch_size=4))
    assert report["images_too_easy"] == 1
    assert report["options_by_source"] == {"mined": 1, "filled": 1, "unparsed": 1}
    assert report["options_from"] == "samples"
    assert len(asked) == 1
    assert sorted(question.truth[1] for question in asked[0]) == [2, 3, 3]
    for question in asked[0]:
        lines = question.turns[0].text.splitlines()
        letter, count = question.truth
        names = dict(line.split(". ", 1) for line in lines[1:-1])
        assert len(names) == count
        assert lines[0] == "What object is shown in the image? Answer with its name only."
        assert names[letter] in ("golden_retriever".replace("_", " "), "river", "7-series sedan")
    shown = make(llava, tags=True, max_tokens=4)._choice(["a", "b"]).splitlines()
    assert shown[0] == "What object is shown in the image?"
    assert "<answer>" in shown[-1]


def test_an_all_easy_batch_moves_nothing(llava, monkeypatch):
    scripted(monkeypatch, [[name.replace("_", " ")] * 5 for name in NAMES])
    method = make(llava)
    before = {key: value.clone() for key, value in method.adapter_state().items()}
    report = fit_method(method, make_task(llava, "images", shots=1), replace(method.default_training, epochs=2))
    assert report["images_too_easy"] == 4
    assert report["losses"] == [0.0, 0.0]
    assert all(torch.equal(before[key], value) for key, value in method.adapter_state().items())


def test_options_are_mined_again(llava, monkeypatch):
    method, mined = make(llava, refresh_every=2), []
    mine = method._mine
    monkeypatch.setattr(method, "_mine", lambda after, show: mined.append(after) or mine(after, show))
    fit_method(method, make_task(llava, "images", shots=1), replace(method.default_training, epochs=5))
    assert mined == [0, 2, 4]


@pytest.mark.parametrize("source", ["random", "text-neighbours", "likelihood"])
def test_other_sources_of_options(llava, source):
    method = make(llava, mined_from=source, options=3)
    task = make_task(llava, "images", shots=2)
    report = fit_method(method, task, replace(method.default_training, epochs=1))
    assert report["options_by_source"] == {"ranked": 8}
    assert report["options_from"] == source
    assert report["mean_options"] == 3
    again = make(llava, mined_from=source, options=3)
    fit_method(again, task, replace(method.default_training, epochs=1))
    assert again._mined == method._mined
    labels = task.train.labels.tolist()
    assert [one.truth for one in method._mined] == labels
    if source == "text-neighbours":
        assert {frozenset(one.options) for one in method._mined[:2]} == {frozenset(method._mined[0].options)}
    if source == "likelihood":
        scores = ask(MllmZeroShot(llava, NAMES), task.train.select(torch.arange(8)))
        for one, row in zip(method._mined, scores, strict=True):
            wanted = row.topk(3).indices.tolist()
            assert set(one.options) == set(wanted if one.truth in wanted else [*wanted[:2], one.truth])


def test_classes_are_listed_where_it_is_asked_for(llava, monkeypatch):
    seen = []
    rows = DiveK.prompt_rows
    monkeypatch.setattr(
        DiveK, "prompt_rows", lambda self, f, turns: seen.append(turns[0][0].text) or rows(self, f, turns)
    )
    pixels, task = query(llava, "images", 2), make_task(llava, "images", shots=1)
    for where, mining, answering in (("mining", True, False), ("always", True, True), ("never", False, False)):
        method = make(llava, class_list=where)
        report = fit_method(method, task, replace(method.default_training, epochs=1))
        assert ("golden retriever, river" in seen[0]) == mining
        assert report["options_from"] == ("samples, with the list of training classes" if mining else "samples")
        seen.clear()
        ask(method.set_classes(NOVEL), pixels)
        assert ("snow leopard, acorn" in seen[0]) == answering
        seen.clear()


def test_training_texts_name_training_classes_only(llava):
    """All of them, in the list and among options; the leak scanner finds a novel name that is planted."""
    for method in (make(llava, class_list="mining"), make_virft(llava)):
        texts = method.set_classes(NOVEL).training_texts()  # whatever it answers at the moment
        assert set(leaked_names(texts, NAMES, ())) == set(NAMES)
        check_leaks(texts, NOVEL, NAMES)
    planted = make(llava, prompt="Is it an acorn or what {noun} is it?")
    assert leaked_names(planted.training_texts(), NOVEL, NAMES).keys() == {"acorn"}


# --- answers ----------------------------------------------------------------------------------------------------------

SAMPLES = [
    ["river", "tabby cat", "tabby cat", "a dog", "A Tabby cat"],
    ["golden retriever", "river", "7-series sedan", "7-series sedan", "river"],
    ["a dog"] * 5,
    ["river"] * 5,
]


def test_two_steps_by_hand(llava, monkeypatch):
    scripted(monkeypatch, SAMPLES)
    method, asked = make(llava, options=2), []
    letters = method._asked_letters
    monkeypatch.setattr(method, "_asked_letters", lambda f, options: asked.extend(options) or letters(f, options))
    pixels = query(llava, "images", 4)
    logits = ask(method, pixels)
    assert [set(options) for options in asked] == [{0, 2}, {2, 3}]  # the most frequent ones; a single one isn't asked
    assert logits[2].isnan().all()
    assert logits[3].argmax() == 2
    assert (logits[3].sort().values[:-1] == dive_k.NOT_FOUND).all()
    for row, options in zip(logits, asked, strict=False):
        names = [NAMES[index].replace("_", " ") for index in options]
        alone = ask(MllmZeroShot(llava, names, config=MllmZeroShotConfig(route="letters", shifts=1)), pixels)
        torch.testing.assert_close(row[options], alone[asked.index(options)], atol=1e-4, rtol=1e-4)
    labels = [0, 1, 2, 2]
    facts = method.judged_facts(labels)
    final = [int(row.argmax()) for row in logits]
    assert facts == {
        "accuracy_first_sample": 0.5,  # golden retriever and river
        "accuracy_majority_vote": 0.5,  # tabby cat and river
        "accuracy_pass_at_5": 0.75,
        "accuracy_two_step": sum([final[0] == 0, final[1] == 1, final[3] == 2]) / 4,
    }
    facts = method.answer_facts()
    assert facts["share_exact"] == 14 / 20
    assert facts["share_none"] == 6 / 20
    assert facts["share_without_options"] == 0.25
    assert (facts["samples_per_image"], facts["top_p"], facts["repetition_penalty"]) == (5, 0.95, 1.1)
    assert method.judged_facts(labels) == {}
    assert method.answer_facts() == {}


def test_images_without_options_can_go_to_the_nearest_class(llava, monkeypatch):
    scripted(monkeypatch, [["a dog"] * 5, ["?"] * 5])
    logits = ask(make(llava, unmatched="nearest"), query(llava, "images", 2))
    assert logits[0].max() == 0
    assert logits[1].isnan().all()  # there is no text that could be near


def test_aliases_count(llava, monkeypatch):
    scripted(monkeypatch, [["tom", "stream"]])
    method = make(llava, aliases={"tabby cat": ("tom",), "river": ("Stream",)})
    logits = ask(method, query(llava, "images", 1))
    assert (logits[0] > dive_k.NOT_FOUND).tolist() == [True, False, True, False]
    assert method.answer_facts()["share_alias"] == 1


@pytest.mark.parametrize(("written", "best"), [("<think>x</think><answer>B</answer>", 1), ("no idea", 0)])
def test_written_letters(llava, monkeypatch, written, best):
    """With tags the letter is read from an answer; without one the first option stays, and it is counted."""
    scripted(monkeypatch, [["river", "tabby cat"]])
    method = make(llava, tags=True)
    ids = method.mllm.prompter.tokenizer(written, add_special_tokens=False).input_ids
    monkeypatch.setattr(method.mllm, "generate", lambda prefix, most: [ids] * len(prefix))
    orders = []
    shortlist = method._shortlist
    monkeypatch.setattr(method, "_shortlist", lambda *given: orders.append(shortlist(*given)) or orders[-1])
    logits = ask(method, query(llava, "images", 1))
    assert logits[0].argmax() == orders[0][best]
    assert method.answer_facts()["answers_without_letter"] == (written == "no idea")


def test_samples_do_not_depend_on_other_images(llava):
    method = make(llava, samples=3)
    pixels, texts = query(llava, "images", 3), []
    sampled = method._sampled
    method._sampled = lambda *given: texts.append(sampled(*given)) or texts[-1]
    ask(method, pixels)
    ask(method, pixels[[2]])
    ask(method, pixels.flip(0))
    assert texts[1] == texts[0][2:]
    assert texts[2] == texts[0][::-1]
    assert len({text for row in texts[0] for text in row}) > 1


def test_the_cheaper_way_is_a_choice_among_likely_names(llava):
    """Before training it is what mllm-zero-shot does with as many options."""
    pixels = query(llava, "images", 3)
    plain = MllmZeroShotConfig(route="letters", options=3)
    wanted = ask(MllmZeroShot(llava, NAMES, config=plain), pixels)
    torch.testing.assert_close(ask(make(llava, route="letters", options=3), pixels), wanted, rtol=1e-4, atol=1e-4)
    for route in ("likelihood", "constrained"):
        wanted = ask(MllmZeroShot(llava, NAMES, config=MllmZeroShotConfig(route=route)), pixels)
        for method in (make(llava, route=route), make_virft(llava, route=route)):
            torch.testing.assert_close(ask(method, pixels), wanted, rtol=1e-4, atol=1e-4)


def test_open_answers_are_asked_for_as_trained(llava, monkeypatch):
    method, seen = make_virft(llava, tags=True, max_tokens=2), []
    prefix = method.prefix
    monkeypatch.setattr(method, "prefix", lambda f, turns: seen.append(turns[0][0]) or prefix(f, turns))
    ask(method, query(llava, "images", 1))
    trained = method.questions(torch.zeros(1, 3), torch.tensor([0]))[0]
    assert seen == list(trained.turns)
    assert trained.truth == NAMES[0]
    assert "<think>" in seen[0].text


# --- learning, leaving and coming -------------------------------------------------------------------------------------


def test_it_learns_to_choose_on_a_small_model_that_reads_letters():
    """The embedded model on three pictures of noise: what is rewarded is chosen more often."""
    backbone = load_backbone("mini-mllm")
    names = ("red circle", "blue square", "green star")
    method = DiveK(backbone, names, config=DiveKConfig(**PLAIN, mined_from="random", rollouts=8, beta=0.0), seed=1)
    side = backbone.spec.preprocessing.image_size
    pixels = torch.rand(1, 3, 3, side, side, generator=torch.Generator().manual_seed(0))
    task = FitTask(names, TensorInputs(pixels, torch.arange(3)))
    report = fit_method(method, task, replace(method.default_training, epochs=10, batch_size=3, lr=3e-3))
    assert report["reward_choice"][-1] > report["reward_choice"][0]
    assert Counter(one.how for one in method._mined) == {"ranked": 3}


@pytest.mark.parametrize("kind", ["dive-k", "virft"])
def test_an_adapter_on_disk(llava, tmp_path, kind):
    method = make(llava) if kind == "dive-k" else make_virft(llava, route="likelihood")
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.02)
    save_adapter(tmp_path / "out", AdaptedModel(method))
    loaded = load_adapter(tmp_path / "out").method
    pixels = query(llava, "images", 3)
    torch.testing.assert_close(ask(loaded, pixels), ask(method, pixels), equal_nan=True)
    config = json.loads((tmp_path / "out" / "peft" / "adapter_config.json").read_text())
    assert config["r"] == 16
    assert len(config["target_modules"]) == 14


# --- bad input --------------------------------------------------------------------------------------------------------


def test_settings_that_cannot_be_used():
    wrong = {"samples": 0, "temperature": -1, "top_p": 0, "repetition_penalty": 0, "refresh_every": -1}
    with pytest.raises(ConfigError) as found:
        DiveKConfig(**wrong)
    assert all(name in str(found.value) for name in wrong)
    for settings in ({"options": 1}, {"options": 27}, {"rollouts": 1}, {"r": 0}, {"alpha": 0}, {"prompt": " "}):
        for kind in (DiveKConfig, VirftConfig):
            with pytest.raises(ConfigError, match=next(iter(settings))):
                kind(**settings)


def test_what_does_not_fit_is_said_at_once(llava):
    with pytest.raises(BackboneError, match="max_tokens"):
        DiveK(llava, NAMES)  # 1,024 tokens of thoughts, and a context of 512
    names = tuple(f"a long name of a class with the number {number}" for number in range(20))
    with pytest.raises(BackboneError, match="max_tokens"):
        make(llava, names, class_list="mining")
    make(llava, names)


def test_mined_options_say_where_the_truth_is():
    assert Mined((3, 1, 2), 1, "mined").place == 1
