"""`load_backbone(name)`: one name, one frozen model, with everything that belongs to its weights.

    mini                        the embedded model
    mini-mllm                   the embedded multimodal language model
    ViT-B-16/openai             open_clip's ARCHITECTURE/TAG; ARCHITECTURE/random gives seeded random weights
    hf-hub:ORG/REPO             open_clip's layout on the Hugging Face hub
    local-dir:FOLDER            the same layout in a folder
    transformers:ID_OR_FOLDER   CLIP, SigLIP, Chinese-CLIP, … and vision-only models of transformers; LLaVA, Qwen-VL and
                                other multimodal language models
    timm:NAME_OR_FOLDER         image encoders without text

Any of them with @int8 or @nf4 behind it has the matrices of its open towers in 8 or 4 bits (bitsandbytes); a multimodal
language model (`transformers:`, `mini-mllm`) those of its language model, and with @bf16 it is all in half precision.
Behind that, @layerN, @image-mean and @centred say where in a multimodal language model features are read. A bare name
is never taken for a folder.
"""

from __future__ import annotations

import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from adaptkit.backbones.base import Backbone
from adaptkit.backbones.building import from_library, unknown_name
from adaptkit.backbones.mllm.reading import Reading, split_reading
from adaptkit.backbones.quantised import load_bitsandbytes, quantise, split_kind
from adaptkit.errors import AdaptKitWarning, BackboneError, MissingPathError, UnknownNameError

if TYPE_CHECKING:
    from adaptkit.backbones.dual_encoder import DualEncoder
    from adaptkit.backbones.mllm.model import MLLM
    from adaptkit.backbones.transformers_clip import Weights

EMBEDDED = ("mini", "mini-mllm")
SCHEMES = ("hf-hub", "local-dir", "transformers", "timm")
RANDOM_TAG = "random"
_LIST_HINT = "Run 'adaptkit list backbones' to see them."


@dataclass(frozen=True)
class BackboneName:
    """A backbone's name, taken apart.

    Args:
        scheme: "mini", "mini-mllm", "open_clip", "hf-hub", "local-dir", "transformers" or "timm".
        identifier: What follows the scheme; for open_clip the architecture.
        tag: open_clip's weights, or "random".
    """

    scheme: str
    identifier: str
    tag: str = ""

    def __str__(self) -> str:
        if self.scheme in SCHEMES:
            return f"{self.scheme}:{self.identifier}"
        return f"{self.identifier}/{self.tag}" if self.tag else self.identifier


def parse_backbone_name(name: str) -> BackboneName:
    """Take a backbone's name apart; nothing is looked up or loaded.

    A name is never guessed to be a path: one that looks like a path is refused with the form to write.

    Args:
        name: As in this module's summary.

    Raises:
        BackboneError: The name is empty, has an unknown scheme, or looks like a path or a hub id without one.

    Example:
        >>> parse_backbone_name("ViT-B-16/openai")
        BackboneName(scheme='open_clip', identifier='ViT-B-16', tag='openai')
    """
    if not isinstance(name, str) or not name.strip():
        raise BackboneError("A backbone needs a name, such as 'mini' or 'ViT-B-16/openai'. " + _LIST_HINT)
    if name in EMBEDDED:
        return BackboneName(name, name)
    scheme, colon, rest = name.partition(":")
    if colon and scheme in SCHEMES:
        if not rest.strip():
            example = "FOLDER" if scheme == "local-dir" else "NAME"
            raise BackboneError(f"Nothing follows {name!r}: write {scheme}:{example}.")
        return BackboneName(scheme, rest)
    if os.path.isabs(name) or name in (".", "..") or name.startswith(("./", "../", ".\\", "..\\", "~")):
        raise _looks_like_a_path(name)
    if colon:
        raise UnknownNameError.for_name("backbone scheme", scheme, SCHEMES, f"A name is SCHEME:NAME. {_LIST_HINT}")
    architecture, _, tag = name.partition("/")
    if "/" in tag or not architecture or name.endswith("/"):
        if os.path.isdir(name):
            raise _looks_like_a_path(name)
        raise BackboneError(
            f"{name!r} isn't ARCHITECTURE/TAG. Write 'hf-hub:{name}' for open_clip's layout on the Hugging Face hub, or"
            f" 'transformers:{name}' for that of transformers."
        )
    return BackboneName("open_clip", architecture, tag)


def _looks_like_a_path(name: str) -> BackboneError:
    return BackboneError(
        f"{name!r} looks like a path. Write 'local-dir:{name}' for a folder in open_clip's layout,"
        f" 'transformers:{name}' for one of transformers, or 'timm:{name}' for one of timm."
    )


