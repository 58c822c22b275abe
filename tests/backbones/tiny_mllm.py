"""Tiny random MLLMs of every family, saved in the layout of their hub repositories; everything is made offline."""

from __future__ import annotations

import atexit
import shutil
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

CONTEXT = 512
SIDE = 28
PATCH = 14
WIDTH = 64

SPECIAL = (
    *("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>", "<fake_token_around_image>", "<global-img>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<img>", "</img>", "<IMG_CONTEXT>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
)
VOCABULARY = 320
IDS = {token: 256 + place for place, token in enumerate(SPECIAL)}

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}IMAGE"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = (
    "<s>{% for m in messages %}{{ m.role.upper() }}: {% for c in m.content %}{% if c.type == 'image' %}<image>\n"
    "{% else %}{{ c.text }}{{ ' ' if m.role == 'user' else '</s>' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def tokenizer(**more: Any) -> Any:
    """One token per byte, and the special tokens of all families."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    rules = Tokenizer(models.BPE(vocab=letters, merges=[]))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    rules.add_special_tokens(list(SPECIAL))
    made = PreTrainedTokenizerFast(
        tokenizer_object=rules,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[t for t in SPECIAL if t not in ("<s>", "</s>", "<pad>")],
        model_max_length=CONTEXT,
        **more,
    )
    assert [made.convert_tokens_to_ids(token) for token in SPECIAL] == list(IDS.values())
    return made


def _text(kind: str, **more: Any) -> dict[str, Any]:
    common = {
        "model_type": kind,
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
        "pad_token_id": IDS["<pad>"],
        "bos_token_id": IDS["<s>"],
        "eos_token_id": IDS["</s>"],
    }
    return common | more


def _vision(kind: str, **more: Any) -> dict[str, Any]:
    common = {
        "model_type": kind,
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "initializer_range": 0.2,
    }
    return common | more


def _clip_processor(**more: Any) -> Any:
    from transformers import CLIPImageProcessor

    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return CLIPImageProcessor(**sizes, **more)


def _llava() -> tuple[Any, Any]:
    import transformers as t

    config = t.LlavaConfig(
        vision_config=_vision("clip_vision_model"),
        text_config=_text("llama"),
        image_token_index=IDS["<image>"],
        vision_feature_layer=-1,
        initializer_range=0.2,
    )
    return config, _clip_processor()


def _llava_next() -> tuple[Any, Any]:
    import transformers as t

    grids = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = t.LlavaNextConfig(
        vision_config=_vision("clip_vision_model"),
        text_config=_text("mistral", head_dim=16, sliding_window=None),
        image_token_index=IDS["<image>"],
        image_grid_pinpoints=grids,
        vision_feature_layer=-1,
    )
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return config, t.LlavaNextImageProcessor(image_grid_pinpoints=grids, **sizes)


def _onevision() -> tuple[Any, Any]:
    import transformers as t

    grids = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    config = t.LlavaOnevisionConfig(
        vision_config=_vision("siglip_vision_model", vision_use_head=False),
        text_config=_text("qwen2"),
        image_token_index=IDS["<image>"],
        video_token_index=IDS["<|video_pad|>"],
        image_grid_pinpoints=grids,
        vision_feature_layer=-1,
    )
    size = {"height": SIDE, "width": SIDE}
    return config, t.LlavaOnevisionImageProcessor(image_grid_pinpoints=grids, size=size)


def _qwen(kind: str) -> tuple[Any, Any]:
    import transformers as t

    vision: dict[str, Any] = {"depth": 2, "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2}
        make = t.Qwen2VLConfig
    elif kind == "qwen2_5_vl":
        vision |= {"hidden_size": WIDTH, "out_hidden_size": WIDTH, "intermediate_size": 128, "window_size": 28}
        vision |= {"fullatt_block_indexes": [1]}
        make = t.Qwen2_5_VLConfig
    else:
        vision |= {"hidden_size": WIDTH, "out_hidden_size": WIDTH, "intermediate_size": 128}
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        make = t.Qwen3VLConfig
    head = {"head_dim": 16} if kind == "qwen3_vl" else {}
    text = _text({"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text", "qwen3_vl": "qwen3_vl_text"}[kind])
    text |= {"rope_parameters": rope, **head}
    config = make(
        vision_config=vision | {"initializer_range": 0.2},
        text_config=text,
        image_token_id=IDS["<|image_pad|>"],
        video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"],
        vision_end_token_id=IDS["<|vision_end|>"],
    )
    areas = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    return config, t.Qwen2VLImageProcessor(size=areas, patch_size=PATCH, merge_size=2)


def _idefics3(kind: str) -> tuple[Any, Any]:
    import transformers as t

    config_class = t.SmolVLMConfig if kind == "smolvlm" else t.Idefics3Config
    processor_class = t.SmolVLMImageProcessor if kind == "smolvlm" else t.Idefics3ImageProcessor
    vision = _vision("smolvlm_vision" if kind == "smolvlm" else "idefics3_vision")
    config = config_class(
        vision_config=vision,
        text_config=_text("llama"),
        image_token_id=IDS["<image>"],
        scale_factor=2,
        pad_token_id=IDS["<pad>"],
    )
    return config, processor_class(size={"longest_edge": 4 * SIDE}, max_image_size={"longest_edge": SIDE})


def _idefics2() -> tuple[Any, Any]:
    import transformers as t

    config = t.Idefics2Config(
        vision_config=_vision("idefics2_vision"),
        text_config=_text("mistral", head_dim=16, sliding_window=None),
        perceiver_config={
            **{"hidden_size": WIDTH, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 4},
            **{"resampler_head_dim": 16, "num_key_value_heads": 2},
        },
        image_token_id=IDS["<image>"],
    )
    return config, t.Idefics2ImageProcessor(size={"shortest_edge": SIDE, "longest_edge": SIDE})


def _internvl() -> tuple[Any, Any]:
    import transformers as t

    config = t.InternVLConfig(
        vision_config=_vision("internvl_vision", image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH]),
        text_config=_text("qwen2"),
        image_token_id=IDS["<IMG_CONTEXT>"],
        downsample_ratio=0.5,
        vision_feature_layer=-1,
    )
    return config, t.GotOcr2ImageProcessor(size={"height": SIDE, "width": SIDE}, crop_to_patches=True)


def _gemma3() -> tuple[Any, Any]:
    import transformers as t

    text = _text("gemma3_text", head_dim=16, sliding_window=48, layer_types=["sliding_attention", "full_attention"])
    config = t.Gemma3Config(
        vision_config=_vision("siglip_vision_model", vision_use_head=False),
        text_config=text | {"query_pre_attn_scalar": 16},
        image_token_index=IDS["<image_soft_token>"],
        boi_token_index=IDS["<start_of_image>"],
        eoi_token_index=IDS["<end_of_image>"],
        mm_tokens_per_image=4,
    )
    return config, t.Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})


def _paligemma() -> tuple[Any, Any]:
    import transformers as t

    config = t.PaliGemmaConfig(
        vision_config=_vision("siglip_vision_model", vision_use_head=False, projection_dim=WIDTH),
        text_config=_text("gemma", head_dim=16),
        image_token_index=IDS["<image>"],
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return config, t.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})


def _blip(kind: str) -> tuple[Any, Any]:
    import transformers as t

    config_class = t.Blip2Config if kind == "blip2" else t.InstructBlipConfig
    vision = {key: value for key, value in _vision("").items() if key != "model_type"}
    former = {
        **{"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
        **{"encoder_hidden_size": WIDTH, "vocab_size": VOCABULARY, "cross_attention_frequency": 1},
        **{"initializer_range": 0.2, "pad_token_id": IDS["<pad>"]},
    }
    text = _text("opt", ffn_dim=128, word_embed_proj_dim=WIDTH, init_std=0.2) if kind == "blip2" else _text("llama")
    config = config_class(
        vision_config=vision,
        qformer_config=former,
        text_config=text,
        num_query_tokens=3,
        image_token_index=IDS["<image>"],
        initializer_range=0.2,
    )
    return config, t.BlipImageProcessor(size={"height": SIDE, "width": SIDE})


CHAT_OF = {
    "llava": USER,
    "llava_next": USER,
    "llava_onevision": CHAT.replace("IMAGE", "<image>"),
    "qwen2_vl": CHAT.replace("IMAGE", QWEN_IMAGE),
    "qwen2_5_vl": CHAT.replace("IMAGE", QWEN_IMAGE),
    "qwen3_vl": CHAT.replace("IMAGE", QWEN_IMAGE),
    "smolvlm": CHAT.replace("IMAGE", "<image>"),
    "idefics3": CHAT.replace("IMAGE", "<image>"),
    "idefics2": CHAT.replace("IMAGE", "<image>"),
    "internvl": CHAT.replace("IMAGE", "<IMG_CONTEXT>"),
    "gemma3": "<s>" + CHAT.replace("IMAGE", "<start_of_image>"),
    "paligemma": "",
    "blip2": "",
    "instructblip": "",
}
KINDS = tuple(CHAT_OF)


def parts(kind: str) -> tuple[Any, Any]:
    """Config and image processor of a family."""
    makers = {
        **{"llava": _llava, "llava_next": _llava_next, "llava_onevision": _onevision, "idefics2": _idefics2},
        **{"internvl": _internvl, "gemma3": _gemma3, "paligemma": _paligemma},
    }
    if kind in makers:
        return makers[kind]()
    if kind.startswith("qwen"):
        return _qwen(kind)
    return _blip(kind) if "blip" in kind else _idefics3(kind)


@lru_cache(maxsize=1)
def _folder() -> Path:
    folder = Path(mkdtemp(prefix="tiny-mllm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def save(kind: str, folder: Path | None = None, *, template: str | None = None) -> Path:
    """A folder with a tiny random model; made once per process, unless a folder is given."""
    from transformers import AutoModelForImageTextToText

    target = folder or _folder() / kind
    if (target / "config.json").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    config, processor = parts(kind)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        enliven(model)
    model.save_pretrained(target)
    processor.save_pretrained(target)
    tokenizer().save_pretrained(target)
    if kind == "instructblip":
        tokenizer().save_pretrained(target / "qformer_tokenizer")
    chat = CHAT_OF[kind] if template is None else template
    if chat:
        (target / "chat_template.jinja").write_text(chat)
    return target


def enliven(model: Any) -> None:
    """Draw what starts at zero or nearly so, which would hide the image: projections, query tokens, scales, biases."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            low = parameter.std() < 0.01 if parameter.numel() > 1 else parameter == 0
            if low and "norm" not in name.lower():
                parameter.add_(0.2 * torch.randn_like(parameter))


@lru_cache(maxsize=4)
def load(kind: str = "llava") -> Any:
    """The tiny model as a backbone."""
    from adaptkit.backbones.load import load_backbone

    return load_backbone(f"transformers:{save(kind)}")


def pixels(count: int = 2, side: int = SIDE, seed: int = 0) -> torch.Tensor:
    """Random images as a backbone's pixels, RGB in [0, 1]."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def kind_for(method: str) -> str:
    """The family that tests of every method take for a method."""
    return "blip2" if method == "qformer" else "llava"
