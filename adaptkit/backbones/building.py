"""What the loaders share: filling towers, reading activations, and putting a backbone together."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adaptkit.backbones.base import BackboneSpec, Preprocessing
from adaptkit.backbones.digest import backbone_digest
from adaptkit.backbones.dual_encoder import ClassToken, DualEncoder
from adaptkit.backbones.tokenizing import TextTokenizer
from adaptkit.backbones.tower import Activation, ImageShape, ImageTower, TextShape, TextTower
from adaptkit.errors import BackboneError, UnknownNameError

T = TypeVar("T")


class Opaque(BackboneError):  # noqa: N818  # a state of the tower, not a failure
    """A tower can't be opened; the message is the reason, to stand behind "can't be opened: "."""


def opened(convert: Callable[[], T]) -> tuple[T | None, str]:
    """What `convert` returns and "", or None and the reason why the tower stays closed."""
    try:
        return convert(), ""
    except Opaque as reason:
        return None, str(reason)


def need(condition: object, reason: str) -> None:
    """Leave a tower closed, for `reason`, where a condition for opening it doesn't hold."""
    if not condition:
        raise Opaque(reason)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is an ordinary layer norm with weight and bias."""
    return isinstance(module, nn.LayerNorm) and module.weight is not None and module.bias is not None


def is_identity(*modules: object) -> bool:
    """Whether every module given does nothing (dropout does nothing: backbones stay in evaluation mode)."""
    return all(module is None or isinstance(module, nn.Identity | nn.Dropout) for module in modules)


def activation_of(module: nn.Module) -> Activation:
    """The activation that a model's own module computes.

    Raises:
        Opaque: It is none that our towers have.
    """
    kind = type(module).__name__
    if kind == "QuickGELU":
        return "quick_gelu"
    if kind == "GELUTanh":
        return "gelu_tanh"
    if kind == "GELU":
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    raise Opaque(f"its MLPs use {kind}, which isn't a kind of GELU")


def pair(ours: str, theirs: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight and (where there is one) bias of a layer, renamed."""
    kinds = ("weight", "bias")
    return {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in kinds if f"{theirs}.{kind}" in state}


def _fill(tower: nn.Module, weights: Mapping[str, Tensor]) -> None:
    copies = {name: tensor.detach().to(torch.float32, copy=True).contiguous() for name, tensor in weights.items()}
    tower.load_state_dict(copies, strict=True, assign=True)


def make_image_tower(shape: ImageShape, weights: Mapping[str, Tensor]) -> ImageTower:
    """A tower with fp32 copies of `weights`, under our names; every one must be there."""
    with torch.device("meta"):  # no memory, no initialisation
        tower = ImageTower(shape)
    _fill(tower, weights)
    return tower


def make_text_tower(shape: TextShape, weights: Mapping[str, Tensor]) -> TextTower:
    """The same for texts."""
    with torch.device("meta"):
        tower = TextTower(shape)
    _fill(tower, weights)
    return tower


def triple(values: Any) -> tuple[float, float, float]:
    """Mean or standard deviation: one number per colour channel, or one for all."""
    numbers = [float(value) for value in ([values] * 3 if isinstance(values, int | float) else values)]
    if len(numbers) != 3:
        raise BackboneError(f"A mean or standard deviation must have one number per colour channel, not {values!r}.")
    return numbers[0], numbers[1], numbers[2]


def square(size: Any, name: str) -> int:
    """The side of an input size given as a number or as height and width.

    Raises:
        BackboneError: Height and width differ.
    """
    sides = [int(side) for side in ([size] if isinstance(size, int | float) else size)]
    if len(set(sides)) != 1:
        raise BackboneError(f"Backbone {name!r} takes images of {sides} pixels; only square inputs are supported.")
    return sides[0]


def assemble(
    *,
    name: str,
    family: str,
    image: nn.Module,
    text: nn.Module | None,
    tokenizer: TextTokenizer | None,
    preprocessing: Preprocessing,
    embed_dim: int,
    context_length: int = 0,
    logit_scale: float = 1.0,
    logit_bias: float = 0.0,
    class_token: ClassToken | None = None,
    opaque_image: str = "",
    opaque_text: str = "",
) -> DualEncoder:
    """Put encoders and facts together and digest them."""
    facts = {
        "image": repr(image.shape) if isinstance(image, ImageTower) else "opaque",
        "text": repr(text.shape) if isinstance(text, TextTower) else "opaque",
        "tokenizer": tokenizer.facts if tokenizer is not None else {},
        "class_token": repr(class_token),
        "logit_scale": logit_scale,
        "logit_bias": logit_bias,
    }
    tensors = {f"image.{key}": value for key, value in image.state_dict().items()}
    if text is not None:
        tensors |= {f"text.{key}": value for key, value in text.state_dict().items()}
    spec = BackboneSpec(
        name=name,
        family=family,
        digest=backbone_digest(tensors, preprocessing, facts),
        embed_dim=embed_dim,
        preprocessing=preprocessing,
        context_length=context_length,
        activation=image.shape.blocks.activation if isinstance(image, ImageTower) else "",
        opaque_image=opaque_image,
        opaque_text=opaque_text,
    )
    scales = {"logit_scale": logit_scale, "logit_bias": logit_bias}
    return DualEncoder(spec, image, text, tokenizer, class_token=class_token, **scales)


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str) -> UnknownNameError:
    """As `UnknownNameError.for_name`, for long lists of names in which upper case matters."""
    by_lower = {item.lower(): item for item in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    guess = f" Did you mean {' or '.join(repr(by_lower[match]) for match in near)}?" if near else ""
    return UnknownNameError(f"Unknown {kind} {name!r}.{guess} {hint}")


def from_library(name: str, make: Callable[[], T], what: str = "model") -> T:
    """Call another library's loader; whatever it raises becomes one sentence.

    Raises:
        BackboneError: Loading failed: no network and not in the cache, a damaged file, an unsafe file, …
    """
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        try:
            return make()
        except Exception as error:  # what these libraries raise isn't a closed set, and all of it is the user's to see
            raise BackboneError(_sentence(name, what, error)) from error


def _sentence(name: str, what: str, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    words = " ".join(f"{type(link).__name__} {link}" for link in chain).lower()
    offline = any(sign in words for sign in _NETWORK_SIGNS)
    if offline:
        return (
            f"The {what} of backbone {name!r} isn't on this machine and couldn't be downloaded (no network?):"
            f" {reason[:200]}. Connect, or copy its folder here and write 'local-dir:FOLDER' or 'transformers:FOLDER';"
            " 'mini' needs nothing."
        )
    return f"The {what} of backbone {name!r} couldn't be loaded: {reason[:400]}."


_NETWORK_SIGNS = (
    "connection",
    "connecterror",
    "offline",
    "resolve",
    "urlopen",
    "max retries",
    "localentrynotfound",
    "timed out",
    "couldn't connect",
    "can't load tokenizer for",
    "proxy",
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back other libraries' log lines: what matters comes in our words."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