def load_backbone(name: str, *, device: str | torch.device = "cpu") -> Backbone:
    """Load a frozen backbone with its tokenizer and preprocessing.

    Args:
        name: "mini", "mini-mllm", "ViT-B-16/openai" (open_clip's ARCHITECTURE/TAG; the tag "random" gives seeded random
            weights), "hf-hub:ORG/REPO", "local-dir:FOLDER", "transformers:ID_OR_FOLDER" or "timm:NAME_OR_FOLDER"; with
            @int8 or @nf4 behind it quantised, with @bf16 in half precision (multimodal language models), with @layerN,
            @image-mean or @centred read elsewhere (those too; see `adaptkit.backbones.mllm.reading`).
        device: Where it shall live.

    Returns:
        The backbone, in evaluation mode, in fp32 unless the name says otherwise. `spec.opaque_image` and
        `spec.opaque_text` say which tower couldn't be opened for methods that reach inside, and why.

    Raises:
        UnknownNameError: No such architecture, tag or scheme.
        MissingPathError: The folder isn't there.
        BackboneError: It can't be loaded (no network, damaged files), or needs what isn't supported.

    Example:
        >>> load_backbone("mini").spec.name
        'mini'
    """
    unread, reading = split_reading(name)
    name, quantisation = split_kind(unread)
    plain, half = _split_half(name)
    parsed = parse_backbone_name(plain)
    loaders: dict[str, Callable[[BackboneName], Backbone]] = {
        "mini": _load_mini,
        "mini-mllm": partial(_load_transformers, half=half, quantised=bool(quantisation)),
        "open_clip": _load_open_clip,
        "hf-hub": _load_open_clip_repository,
        "local-dir": _load_open_clip_repository,
        "transformers": partial(_load_transformers, half=half, quantised=bool(quantisation)),
        "timm": _load_timm,
    }
    place = _device(device)  # first: loading can take minutes
    if quantisation:
        load_bitsandbytes()  # before what takes minutes
    backbone = loaders[parsed.scheme](parsed)
    if half and not backbone.is_mllm:
        raise BackboneError(
            f"@bf16 is for multimodal language models, and {plain!r} isn't one: leave it off; CLIP-like encoders run in"
            " half precision with --precision bf16."
        )
    if reading != Reading() and not backbone.is_mllm:
        raise BackboneError(
            f"{reading.suffix} says where in a multimodal language model features are read, and {plain!r} isn't one:"
            " leave it off."
        )
    backbone = quantise(backbone, quantisation, place) if quantisation else backbone.to(place)
    return backbone if reading == Reading() else cast("MLLM", backbone).read_as(reading)


def _split_half(name: str) -> tuple[str, bool]:
    """A name without "@bf16", and whether it had that."""
    whole = isinstance(name, str) and name.endswith("@bf16") and name != "@bf16"
    return (name.removesuffix("@bf16"), True) if whole else (name, False)


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BackboneError(
            f"Unknown device {device!r}: it must be one of torch's, such as 'cpu' or 'cuda'."
        ) from error
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # which one depends on how torch was built
        reason = (str(error).splitlines() or ["unknown"])[0]
        raise BackboneError(
            f"Device {place} can't be used here ({reason:.200}): choose another, such as cpu."
        ) from error
    return place


def _load_mini(name: BackboneName) -> DualEncoder:
    from adaptkit.backbones.mini import mini_config, mini_state_dict
    from adaptkit.backbones.open_clip import dual_encoder_from_open_clip_state

    config = mini_config()
    return dual_encoder_from_open_clip_state(
        mini_state_dict(), config["model_cfg"], config.get("preprocess_cfg", {}), name="mini", family="mini"
    )


# --- open_clip --------------------------------------------------------------------------------------------------------


