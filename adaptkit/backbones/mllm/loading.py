"""From a folder or hub id to an `MLLM`. Only safetensors are read and no code from a repository is ever run."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adaptkit.backbones.base import BackboneSpec, Preprocessing
from adaptkit.backbones.building import from_library, square
from adaptkit.backbones.digest import backbone_digest
from adaptkit.backbones.mllm.families import FAMILY_OF_TYPE, Family
from adaptkit.backbones.mllm.model import IMAGE_PROMPT, LOGIT_SCALE, MLLM, TEXT_PROMPT
from adaptkit.backbones.mllm.prompts import Prompter
from adaptkit.backbones.open_clip import fingerprint
from adaptkit.errors import BackboneError

GRID_SIDE = 448
"""Largest side of the square image where the processor leaves it open: 256 placeholders on Qwen2-VL."""

OPAQUE = "it is part of a multimodal language model, whose towers aren't opened"


def load_mllm(name: str, source: str, config: Any, weights: str = "fp32") -> MLLM:
    """Load an image-text-to-text model in transformers' layout.

    Args:
        name: The backbone's full name, for messages and the spec.
        source: Folder or hub id.
        config: Its config.
        weights: "fp32", "bf16", or "own" for the type that the files have.

    Raises:
        BackboneError: It can't be loaded, lacks weights, or has an encoder-decoder language model.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    family, text = FAMILY_OF_TYPE[config.model_type], config.get_text_config()
    if getattr(config, "use_decoder_only_language_model", True) is False:
        raise BackboneError(
            f"The language model of {name!r} ({text.model_type}) is an encoder-decoder, which isn't supported: choose"
            " one with a decoder alone (OPT, Vicuna)."
        )
    processor = from_library(name, lambda: AutoImageProcessor.from_pretrained(source), "image processor")
    tokenizer = from_library(name, lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=False), "tokenizer")
    instruction = None
    if family.prompted:
        make = lambda: AutoTokenizer.from_pretrained(source, subfolder="qformer_tokenizer")  # noqa: E731
        instruction = from_library(name, make, "Q-Former's tokenizer")
    image_token = _placeholder(name, tokenizer, config)
    context = int(getattr(text, "max_position_embeddings", 0) or tokenizer.model_max_length)
    template = chat_template(name, source) or _own_template(tokenizer)
    prompter = Prompter(name, family, tokenizer, template, image_token, context)
    model = _model(name, source, {"fp32": torch.float32, "bf16": torch.bfloat16}.get(weights, "auto"))
    preprocessing, options = _square_input(processor, config, family, name)
    facts = {
        "tokenizer": fingerprint(tokenizer),
        "prompts": [prompter.digest, IMAGE_PROMPT, TEXT_PROMPT],
        "images": json.loads(processor.to_json_string()),
        "options": options,
        "logit_scale": LOGIT_SCALE,
    }
    spec = BackboneSpec(
        name=name,
        family=config.model_type,
        digest=backbone_digest(model.state_dict(), preprocessing, facts),
        embed_dim=int(text.hidden_size),
        preprocessing=preprocessing,
        context_length=context,
        opaque_image=OPAQUE,
        opaque_text=OPAQUE,
    )
    backbone = MLLM(spec, family, model, prompter, processor, options, instruction)
    backbone.freeze()
    return backbone


def _placeholder(name: str, tokenizer: Any, config: Any) -> str:
    """The token that images take the place of, as text."""
    number = getattr(config, "image_token_id", None)
    token = None if number is None else tokenizer.convert_ids_to_tokens(int(number))
    if not token:
        raise BackboneError(
            f"Backbone {name!r} has no placeholder for images (its config says token {number}): its files are older"
            " than what transformers reads today; look for a newer revision of it."
        )
    return str(token)


def _model(name: str, source: str, dtype: torch.dtype | str) -> Any:
    from transformers import AutoModelForImageTextToText

    def load() -> Any:
        return AutoModelForImageTextToText.from_pretrained(
            source, trust_remote_code=False, use_safetensors=True, dtype=dtype, output_loading_info=True
        )

    model, info = from_library(name, load)
    missing = sorted(info["missing_keys"])
    if missing:
        raise BackboneError(
            f"The files of backbone {name!r} lack {len(missing)} weights ({', '.join(missing[:3])}, …), so it would be"
            " partly random: they were made for another architecture, or are incomplete."
        )
    body = getattr(model, "model", None)
    if body is not None and "mm_encoder_outputs" not in inspect.signature(body.forward).parameters:
        raise BackboneError(
            f"Multimodal language models such as {name!r} need a newer transformers, which takes image features that"
            " were computed before (5.23 does): pip install -U transformers."
        )
    return model.eval()


def chat_template(name: str, source: str) -> str:
    """The processor's chat template: `chat_template.jinja`, or the older `chat_template.json`; "" for none."""
    from transformers.utils import cached_file

    for file in ("chat_template.jinja", "chat_template.json"):
        found = from_library(
            name,
            lambda file=file: cached_file(  # type: ignore[misc]  # the default binds the loop's variable
                source,
                file,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            ),
            "chat template",
        )
        if found:
            text = Path(found).read_text(encoding="utf-8")
            return text if file.endswith(".jinja") else _template_of_json(name, text)
    return ""


def _template_of_json(name: str, text: str) -> str:
    try:
        template = json.loads(text)["chat_template"]
    except (ValueError, KeyError, TypeError) as error:
        raise BackboneError(f"The chat_template.json of {name!r} is damaged: it holds no 'chat_template'.") from error
    return str(template)


def _own_template(tokenizer: Any) -> str:
    """The tokenizer's chat template; of several, the default one."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default", "")
    return template or ""


def _square_input(processor: Any, config: Any, family: Family, name: str) -> tuple[Preprocessing, dict[str, Any]]:
    """Our plain transform to a square in [0, 1], and the processor's settings that take the square as it is.

    Every image goes in whole and in one piece: with tiles and free sizes the number of placeholders, and so time and
    accuracy, would depend on the image.
    """
    settings, options = processor.to_dict(), dict(family.image_options)
    bilinear = int(settings.get("resample", 3)) == 2
    size = {key: int(value) for key, value in dict(settings.get("size") or {}).items() if value}
    resize: Any = "squash"
    if family.sides == "tile":
        side = int(dict(settings["max_image_size"])["longest_edge"])
        options["size"] = {"longest_edge": side}
    elif family.sides == "grid":
        side = _grid_side(settings, size, config)
        if "temporal_patch_size" not in settings:
            options["size"] = {"longest_edge": side, "shortest_edge": side}
    elif "shortest_edge" in size:
        side = size["shortest_edge"]
        resize = "shortest" if config.model_type == "llava" and settings.get("do_center_crop") else "squash"
    else:
        side = square([size["height"], size["width"]], name)
    plain = Preprocessing(
        side,
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0),
        interpolation="bilinear" if bilinear else "bicubic",
        resize=resize,
    )
    return plain, options


def _grid_side(settings: Mapping[str, Any], size: Mapping[str, int], config: Any) -> int:
    """The side of a square for encoders that take any: a whole number of (merged) patches."""
    patch = int(settings.get("patch_size") or config.vision_config.patch_size)
    unit = patch * int(settings.get("merge_size") or 1)
    longest = size.get("longest_edge", GRID_SIDE**2 if "temporal_patch_size" in settings else GRID_SIDE)
    most = int(longest**0.5) if "temporal_patch_size" in settings else longest  # Qwen's sizes are areas
    return max(unit, min(GRID_SIDE, most) // unit * unit)
