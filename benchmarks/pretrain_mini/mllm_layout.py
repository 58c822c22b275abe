"""`mini-mllm` in the layout of a LLaVA repository: mini's picture tower, a Llama, a tokenizer and a chat template."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones.mini import mini_config, mini_state_dict
from adaptkit.storage import atomic_path
from benchmarks.pretrain_mini.mllm_questions import corpus

CONTEXT = 2048
VOCABULARY = 1024
SPECIAL = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<image>")
PAD, START, END, USER, ASSISTANT, IMAGE = range(len(SPECIAL))

TEMPLATE = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% for c in m.content %}{{ c.text }}"
    "{% endfor %}</s>{% else %}<|user|>{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> Any:
    """Byte-level pairs in which every word begins alike, at the start of a line too; all Unicode can be written.

    White space only separates words, so a word has the same tokens in a list of options and in an answer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)]
    )
    rules.decoder = decoders.ByteLevel()
    words, made_up = corpus()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rules.train_from_iterator(words * 40 + made_up, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=rules,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<image>"],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def config(width: int = 192, layers: int = 4, inner: int = 384) -> Any:
    """A LlavaConfig; the two last layers of the tower side by side, class token first."""
    from transformers import LlavaConfig

    vision = mini_config()["model_cfg"]["vision_cfg"]
    return LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "projection_dim": mini_config()["model_cfg"]["embed_dim"],
            "hidden_act": "gelu",
        },
        text_config={
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 32,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": True,
            "pad_token_id": PAD,
            "bos_token_id": START,
            "eos_token_id": END,
        },
        image_token_index=IMAGE,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2 + 1,
        vision_feature_layer=[-2, -1],
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )


def tower_state() -> dict[str, Tensor]:
    """mini's picture tower under CLIPVisionModel's names."""
    source = mini_state_dict()
    out = {
        "embeddings.class_embedding": source["visual.class_embedding"],
        "embeddings.patch_embedding.weight": source["visual.conv1.weight"],
        "embeddings.position_embedding.weight": source["visual.positional_embedding"],
    }
    for ours, theirs in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        out |= {f"{theirs}.{part}": source[f"visual.{ours}.{part}"] for part in ("weight", "bias")}
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    names["attn.out_proj"] = "self_attn.out_proj"
    for layer in range(mini_config()["model_cfg"]["vision_cfg"]["layers"]):
        old, new = f"visual.transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        for part in ("weight", "bias"):
            out |= {f"{new}.{theirs}.{part}": source[f"{old}.{ours}.{part}"] for ours, theirs in names.items()}
            thirds = source[f"{old}.attn.in_proj_{part}"].chunk(3)
            keys = (f"{new}.self_attn.{letter}_proj.{part}" for letter in "qkv")
            out |= dict(zip(keys, (third.clone() for third in thirds), strict=True))
    return out


def new_model(seed: int, **sizes: int) -> Any:
    """LlavaForConditionalGeneration with mini's frozen tower; projector and Llama are random."""
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config(**sizes))
    tower = model.model.vision_tower
    prefix = next(iter(tower.state_dict())).split("embeddings.")[0]  # older releases have one level more
    tower.load_state_dict({prefix + key: value for key, value in tower_state().items()})
    return model


def write_folder(folder: Path, model: Any, tokenizer: Any) -> None:
    """A LLaVA repository: weights in fp16, config, image processor, tokenizer and template."""
    from transformers import CLIPImageProcessor

    copy.deepcopy(model).half().save_pretrained(folder)
    side = model.config.vision_config.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    CLIPImageProcessor(**sizes, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with atomic_path(folder / "chat_template.jinja") as path:
        path.write_text(TEMPLATE)