def _load_open_clip(name: BackboneName) -> DualEncoder:
    """ARCHITECTURE/TAG."""
    import open_clip

    known = open_clip.list_models()
    if name.identifier not in known:
        if os.path.isdir(str(name)):
            raise _looks_like_a_path(str(name))
        hub = f"For a model on the Hugging Face hub write 'hf-hub:{name}' or 'transformers:{name}'." if name.tag else ""
        raise unknown_name("backbone", name.identifier, [*known, *EMBEDDED], hub or _LIST_HINT)
    if not name.tag:
        warnings.warn(
            f"{name.identifier!r} names no weights, so they are random: for tests and benchmarks only. Write"
            f" '{name.identifier}/TAG' for pretrained ones, or '{name.identifier}/{RANDOM_TAG}' to mean it.",
            AdaptKitWarning,
            stacklevel=3,
        )
    if name.tag in ("", RANDOM_TAG):
        return _random_open_clip(name.identifier)
    tags = open_clip.list_pretrained_tags_by_model(name.identifier)
    if name.tag not in tags:
        hint = f"Tags of {name.identifier}: {', '.join([*tags, RANDOM_TAG])}."
        raise unknown_name(f"weights of {name.identifier}", name.tag, tags, hint)
    quick = _activation_of_tag(name)
    make = lambda: open_clip.create_model(name.identifier, name.tag, force_quick_gelu=quick)  # noqa: E731
    return _convert_open_clip(str(name), name.identifier, make)


def _activation_of_tag(name: BackboneName) -> bool:
    """Whether the weights of a tag want QuickGELU: that is a fact about them, not about the architecture's name.

    Source: open_clip issue 771 (OpenAI's weights quietly loaded with another activation).
    """
    import open_clip

    by_weights = bool(open_clip.get_pretrained_cfg(name.identifier, name.tag).get("quick_gelu", False))
    by_architecture = bool((open_clip.get_model_config(name.identifier) or {}).get("quick_gelu", False))
    if by_architecture and not name.identifier.endswith("-quickgelu"):
        return True  # an architecture without a GELU twin, made for its one set of weights (roberta-ViT-B-32)
    if by_architecture and not by_weights:
        raise BackboneError(
            f"The weights {name.tag!r} were trained with GELU, and {name.identifier!r} uses QuickGELU: write"
            f" '{name.identifier.removesuffix('-quickgelu')}/{name.tag}'."
        )
    return by_weights


def _random_open_clip(architecture: str) -> DualEncoder:
    import open_clip

    name = f"{architecture}/{RANDOM_TAG}"

    def make() -> Any:
        with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone
            torch.manual_seed(zlib.crc32(name.encode()))
            return open_clip.create_model(architecture, pretrained_text=False)

    return _convert_open_clip(name, architecture, make)


def _load_open_clip_repository(name: BackboneName) -> DualEncoder:
    """`hf-hub:` and `local-dir:`, both in open_clip's own layout."""
    import open_clip

    full = str(name)
    if name.scheme == "local-dir":
        folder = Path(name.identifier).expanduser()
        _check_open_clip_folder(folder)
        full = f"local-dir:{folder}"
    backbone = _convert_open_clip(full, full, lambda: open_clip.create_model(full, require_pretrained=True))
    return backbone


def _check_open_clip_folder(folder: Path) -> None:
    if not os.path.isdir(folder):  # unlike Path.is_dir, takes names that are too long
        raise MissingPathError(
            f"There is no folder {str(folder)!r}. 'local-dir:' takes a folder in open_clip's layout."
        )
    if not (folder / "open_clip_config.json").is_file():
        scheme = "transformers" if (folder / "config.json").is_file() else ""
        advice = f" It has a config.json: try '{scheme}:{folder}'." if scheme else ""
        raise BackboneError(
            f"The folder {str(folder)!r} has no open_clip_config.json, so it isn't in open_clip's layout.{advice}"
        )


def _convert_open_clip(name: str, tokenizer_name: str, make: Callable[[], Any]) -> DualEncoder:
    import open_clip

    from adaptkit.backbones.open_clip import from_open_clip

    model = from_library(name, make)
    tokenizer = from_library(name, lambda: open_clip.get_tokenizer(tokenizer_name), "tokenizer")
    return from_open_clip(model, tokenizer, name=name)


# --- the other libraries ----------------------------------------------------------------------------------------------


def _load_transformers(name: BackboneName, half: bool, quantised: bool) -> Backbone:
    from adaptkit.backbones.transformers_clip import load_transformers

    identifier = name.identifier
    if name.scheme == "mini-mllm":
        from adaptkit.backbones.mini_mllm import model_folder

        identifier = str(model_folder())
    weights: Weights = "bf16" if half else "own" if quantised else "fp32"
    unseen = name.scheme == "mini-mllm" or not sys.stderr.isatty()  # it is loaded in a blink, or nobody looks
    with _without_bars() if unseen else nullcontext():
        return load_transformers(f"{name}@bf16" if half else str(name), identifier, weights)


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers' own progress bars are left out."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load_timm(name: BackboneName) -> DualEncoder:
    from adaptkit.backbones.vision_only import load_timm

    return load_timm(str(name), name.identifier)
