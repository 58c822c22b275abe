"""Frozen towers with their big matrices in 8 or 4 bits, by bitsandbytes.

The linear layers of the blocks are quantised: they hold nearly all weights of a tower besides its embeddings, which
stay as they are, as norms and the last projection do; of a multimodal model it is those of the language model. A
quantised backbone computes other features than the full one, so it has a name ("ViT-L-14/openai@nf4") and a digest of
its own.

Source: LLM.int8() arXiv 2208.07339 ("int8", outliers above 6 stay in half precision); QLoRA arXiv 2305.14314 ("nf4",
blocks of 64 weights).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.backbones.base import Backbone
from adaptkit.errors import BackboneError, UnsupportedError

KINDS = ("int8", "nf4")
_OUTLIERS = 6.0
_BLOCK = 64


def split_kind(name: str) -> tuple[str, str]:
    """A backbone's name without its quantisation, and the quantisation ("" for none).

    Example:
        >>> split_kind("ViT-B-16/openai@nf4")
        ('ViT-B-16/openai', 'nf4')
    """
    plain, at, kind = name.rpartition("@") if isinstance(name, str) else ("", "", "")
    return (plain, kind) if at and plain and kind in KINDS else (name, "")


def load_bitsandbytes() -> Any:
    """The bitsandbytes library.

    Raises:
        UnsupportedError: It isn't installed, or doesn't load on this machine.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of every cast, in every layer
    try:
        return import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        raise UnsupportedError(
            f"Quantised towers are bitsandbytes', which can't be imported ({error}): pip install"
            " 'adaptkit[quantised]', or leave @int8 or @nf4 off the backbone's name."
        ) from error


def quantise(backbone: Backbone, kind: str, device: str | torch.device | None = None) -> Backbone:
    """Put the block matrices of a freshly loaded backbone's open towers into 8 or 4 bits, in place; returns it.

    Args:
        backbone: Freshly loaded.
        kind: "int8" or "nf4".
        device: Where it is to stay; layers go there one by one, quantised. None for where it is.

    Raises:
        UnsupportedError: bitsandbytes is missing.
        BackboneError: An unknown kind, no tower that is open, or layers whose sizes bitsandbytes doesn't take.
    """
    if kind not in KINDS:
        raise BackboneError(f"Quantisation {kind!r} is unknown: choose {' or '.join(KINDS)}.")
    library = load_bitsandbytes()
    blocks = backbone.big_blocks()
    if not blocks:
        raise BackboneError(
            f"No tower of {backbone.spec.name!r} can be opened, so there is nothing to quantise: leave @{kind} off."
        )
    place = backbone.device if device is None else torch.device(device)
    for block in blocks:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                if kind == "nf4" and layer.in_features % _BLOCK:
                    raise BackboneError(
                        f"{backbone.spec.name!r} has a layer of {layer.in_features} inputs ({name}), and @nf4 takes"
                        f" multiples of {_BLOCK}: use @int8, or leave it off."
                    )
                parent = block.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], _quantised(library, layer, kind, place))
    backbone.to(place)
    spec = backbone.spec
    digest = hashlib.sha256(f"{spec.digest}@{kind}".encode()).hexdigest()
    backbone.spec = replace(spec, name=f"{spec.name}@{kind}", digest=digest)
    return backbone.freeze()


def _quantised(library: Any, layer: nn.Linear, kind: str, device: torch.device) -> nn.Module:
    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    new: Any
    with torch.random.fork_rng(devices=()):  # making a layer draws weights that are thrown away
        if kind == "int8":
            new = library.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=_OUTLIERS)
        else:
            new = library.nn.Linear4bit(*sizes, layer.weight.dtype, compress_statistics=False, quant_type="nf4")
            new.support_avx512bf16_for_cpu = False  # it repacks weights for inference, and training can't use them then
    new.load_state_dict({key: value.detach().cpu() for key, value in layer.state_dict().items()})
    new = new.to(layer.weight.dtype).to(device)  # moving it is what quantises it
    if kind == "int8":
        new.init_8bit_state()  # else at the first use, which would change a weight that is shared
    done: nn.Module = new
    return done


def weight_bytes(module: nn.Module) -> int:
    """Bytes that a module's weights take, quantisation scales included; shared tensors count once."""
    seen: dict[tuple[int, torch.dtype], int] = {}
    for tensor in _tensors(module):
        seen[(tensor.data_ptr(), tensor.dtype)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        weight = part.__dict__.get("_parameters", {}).get("weight")
        for holder in (weight, part.__dict__.get("state"), getattr(weight, "quant_state", None)):
            for name in ("CB", "SCB", "absmax", "code"):
                value = getattr(holder, name, None)
                if isinstance(value, Tensor):
                    yield value
