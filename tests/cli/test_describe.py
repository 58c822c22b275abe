"""`adaptkit describe` with tiny random models of each kind, and --descriptions in run, compare and data check."""

from __future__ import annotations

import json

import pytest
import torch

from adaptkit.commands.main import main  # noqa: F401  # the verb is found through it
from adaptkit.data import describing
from adaptkit.data.describing import (
    STYLES,
    Answer,
    Asking,
    LanguageModel,
    answers_path,
    describe_classes,
    prompts_of,
    sentences_in,
    with_article,
)
from adaptkit.data.descriptions import read_descriptions
from adaptkit.errors import BackboneError, ConfigError, MissingPathError, StorageError

WORDS = (*"?.:-", "a", "an", "oak", "beech", "pine", "red", "tall", "leaf", "bark", "has", "is", "with", "what")


def save_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_model(folder, kind, positions=256):
    """A tiny random language model with its tokenizer."""
    from transformers import (
        CLIPVisionConfig,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        T5Config,
        T5ForConditionalGeneration,
    )

    size = save_tokenizer(folder)
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "causal":
            model = GPT2LMHeadModel(
                GPT2Config(vocab_size=size, n_positions=positions, n_embd=16, n_layer=1, n_head=2, **ends)
            )
        elif kind == "seq2seq":
            shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
            model = T5ForConditionalGeneration(T5Config(vocab_size=size, decoder_start_token_id=0, **shape, **ends))
        else:
            shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
            images = CLIPVisionConfig(image_size=8, patch_size=4, **shape)
            model = LlavaForConditionalGeneration(
                LlavaConfig(vision_config=images, text_config=LlamaConfig(vocab_size=size, **shape, **ends))
            )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("causal"), "causal")


ASKED = ("--question", "what is {} ?", "--samples", 3, "--temperature", 1, "--max-tokens", 6, "--keep", "all")


def described(call, model, out, *more):
    outcome = call("describe", "--classes", "oak,beech,pine", "--model", model, "--out", out, *ASKED, *more, "--json")
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout), json.loads(answers_path(out).read_text())


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "multimodal"])
def test_two_files_come_out(call, tmp_path, kind):
    model = save_model(tmp_path / "model", kind)
    facts, answers = described(call, model, tmp_path / "trees.json")
    assert set(facts["classes"]) == {"oak", "beech", "pine"}
    assert facts["empty"] == [name for name, count in facts["classes"].items() if not count]
    plain = read_descriptions(tmp_path / "trees.json")
    assert {name: len(given) for name, given in plain.items()} == {k: v for k, v in facts["classes"].items() if v}
    kept = read_descriptions(answers_path(tmp_path / "trees.json"))
    assert {name: given for name, given in kept.items() if given} == plain
    assert answers["made_by"]["model"] == str(model)
    assert answers["made_by"]["questions"] == ["what is {} ?"]
    for name, records in answers["answers"].items():
        assert [record["prompt"] for record in records] == [f"what is {with_article(name)} ?"] * 3
    assert len({record["answer"] for records in answers["answers"].values() for record in records}) > 3


def test_answers_depend_on_the_seed_alone(call, causal, tmp_path):
    _, first = described(call, causal, tmp_path / "a.json")
    _, other_batches = described(call, causal, tmp_path / "b.json", "--batch-size", 1)
    _, other_seed = described(call, causal, tmp_path / "c.json", "--seed", 1)
    assert first["answers"] == other_batches["answers"]
    assert first["answers"] != other_seed["answers"]
    outcome = call("describe", "--classes", "pine,oak", "--model", causal, "--out", tmp_path / "d.json", *ASKED)
    assert outcome.exit_code == 0, outcome.output
    fewer = json.loads(answers_path(tmp_path / "d.json").read_text())["answers"]
    assert fewer == {name: first["answers"][name] for name in ("pine", "oak")}


