"""FGVQA-like questions: the parsing rules on hard answers, scores by hand, bad files, and a whole round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from adaptkit.errors import AdaptKitError, BackboneError, DataError, MissingPathError, StorageError, UnsupportedError
from adaptkit.evaluation.fgvqa import Question, ask, parse_count, parse_pair, read_questions, score
from tests.backbones import tiny_mllm
from tests.methods.tiny import tiny_clip


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<answer>yes</answer>", "yes"),
        ("No, wait. <answer>Yes.</answer>", "yes"),
        ("<answer>yes</answer> or rather <answer>NO!</answer>", "no"),
        ("<answer>yes, no</answer>", "no"),
        ("Yes, they are the same.", "yes"),
        ("no. I mean yes", "yes"),
        ("<answer>maybe</answer> I say no", "no"),  # nothing inside: the text without its tags
        ("<answer></answer>yes", "yes"),
        ("<answer>no", "no"),
        ("I know nothing; nose, yesterday", None),
        ("", None),
        ("<answer>the same</answer>", None),
    ],
)
def test_pairs_are_parsed(text, wanted):
    assert parse_pair(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<answer>2</answer>", "2"),
        ("Candidates 1 and 3 differ. <answer>0</answer>", "0"),  # digits of the explanation don't count
        ("<answer>1</answer> <answer>3</answer>", "3"),
        ("It is 1, or 2.", "2"),
        ("I counted 3", "3"),
        ("<answer>two</answer> that is 2", "2"),
        ("<answer>10</answer>", None),
        ("there are 12 or 2.5 or 7 of them", None),
        ("<answer>3.</answer>", "3"),
        ("image1 and image2", None),
        ("none", None),
        ("", None),
    ],
)
def test_counts_are_parsed(text, wanted):
    assert parse_count(text) == wanted


def question(kind, answer, subset=""):
    return Question((Path("a"), Path("b")), "same?", answer, kind, subset)


def test_scores_by_hand():
    asked = [
        *(question("pair", "yes", "A"), question("pair", "no", "A"), question("pair", "no", "B")),
        *(question("count", "3", "A"), question("count", "3", "B"), question("count", "0", "B")),
    ]
    facts = score(asked, ["yes", "yes", "<answer>no</answer>", "3", "hm", "1"])
    assert facts["accuracy"] == 3 / 6
    assert facts["questions"] == 6
    assert facts["pair"] == {
        **{"accuracy": 2 / 3, "questions": 3, "majority_rate": 2 / 3, "unparsed": 0, "yes_rate": 2 / 3}
    }
    assert facts["count"] == {"accuracy": 1 / 3, "questions": 3, "majority_rate": 2 / 3, "unparsed": 1}
    assert facts["subsets"]["A"]["accuracy"] == 2 / 3
    assert facts["subsets"]["B"]["accuracy"] == 1 / 3
    assert "subsets" not in score([question("pair", "yes")], ["yes"])
    assert "count" not in score([question("pair", "yes")], ["yes"])
    for texts in ([], ["yes", "no"]):
        with pytest.raises(DataError, match="one each"):
            score([question("pair", "yes")], texts)
    with pytest.raises(DataError, match="at least one"):
        score([], [])


@pytest.fixture
def folder(tmp_path):
    for place in range(4):
        Image.new("RGB", (30, 20), (60 * place, 10, 200)).save(tmp_path / f"{place}.png")
    return tmp_path


def write(folder, *lines):
    path = folder / "questions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


PAIR = {"images": ["0.png", "1.png"], "question": "Same?", "answer": "Yes", "type": "pair"}
COUNT = {"images": ["0.png", "1.png", "2.png", "3.png"], "question": "How many?", "answer": 2, "type": "count"}


def test_a_whole_round(folder):
    questions = read_questions(write(folder, PAIR, "", {**COUNT, "subset": "CUB"}))
    assert [(one.type, one.answer, one.subset, len(one.images)) for one in questions] == [
        ("pair", "yes", "", 2),
        ("count", "2", "CUB", 4),
    ]
    seen, backbone = [], tiny_mllm.load("llava")
    answers = ask(backbone, questions, suffix="Short.", max_tokens=3, progress=lambda *args: seen.append(args))
    assert len(answers) == 2
    assert seen == [("questions", 1, 2), ("questions", 2, 2)]
    facts = score(questions, answers)
    assert 0 <= facts["accuracy"] <= 1
    assert facts["subsets"]["CUB"]["questions"] == 1
    with pytest.raises(BackboneError, match="the longest answer"):
        ask(backbone, questions)  # 1,024 tokens in a context of 512
    with pytest.raises(UnsupportedError, match="isn't a multimodal"):
        ask(tiny_clip(), questions)


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ("{", DataError, "Line 2 of .* isn't JSON"),
        ("[1]", DataError, "isn't a JSON object"),
        ("[" * 100_000, DataError, "isn't JSON"),
        ({**PAIR, "type": "pear"}, DataError, "the type 'pear'"),
        ({**PAIR, "answer": "maybe"}, DataError, "the answer 'maybe': a pair question"),
        ({**PAIR, "answer": True}, DataError, "the answer True"),
        ({**COUNT, "answer": 4}, DataError, "one of 0, 1, 2, 3"),
        ({**PAIR, "images": ["0.png"]}, DataError, "has 1 images"),
        ({**COUNT, "images": "0.png"}, DataError, "aren't a list"),
        ({**PAIR, "question": " "}, DataError, "isn't a text"),
        ({"images": []}, DataError, "no 'question'"),
        ({**PAIR, "images": ["0.png", "9.png"]}, MissingPathError, "isn't there"),
        ({**PAIR, "images": ["0.png", "../1.png"]}, StorageError, "leaves its folder"),
        ({**PAIR, "images": ["0.png", "/etc/passwd"]}, StorageError, "is absolute"),
    ],
)
def test_bad_lines(folder, line, kind, message):
    with pytest.raises(kind, match=message) as caught:
        read_questions(write(folder, PAIR, line))
    assert isinstance(caught.value, AdaptKitError)


def test_bad_files(folder):
    with pytest.raises(MissingPathError, match="no file of questions"):
        read_questions(folder / "none.jsonl")
    with pytest.raises(DataError, match="holds no questions"):
        read_questions(write(folder, " "))
    path = folder / "latin.jsonl"
    path.write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(DataError, match="UTF-8"):
        read_questions(path)
    broken = write(folder, {**PAIR, "question": "<image> same?"})
    with pytest.raises(DataError, match="control token"):
        ask(tiny_mllm.load("llava"), read_questions(broken), max_tokens=2)
