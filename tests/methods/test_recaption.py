"""ReCaption: the gate on planted violations, variants over epochs, probe questions and metrics, when training stops."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from adaptkit.data.descriptions import read_descriptions
from adaptkit.errors import ConfigError, DataError
from adaptkit.methods.mllm._rewrites import VariantSampler, gate, lemma
from adaptkit.methods.mllm.recaption import Recaption, RecaptionConfig
from adaptkit.methods.probe import SEVERAL, ProbeQuestion, make_probe, parsed, probe_metrics, probe_results
from adaptkit.training.loop import fit_method
from tests.backbones import tiny_mllm as tiny
from tests.methods.tiny import NAMES, make_task, query

CAPTION = "A brown dog with long ears runs over the wet grass."
GOOD = (
    "Over wet grass runs a dog, brown and with long ears.",
    "There is a brown dog running... its ears are long, and it runs over grass that is wet.",
    "The wet grass, a long-eared view: a brown dog runs, ears long.",
)
VARIANTS = {name: (f"a {name} by the lake", f"by the lake a {name}", f"the lake, and a {name} by it") for name in NAMES}


@pytest.fixture(scope="module")
def llava():
    return tiny.load("llava")


def make(backbone, descriptions=VARIANTS, **settings):
    config = RecaptionConfig(**{"dropout": 0.0, **settings})
    return Recaption(backbone, NAMES, config=config, descriptions=descriptions)


def trained(method, epochs=3, lr=1e-2, **task):
    settings = replace(method.default_training, epochs=epochs, lr=lr)
    return fit_method(method, make_task(method.backbone, "images", **{"shots": 1, **task}), settings)


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_good_rewrites_pass():
    assert gate(CAPTION, GOOD[:2]).accepted == GOOD[:2]
    assert gate(CAPTION, []) == gate(CAPTION, ())
    assert gate("Two men sit on benches.", ["On a bench sit two men."]).accepted  # plurals are the same word


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A dog with long ears runs over the wet grass.", "missing"),  # brown is gone
        ("A brown dog with long ears runs over the grass.", "missing"),
        ("A brown cat with long ears runs over the wet grass.", "missing"),
        ("A brown dog with long ears runs over the wet grass to a frisbee.", "new"),
        ("A brown dog with long ears and a collar runs over the wet grass.", "new"),
        ("Brown dog.", "length"),
        ("A brown dog with long ears runs over the wet grass. " * 3, "length"),
        ("a BROWN dog, with long ears, runs over the wet grass!", "duplicate"),
        ("", "length"),
    ],
)
def test_planted_violations(text, reason):
    found = gate(CAPTION, [text, GOOD[0]])
    assert found.refused == ((text, reason),)
    assert found.accepted == (GOOD[0],)


def test_the_same_rewrite_twice_counts_once():
    found = gate(CAPTION, [GOOD[0], GOOD[0], GOOD[1]])
    assert found.accepted == GOOD[:2]
    assert found.reasons() == Counter(duplicate=1)


def test_lemmas():
    pairs = {"dogs": "dog", "berries": "berry", "boxes": "box", "churches": "church", "glass": "glass"}
    pairs |= {"grasses": "grass", "women": "woman", "bus": "bus", "dog's": "dog", "leaves": "leaf", "its": "its"}
    assert {word: lemma(word) for word in pairs} == pairs


def test_a_store_goes_round(tmp_path, llava):
    """What was written for --descriptions reads back as caption and rewrites, without the keywords."""
    store = {
        name: {"caption": said[0], "keywords": ["lake", "castle"], "rewrites": list(said[1:])}
        for name, said in VARIANTS.items()
    }
    file = tmp_path / "rewrites.json"
    file.write_text(json.dumps(store))
    assert read_descriptions(file) == VARIANTS
    assert make(llava, read_descriptions(file)).captions == make(llava).captions
    file.write_text(json.dumps({NAMES[0]: {"rewrites": ["a cat"]}}))
    with pytest.raises(DataError, match="rewrites of no caption"):
        read_descriptions(file)
    file.write_text(json.dumps({NAMES[0]: {"caption": "a cat", "rewrites": [3]}}))
    with pytest.raises(DataError, match="where a sentence"):
        read_descriptions(file)


def test_the_acceptance_rate_is_reported(llava):
    bad = {**VARIANTS, NAMES[2]: ("a river by the lake", "a river by the castle", "by the lake a river")}
    method = make(llava, bad)
    assert method.captions[2] == ("a river by the lake", "by the lake a river")
    facts = trained(method, epochs=1)["rewrites"]
    assert facts == {"given": 8, "accepted": 7, "refused": {"missing": 1}, "acceptance_rate": 7 / 8}
    free = make(llava, bad, gate=False)
    assert len(free.captions[2]) == 3
    assert "rewrites" not in trained(free, epochs=1)


# --- variants ---------------------------------------------------------------------------------------------------------


def test_the_sampler_covers_all_variants():
    sampler, drawn = VariantSampler(), {image: [] for image in range(5)}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        for _ in range(12):
            for image, seen in drawn.items():
                seen.append(sampler.draw(image, 4))
    for seen in drawn.values():
        assert all(sorted(seen[start : start + 4]) == [0, 1, 2, 3] for start in (0, 4, 8))
    assert len({tuple(seen) for seen in drawn.values()}) > 1


def test_an_image_has_another_caption_in_every_epoch(llava):
    method, seen = make(llava, stop=False), {}
    choose = method.choose

    def noted(inputs, labels):
        chosen = choose(inputs, labels)
        for image, place in zip(inputs.tolist(), chosen, strict=True):
            seen.setdefault(image, []).append(place)
        return chosen

    method.choose = noted
    trained(method, epochs=3, shots=2)
    assert len(seen) == 2 * len(NAMES)
    assert all(sorted(places) == [0, 1, 2] for places in seen.values())


# --- stopping ---------------------------------------------------------------------------------------------------------


def scripted(method, values):
    """Let the probe have given results, epoch by epoch."""
    script = iter(values)
    method._probed = lambda: {"balanced_accuracy": (pair := next(script))[0], "yes_rate": pair[1]}
    return method


def test_training_stops_and_the_best_epoch_stays(llava):
    method = scripted(make(llava, patience=2), [(0.6, 0.5), (0.7, 0.9), (0.7, 0.6), (0.7, 0.8), (0.6, 1.0), (1.0, 0.5)])
    kept = []
    after = method.after_epoch
    method.after_epoch = lambda epoch, epochs: (kept.append(method.adapter_state()), after(epoch, epochs))
    states = []
    original = method._probed
    method._probed = lambda: states.append({k: v.clone() for k, v in method.adapter_state().items()}) or original()
    report = trained(method, epochs=10)
    assert report["epochs"] == 5  # two epochs after the third, the best
    assert report["best_epoch"] == 3  # of equal ones the one that says yes half of the time
    assert [one["yes_rate"] for one in report["probe"]] == [0.5, 0.9, 0.6, 0.8, 1.0]
    now = method.adapter_state()
    assert all(torch.equal(now[key], value) for key, value in states[2].items())
    assert any(not torch.equal(now[key], value) for key, value in states[4].items())


@pytest.mark.parametrize("said", [0.0, 1.0])
def test_a_model_that_always_says_the_same_is_not_stopped(llava, said):
    report = trained(scripted(make(llava, patience=1), [(0.5, said)] * 4), epochs=4)
    assert (report["epochs"], report["best_epoch"]) == (4, 4)
    later = [(0.5, said), (0.5, said), (0.6, 0.3), (0.5, said), (0.5, said)]
    report = trained(scripted(make(llava, patience=2), later), epochs=9)
    assert (report["epochs"], report["best_epoch"]) == (5, 3)


def test_without_validation_images_it_runs_through(llava):
    report = trained(make(llava), val=False)
    assert report["epochs"] == 3
    assert "probe" not in report
    assert "probe" not in trained(make(llava, stop=False))


def test_the_probe_asks_about_validation_images(llava):
    method = make(llava, probe_images=3)
    task = make_task(llava, "images", shots=2)
    method._ask_about(task.val, 0)
    questions = [question for question, _ in method._probe]
    assert len(questions) == 3
    assert sum(question.answer for question in questions) == 2
    for question in questions:
        own = NAMES[int(task.val.labels[int(question.image)])].replace("_", " ")
        assert (f" a {own}?" in question.question) == question.answer
    found = method._probed()
    assert 0 <= found["balanced_accuracy"] <= 1
    report = trained(make(llava), epochs=2)
    assert len(report["probe"]) == 2
    again = trained(make(llava), epochs=2)
    assert again["probe"] == report["probe"]
    assert again["losses"] == report["losses"]


def test_it_learns_and_fits_again(llava):
    method = make(llava)
    report = trained(method, epochs=4, shots=2)
    assert report["losses"][-1] < report["losses"][0]
    assert set(report["loss_terms"]) == {"answer", "caption"}
    again = trained(method, epochs=1, shots=2)
    assert again["epochs"] == 1
    with torch.no_grad():
        assert torch.isfinite(method(query(llava, "images", 2))).all()


@pytest.mark.parametrize(("settings", "says"), [({"patience": 0}, "patience is 0"), ({"probe_images": 0}, "probe_im")])
def test_settings_that_cannot_be_used(settings, says):
    with pytest.raises(ConfigError, match=says):
        RecaptionConfig(**settings)


# --- the probe --------------------------------------------------------------------------------------------------------


def test_answers_are_read_by_their_first_word():
    said = {"Yes.": True, "no": False, "No, but yes": False, "Well, YES, no": True, "": None, "Nothing": None}
    said |= {"yesterday": None, "not that I know": None, "The answer is no.": False}
    assert {text: parsed(text) for text in said} == said


def test_metrics_by_hand():
    truths = [True, True, True, False, False, False, False, False]
    answers = [True, True, None, True, False, False, False, None]
    found = probe_metrics(answers, truths)
    wanted = {"accuracy": 5 / 8, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_rate": 3 / 8}
    wanted |= {"balanced_accuracy": (2 / 3 + 3 / 5) / 2, "unanswered": 2 / 8}
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize(("said", "recall", "yes"), [(True, 1.0, 1.0), (False, 0.0, 0.0), (None, 0.0, 0.0)])
def test_models_that_always_say_the_same(said, recall, yes):
    """All-yes has a high F1 and knows nothing."""
    truths = [True] * 30 + [False] * 10
    found = probe_metrics([said] * 40, truths)
    assert found["recall"] == recall
    assert found["yes_rate"] == yes
    assert found["balanced_accuracy"] == (0.0 if said is None else 0.5)
    assert found["unanswered"] == float(said is None)
    assert found["f1"] == pytest.approx(2 * 0.75 / 1.75 if said else 0.0)


def test_metrics_of_types_and_of_one_truth():
    questions = [ProbeQuestion("a", "?", place < 3, "colour" if place % 2 else "size") for place in range(4)]
    found = probe_results(questions, [True, False, True, False])
    assert found["accuracy"] == 0.75
    assert found["questions"] == 4
    assert found["types"]["size"]["balanced_accuracy"] == 1.0  # only true ones
    assert found["types"]["colour"]["accuracy"] == 0.5
    for answers, truths in (([], []), ([True], [True, False])):
        with pytest.raises(DataError, match="one for each"):
            probe_metrics(answers, truths)


def table(images=40):
    colours, sizes = ("red", "Blue", "green"), ("small", "large")
    return {
        f"{place}.png": {
            "colour": colours[place % 3] if place % 5 else [colours[place % 3], "white"],
            "size": sizes[place % 2],
            "kind": "bird",
        }
        for place in range(images)
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("several", [False, True])
def test_a_swapped_statement_is_never_true(seed, several):
    rows = table()
    rows["0.png"]["colour"] = ["RED", "blue ", "white"]
    made = make_probe(rows, seed, several=several)
    plain = {
        image: {key: {v.casefold().strip() for v in ([given] if isinstance(given, str) else given)}
                for key, given in row.items()}
        for image, row in rows.items()
    }  # fmt: skip
    checked = 0
    for one in made:
        stated = one.question.removeprefix("Is this true of the image: ").removesuffix("? Answer yes or no.")
        truth = all(
            value.casefold().strip() in plain[one.image][key]
            for key, value in (part.split(" is ") for part in stated.split(" and "))
        )
        assert truth == one.answer
        checked += 1
    assert checked == 120 + 40 * several
    single = [one for one in made if one.type != SEVERAL]
    assert sum(not one.answer for one in single) == 60  # half, though a third can't be swapped
    assert all(one.answer for one in single if one.type == "kind")
    assert make_probe(rows, seed, several=several) == made


def test_tables_that_cannot_be_asked_about():
    with pytest.raises(DataError, match="no attributes"):
        make_probe({})
    with pytest.raises(DataError, match="no attributes"):
        make_probe({"a.png": {}})
    for value in ("", " ", [], ["red", ""]):
        with pytest.raises(DataError, match=r"'a.png' has no value for 'colour'"):
            make_probe({"a.png": {"colour": value}})
    only = make_probe({"a.png": {"colour": "red"}, "b.png": {"colour": "RED"}})
    assert [one.answer for one in only] == [True, True]  # there is nothing to swap in