def test_draws_follow_the_softmax():
    scores = torch.tensor([[0.0, 1.0, 2.0]]).expand(4000, 3)
    drawn = describing._SeededDraw(range(4000), 0.7)(torch.zeros(4000, 1), scores).argmax(dim=1)
    wanted = (torch.tensor([0.0, 1.0, 2.0]) / 0.7).softmax(dim=0)
    torch.testing.assert_close(drawn.bincount(minlength=3) / 4000, wanted, atol=0.03, rtol=0)


class Scripted:
    """Answers by a script, and remembers what it was asked."""

    name = "scripted"

    def __init__(self, fail_after=None):
        self.asked, self.fail_after = [], fail_after

    def answer(self, prompts, seeds, asking):
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise KeyboardInterrupt
        self.asked += prompts
        return [Answer(f"It has {seed % 1000} leaves. And", True) for seed in seeds]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    asking, out, names = Asking(("what is {}?", "who is {name}?")), tmp_path / "out.json", ["oak", "beech", "pine"]
    with pytest.raises(KeyboardInterrupt):
        describe_classes(names, Scripted(fail_after=3), asking, out, batch_size=3)
    assert list(read_descriptions(out)) == ["oak"]  # beech was half done
    again, shown = Scripted(), []
    found = describe_classes(names, again, asking, out, progress=lambda what, done, total: shown.append((done, total)))
    assert again.asked == ["what is a beech?", "who is beech?", "what is a pine?", "who is pine?"]
    assert shown == [(2, 6), (6, 6)]
    whole = describe_classes(names, Scripted(), asking, tmp_path / "whole.json")
    assert found == whole == read_descriptions(out) == read_descriptions(tmp_path / "whole.json")
    assert all(len(given) == 2 for given in found.values())
    done = Scripted()
    assert describe_classes(names, done, asking, out) == found
    assert done.asked == []


def test_other_questions_do_not_mix(tmp_path):
    out = tmp_path / "out.json"
    describe_classes(["oak"], Scripted(), Asking(("what is {}?",)), out)
    with pytest.raises(StorageError, match=r"out.answers.json was written with another seed"):
        describe_classes(["oak"], Scripted(), Asking(("what is {}?",), seed=1), out)
    with pytest.raises(StorageError, match="another questions"):
        describe_classes(["oak"], Scripted(), Asking(("who is {}?",)), out)
    describe_classes(["oak"], Scripted(), Asking(("who is {}?",)), out, overwrite=True)
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(StorageError, match="wasn't written here"):
        describe_classes(["oak"], Scripted(), Asking(("what is {}?",)), tmp_path / "mine.json")


def test_questions_name_the_class():
    assert (
        prompts_of("tabby_cat", Asking(("{} or {name}?",), samples=2, temperature=1))
        == ["a tabby cat or tabby cat?"] * 2
    )
    assert with_article("Airliner") == "an Airliner"
    for style in STYLES.values():
        for prompt in prompts_of("oak", Asking(style.questions)):
            assert "an oak" in prompt
            assert "{" not in prompt


@pytest.mark.parametrize(
    ("answer", "keep", "finished", "sentences"),
    [
        (" lobed leaves\n- acorns\n* bark\n\nQuestion: next", "lines", False, ["lobed leaves", "acorns", "bark"]),
        ("lobed leaves\n2. acorns\n3) bark", "lines", True, ["lobed leaves", "acorns", "bark"]),
        ("- lobed leaves\n- acor", "lines", False, ["lobed leaves"]),
        ("- lobed leaves\n- acorns", "lines", True, ["lobed leaves", "acorns"]),
        ("acor", "lines", False, ["acor"]),
        ("1) a\n\n2) b", "lines", True, ["a"]),
        ("It has\nlobed leaves. It is", "sentence", True, ["It has lobed leaves."]),
        ("It is 3.5 m tall", "sentence", True, ["It is 3.5 m tall."]),
        ("One. Two.", "all", True, ["One. Two."]),
        ("  \n ", "lines", True, []),
        (" . ", "sentence", True, []),
    ],
)  # fmt: skip
def test_what_counts_of_an_answer(answer, keep, finished, sentences):
    assert sentences_in(answer, keep, finished=finished) == sentences


