"""Prompts: the library's own processors give the same ids; boundaries of answers; control tokens."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from adaptkit.backbones.mllm.prompts import Prompter, Turn
from adaptkit.errors import BackboneError, DataError
from tests.backbones import tiny_mllm as tiny

EXTRA = {
    "gemma3": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    "internvl": {
        **{"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"},
        "video_token": "<|video_pad|>",
    },
    "qwen2_vl": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
}


def processor_of(kind: str):
    """The library's own processor, as far as it can be built offline."""
    import transformers as t

    _, images = tiny.parts(kind)
    words = tiny.tokenizer(extra_special_tokens=EXTRA.get(kind, {}))
    if kind == "llava":
        return t.LlavaProcessor(
            images,
            words,
            patch_size=tiny.PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    if kind == "qwen2_vl":
        return t.Qwen2VLProcessor(images, words, t.Qwen2VLVideoProcessor())
    if kind == "idefics3":
        return t.Idefics3Processor(images, words, image_seq_len=1)
    if kind == "idefics2":
        return t.Idefics2Processor(images, words, image_seq_len=3)
    if kind == "gemma3":
        return t.Gemma3Processor(images, words, image_seq_length=4)
    if kind == "internvl":
        return t.InternVLProcessor(images, words, t.InternVLVideoProcessor(), image_seq_length=1)
    if kind == "paligemma":
        images.image_seq_length = 4
        return t.PaliGemmaProcessor(images, words)
    return t.Blip2Processor(images, words, num_query_tokens=3)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "idefics3", "idefics2", "gemma3", "internvl"])
def test_the_librarys_processor_gives_the_same_ids(kind):
    backbone = tiny.load(kind)
    pixels = tiny.pixels(1, backbone.spec.preprocessing.image_size)
    image = Image.fromarray((pixels[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    with torch.no_grad():
        counts = backbone.image_features(pixels).counts
    text = backbone.prompter.render([Turn("what is it?")])
    theirs = processor_of(kind)(
        images=[[image]] if kind.startswith("idefics") else [image],
        text=[text],
        add_special_tokens="<s>" not in text,
        **backbone._image_options,
    )
    ours = backbone.prompter.ids([Turn("what is it?")], counts)
    ids = theirs["input_ids"][0]
    assert ours == (ids.tolist() if isinstance(ids, torch.Tensor) else list(ids))


@pytest.mark.parametrize(
    ("kind", "text"), [("blip2", "Question: what is it? Answer:"), ("paligemma", "what is it?")]
)  # fmt: skip
def test_plain_prompts_are_the_processors(kind, text):
    """These families have no chat template; their processors put the image in front themselves."""
    backbone = tiny.load(kind)
    words = backbone.prompter.tokenizer
    image = Image.new("RGB", (tiny.SIDE, tiny.SIDE), "red")
    processor = processor_of(kind)
    if kind == "blip2":  # OPT's tokenizer starts every text
        text = words.bos_token + text
    theirs = processor(images=image, text=text)["input_ids"]
    ids = torch.tensor(theirs).flatten().tolist()
    assert backbone.prompter.ids([Turn("what is it?")], [backbone.image_features(tiny.pixels(1)).counts[0]]) == ids


def prompter(template="", kind="llava", **more):
    from adaptkit.backbones.mllm.families import FAMILY_OF_TYPE

    return Prompter("tiny", FAMILY_OF_TYPE[kind], tiny.tokenizer(), template, "<image>", 512)


def text_of(made, ids):
    return made.tokenizer.decode(ids)


@pytest.mark.parametrize("template", ["", tiny.USER, tiny.CHAT.replace("IMAGE", "<image>")])
def test_answers_are_what_stands_behind_the_prompt(template):
    made = prompter(template)
    turns = [Turn("what is it?")]
    rows = made.answers(turns, ["cat", "hot dog", "$5 \\(x\\)"])
    prompt = made._tokenise(made.render(turns))
    for name, row in zip(("cat", "hot dog", "$5 \\(x\\)"), rows, strict=True):
        whole = made._tokenise(made.render([Turn("what is it?", 1, name)]))
        assert whole[: len(prompt)] == prompt
        assert whole[len(prompt) : len(prompt) + len(row) - 1] == row[:-1]
        assert text_of(made, row[:-1]).strip() == name
        assert row[-1] in made.end_tokens()
    assert made.answers(turns, ["cat"], end=False)[0] == rows[0][:-1]


def test_the_end_of_a_turn_is_the_templates():
    assert prompter(tiny.CHAT.replace("IMAGE", "<image>")).answers([Turn("q")], ["a"])[0][-1] == tiny.IDS["<|im_end|>"]
    assert prompter("").answers([Turn("q")], ["a"])[0][-1] == tiny.IDS["</s>"]
    endless = tiny.USER.replace("</s>", " ")
    assert prompter(endless).answers([Turn("q")], ["a"])[0][-1] == tiny.IDS["</s>"]


def test_conversations_with_examples():
    made = prompter(tiny.USER)
    turns = [Turn("q", 1, "cat"), Turn("q", 1, "dog"), Turn("q")]
    text = made.render(turns)
    assert (
        text == "<s>USER: <image>\nq ASSISTANT: cat</s>USER: <image>\nq ASSISTANT: dog</s>USER: <image>\nq ASSISTANT:"
    )
    assert made.ids(turns, [1, 2, 3]).count(tiny.IDS["<image>"]) == 6
    plain = prompter("", "paligemma").render([Turn("q", 1, "cat"), Turn("q")])
    assert plain == "<image><s>q\ncat\n<image>q\n"


def test_start_tokens_are_neither_lost_nor_doubled():
    for kind in ("llava", "gemma3", "paligemma", "blip2"):
        ids = tiny.load(kind).prompter.ids([Turn("q")], [2])
        assert ids.count(tiny.IDS["<s>"]) == 1


@pytest.mark.parametrize("name", ["<image>", "a<|im_end|>b", "</s>", "x <fake_token_around_image>"])
def test_control_tokens_are_refused(name):
    with pytest.raises(DataError, match="control token"):
        prompter().check_text(name, "class name")
    assert prompter().check_text("a <b> & [c]", "class name") == "a <b> & [c]"


def test_templates_that_fail_say_so():
    broken = prompter("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BackboneError, match="roles must alternate"):
        broken.render([Turn("q")])
    with pytest.raises(BackboneError, match="can't be used"):
        prompter("{% for m in messages %}").render([Turn("q")])
    hostile = prompter("{{ messages.__class__.__mro__[1].__subclasses__() }}<image>")
    with pytest.raises(BackboneError, match="can't be used"):
        hostile.render([Turn("q")])
