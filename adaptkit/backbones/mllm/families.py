"""The families of image-text-to-text models that we know, one row each: what differs between them and nothing else.

Source: mllm sheet `backbones.md`; transformers 5.24, models/*/{modeling,processing}_*.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

LANGUAGE_LINEARS = r"(q_proj|k_proj|v_proj|o_proj|out_proj|gate_proj|up_proj|down_proj|fc1|fc2)"
TARGETS = ("language", "vision", "bridge")
Target = Literal["language", "vision", "bridge"]


@dataclass(frozen=True)
class Family:
    """What one family of models does in its own way.

    Args:
        name: Ours.
        model_types: `model_type` of its configs.
        language: Path of the decoder without its head, from the `…ForConditionalGeneration` root.
        vision: Path of the vision encoder.
        bridge: Paths of what maps vision features to the decoder's embeddings; modules or bare parameters.
        marker: What a chat template writes for an image; "" is the placeholder token itself.
        before: Text in front of an image's placeholders.
        after: Text behind them.
        spaced: Whether a space keeps a following word off an image, and neighbouring images share what is between them.
        positions: "1d", or "mrope" (three axes, from the images' grids).
        first_position: Position of the first token.
        token_types: "" for none, "image" (1 at placeholders), "suffix" (1 at tokens of the answer).
        stacked: Whether cached image features go in as one tensor instead of a list.
        composed: Whether we put image features among the embeddings ourselves, for models without an inner body.
        prompted: Whether the image features depend on the instruction.
        vision_linears: Pattern of the vision encoder's linear layers.
        image_options: Settings of the image processor that keep an image in one piece.
        sides: Where the side of the square input comes from: "size" (its processor's), "tile" (of `max_image_size`),
            or "grid" (the largest multiple of patch · merge within the processor's limits and `GRID_SIDE`).
        prompt: Prompt without a chat template, with {image} and {text}; "" where there must be one.
        turn: What ends an answer where several turns follow one another without a chat template.
        scattered: Why an image's vectors aren't one square grid in reading order; "" where they are.
    """

    name: str
    model_types: tuple[str, ...]
    language: str = "model.language_model"
    vision: str = "model.vision_tower"
    bridge: tuple[str, ...] = ("model.multi_modal_projector",)
    marker: str = ""
    before: str = ""
    after: str = ""
    spaced: bool = False
    positions: Literal["1d", "mrope"] = "1d"
    first_position: int = 0
    token_types: Literal["", "image", "suffix"] = ""
    stacked: bool = False
    composed: bool = False
    prompted: bool = False
    vision_linears: str = r"model\.vision_tower\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
    image_options: tuple[tuple[str, Any], ...] = ()
    sides: Literal["size", "tile", "grid"] = "size"
    prompt: str = ""
    turn: str = "\n"
    scattered: str = ""

    def lora_targets(self, target: Target) -> str:
        """A pattern that the full names of a part's linear layers match as a whole (peft's `target_modules`).

        The bridge is small and not always made of linear layers: it is better trained whole, see `bridge`.
        """
        if target == "language":
            return rf".*(language_model|text_model)\..*\.{LANGUAGE_LINEARS}"
        if target == "vision":
            return self.vision_linears
        return "|".join(path.replace(".", r"\.") + r"(\..*)?" for path in self.bridge)

    def part(self, model: nn.Module, target: Target) -> list[tuple[str, nn.Module | nn.Parameter]]:
        """The modules (or bare parameters) of a part of the model, with their paths."""
        paths = {"language": (self.language,), "vision": (self.vision,), "bridge": self.bridge}[target]
        found: list[tuple[str, nn.Module | nn.Parameter]] = []
        for path in paths:
            item: Any = model
            for name in path.split("."):
                item = getattr(item, name, None)
            if item is not None:
                found.append((path, item))
        return found


_CHAT = "USER: {image}\n{text} ASSISTANT:"
_IDEFICS_VISION = r"model\.vision_model\.encoder\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
_QWEN_VISION = r"model\.visual\.blocks\..*\.(qkv|proj|fc1|fc2|gate_proj|up_proj|down_proj|linear_fc1|linear_fc2)"
_BLIP_BRIDGE = ("qformer", "query_tokens", "language_projection")
_BLIP_VISION = r"vision_model\.encoder\..*\.(qkv|projection|fc1|fc2)"
_QUERIES = "its vectors are learned queries, which have no place in the image"
_TILES = "its vectors are those of tiles, with line ends between them"


def _qwen(name: str, model_type: str, *bridge: str, scattered: str = "") -> Family:
    return Family(
        name,
        (model_type,),
        vision="model.visual",
        bridge=("model.visual.merger", *bridge),
        positions="mrope",
        vision_linears=_QWEN_VISION,
        sides="grid",
        scattered=scattered,
    )


def _idefics(name: str, model_type: str, **own: Any) -> Family:
    return Family(
        name,
        (model_type,),
        language="model.text_model",
        vision="model.vision_model",
        vision_linears=_IDEFICS_VISION,
        image_options=(("do_image_splitting", False),),
        **own,
    )


_MARKED: dict[str, Any] = {
    "bridge": ("model.connector",),
    "before": "<fake_token_around_image><global-img>",
    "after": "<fake_token_around_image>",
    "sides": "tile",
}

FAMILIES = (
    Family("LLaVA", ("llava",), prompt=_CHAT),
    Family("LLaVA-NeXT", ("llava_next",), prompt=_CHAT, scattered=_TILES),
    Family("LLaVA-OneVision", ("llava_onevision",), bridge=("model.multi_modal_projector",), scattered=_TILES),
    _qwen("Qwen2-VL", "qwen2_vl"),
    _qwen("Qwen2.5-VL", "qwen2_5_vl"),
    _qwen(
        "Qwen3-VL",
        "qwen3_vl",
        "model.visual.deepstack_merger_list",
        scattered="its language model takes in vision features in several layers",
    ),
    _idefics("SmolVLM", "smolvlm", **_MARKED),
    _idefics("Idefics3", "idefics3", **_MARKED),
    _idefics(
        "Idefics2",
        "idefics2",
        bridge=("model.connector",),
        before="<fake_token_around_image>",
        after="<fake_token_around_image>",
        spaced=True,
        sides="grid",
        scattered=_QUERIES,
    ),
    Family(
        "InternVL",
        ("internvl",),
        before="<img>",
        after="</img>",
        stacked=True,
        vision_linears=r"model\.vision_tower\..*\.(q_proj|k_proj|v_proj|projection_layer|fc1|fc2)",
        image_options=(("crop_to_patches", False),),
    ),
    Family(
        "Gemma 3",
        ("gemma3",),
        marker="<start_of_image>",
        before="\n\n<start_of_image>",
        after="<end_of_image>\n\n",
        token_types="image",
        stacked=True,
        image_options=(("do_pan_and_scan", False),),
    ),
    Family(
        "PaliGemma",
        ("paligemma",),
        first_position=1,
        token_types="suffix",
        stacked=True,
        prompt="{image}{bos}{text}\n",
    ),
    Family(
        "BLIP-2",
        ("blip-2",),
        language="language_model.model",
        vision="vision_model",
        bridge=_BLIP_BRIDGE,
        composed=True,
        scattered=_QUERIES,
        vision_linears=_BLIP_VISION,
        prompt="{image}{bos}Question: {text} Answer:",
    ),
    Family(
        "InstructBLIP",
        ("instructblip",),
        language="language_model.model",
        vision="vision_model",
        bridge=_BLIP_BRIDGE,
        composed=True,
        scattered=_QUERIES,
        prompted=True,
        vision_linears=_BLIP_VISION,
        prompt="{image}{bos}{text}",
    ),
)
"""All families; the order is that of the lists we print."""

FAMILY_OF_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}
"""The family of a config's `model_type`."""