def test_what_cannot_be_asked(causal, tmp_path, refused):
    with pytest.raises(ConfigError, match=r"for the class; 'what\?' has neither"):
        Asking(("what?",))
    with pytest.raises(ConfigError, match="samples is 3, and at temperature 0 all answers are the same"):
        Asking(("{}?",), samples=3)
    with pytest.raises(MissingPathError, match=r"There is no folder '\./nowhere'"):
        LanguageModel("./nowhere")
    with pytest.raises(BackboneError, match="has 256 positions"):
        LanguageModel(str(causal)).answer(["what is an oak ?"], [1], Asking(("{}",), max_tokens=300))
    with pytest.raises(BackboneError, match="has no chat template"):
        LanguageModel(str(causal), chat=True)
    (tmp_path / "empty").mkdir()
    message = refused("describe", "--classes", "oak,", "--model", tmp_path / "empty", "--out", tmp_path / "o.json")
    assert "of the language model" in message
    assert "couldn't be loaded" in message
    assert "Say which classes" in refused("describe", "--model", causal, "--out", tmp_path / "o.json")
    assert "call it o.json" in refused("describe", "oak,", "--model", causal, "--out", tmp_path / "o.txt")
    assert not (tmp_path / "o.json").exists()


def test_a_model_that_does_not_write(tmp_path):
    from transformers import ViTConfig

    save_tokenizer(tmp_path)
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="which doesn't write text"):
        LanguageModel(str(tmp_path))


# --- --descriptions in the other verbs --------------------------------------------------------------------------------

SENTENCES = {name: [f"{name}, a tree.", f"the bark of {name}"] for name in ("beech", "oak", "pine", "yew")}


@pytest.fixture
def trees(tmp_path):
    path = tmp_path / "trees.json"
    path.write_text(json.dumps(SENTENCES))
    return path


def test_run_and_compare_take_descriptions(call, photos, trees, tmp_path):
    words = ("--descriptions", trees, "--shots", 2, "--json")
    outcome = call("run", photos, "--method", "cupl", *words, "--out", tmp_path / "run")
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout)["fit"]["sentences"] == 8
    saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert saved["descriptions"] == SENTENCES
    assert call("predict", tmp_path / "run", photos / "oak/0.png").exit_code == 0
    outcome = call("compare", photos, "--methods", "zero-shot,dclip,waffleclip", *words, "--out", tmp_path / "compare")
    assert outcome.exit_code == 0, outcome.output
    assert len(json.loads(outcome.stdout)["runs"]) == 3


def test_descriptions_that_do_not_fit(call, refused, photos, trees, tmp_path):
    out = ("--out", tmp_path / "out", "--shots", 2)
    assert "dclip reads descriptions" in refused("run", photos, "--method", "dclip", *out)
    trees.write_text(json.dumps({"oak": ["x"], "beech": [], "birch": ["y"]}))
    message = refused("run", photos, "--method", "dclip", "--descriptions", trees, *out).replace("\n", " ")
    assert (
        "2 classes missing (pine, yew), 1 class without a sentence (beech), 1 name that no class has (birch)" in message
    )
    assert "There are no descriptions at" in refused("compare", photos, "--descriptions", tmp_path / "no.json", *out)
    assert not (tmp_path / "out").exists()
    words = ("run", photos, "--method", "dclip", "--descriptions", trees, "--allow-undescribed", *out)
    assert "'beech' (and 2 more) has none" in refused(*words)
    outcome = call(*words, "--set", "method.fallback=true", "--json")
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout)["fit"]["classes_without_descriptions"] == ["beech", "pine", "yew"]


def test_a_check_counts_sentences(call, refused, photos, trees):
    report = json.loads(call("data", "check", photos, "--descriptions", trees, "--json").stdout)
    assert report["descriptions"] == dict.fromkeys(SENTENCES, 2)
    assert "8 sentences, 2 per class" in call("data", "check", photos, "--descriptions", trees).output
    assert json.loads(call("data", "check", photos, "--json").stdout)["descriptions"] == dict.fromkeys(SENTENCES, 0)
    trees.write_text('{"oak": ["x"]}')
    assert "3 classes missing" in refused("data", "check", photos, "--descriptions", trees)
