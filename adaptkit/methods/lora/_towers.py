"""Towers with trainable parts inside, beside a frozen backbone that stays as it is.

A method gets a structural copy of a tower: modules of its own, whose parameters are the backbone's very own objects, so
that the copy costs no memory and peft can put its layers into it without anything happening to the backbone. What is
trained is registered with the method under the tower's names; the copy itself stays outside of torch's registration.

Source: peft 0.21, mapping.py (inject_adapter_in_model), tuners/tuners_utils.py.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.backbones.tower import ImageTower, TextRows, TextTower
from adaptkit.errors import ConfigError, UnsupportedError
from adaptkit.methods.base import ClassWeightMethod, GradientMethod, render_prompts
from adaptkit.methods.folding import rebuilt_tower
from adaptkit.storage import write_json, write_safetensors
from adaptkit.types import Reads

M = TypeVar("M", bound=nn.Module)
PEFT_FOLDER = "peft"
_ADAPTER = "default"  # what peft calls an adapter that has no name
_SHARED_STATES = ("state", "quant_state")  # where bitsandbytes' layers keep what belongs to their weights


def load_peft() -> Any:
    """The peft library.

    Raises:
        UnsupportedError: It isn't installed.
    """
    # it brings bitsandbytes, which warns of a faster kernel that could be installed
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return import_module("peft")
    except ImportError as error:
        raise UnsupportedError(
            f"Low-rank adapters are peft's, which can't be imported ({error}): pip install 'adaptkit[lora]'."
        ) from error


def shared_copy(module: M) -> M:
    """A copy of a module's structure whose parameters and buffers are those of `module`, not copies of them."""
    kept: list[object] = [*module.parameters(), *module.buffers()]
    for part in module.modules():
        kept += [part.__dict__[name] for name in _SHARED_STATES if part.__dict__.get(name) is not None]
    return copy.deepcopy(module, {id(item): item for item in kept})


def own_biases(tower: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Give every layer that `wanted` accepts a trainable bias of its own, which begins as the shared one."""
    for name, module in tower.named_modules():
        if isinstance(getattr(module, "bias", None), nn.Parameter) and wanted(name):
            module.bias = nn.Parameter(module.bias.detach().clone())


def inject(tower: nn.Module, config: Any, *, word: str, seed: int | None, name: str = _ADAPTER) -> None:
    """Put peft's layers for an adapter `name` into a shared copy, drawn from `seed` (None where nothing is drawn).

    Raises:
        ConfigError: peft refuses the settings, or finds none of the target layers.
    """
    peft = load_peft()
    tower.is_loaded_in_8bit = _holds(tower, "Linear8bitLt")  # type: ignore[assignment]  # as transformers marks models
    tower.is_loaded_in_4bit = _holds(tower, "Linear4bit")  # type: ignore[assignment]
    with torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if seed is not None:
            torch.manual_seed(seed)  # peft draws on the CPU, from torch's own generator
        try:
            peft.inject_adapter_in_model(config, tower, adapter_name=name)
        except (ValueError, TypeError, KeyError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"peft can't change the {word} tower with these settings: {reason:.300}.") from error


def _holds(tower: nn.Module, kind: str) -> bool:
    return any(type(module).__name__ == kind for module in tower.modules())


def is_quantised(tower: nn.Module) -> bool:
    """Whether a tower holds bitsandbytes' layers."""
    return _holds(tower, "Linear8bitLt") or _holds(tower, "Linear4bit")


def state_name(name: str) -> str:
    """A parameter's name as peft writes it to files: without the adapter's own name."""
    return ".".join(part for part in name.split(".") if part not in (_ADAPTER, "base_layer"))


def merged_state(tower: nn.Module) -> dict[str, Tensor]:
    """The weights of a changed tower under a plain tower's names, with what was learned added to them.

    Nothing is changed: layers with something to merge are copied one by one.

    Raises:
        UnsupportedError: The frozen weights are quantised.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if is_quantised(tower):
        raise UnsupportedError(
            "What was learned beside quantised weights can't be merged into them exactly: load the adapter's peft"
            " folder on the full model, or train on the backbone without @int8 or @nf4."
        )
    changed = [name for name, module in tower.named_modules() if isinstance(module, BaseTunerLayer)]
    state = {
        name: value.detach()
        for name, value in tower.state_dict().items()
        if not any(name.startswith(f"{prefix}.") for prefix in changed)
    }
    for name in changed:
        layer: Any = copy.deepcopy(tower.get_submodule(name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.merge()
        for kind, value in layer.get_base_layer().state_dict().items():
            state[f"{name}.{kind}"] = value.detach()
    return state


class _Named(nn.Module):
    """Holds parameters under dotted names, as the module that they come from would."""

    def add(self, name: str, parameter: nn.Parameter) -> None:
        first, dot, rest = name.partition(".")
        if not dot:
            self.register_parameter(first, parameter)
            return
        if first not in self._modules:
            self.add_module(first, _Named())
        cast(_Named, self._modules[first]).add(rest, parameter)


class TowerMethod(ClassWeightMethod, GradientMethod):
    """A method whose trainables sit inside one or both towers."""

    reads: ClassVar[Reads] = "images"
    _rows_memo: tuple[Any, TextRows] | None = None

    # --- what a method fills in ---------------------------------------------------------------------------------------

    def tower_names(self) -> tuple[str, ...]:
        """Which towers are changed: "image", "text"."""
        raise NotImplementedError(f"{type(self).__name__} doesn't define tower_names.")

    def change(self, tower: ImageTower | TextTower, word: str) -> Any:
        """Put the trainables into a shared copy; returns peft's config, or None where peft has no part in it."""
        raise NotImplementedError(f"{type(self).__name__} doesn't define change.")

    # --- what they share ----------------------------------------------------------------------------------------------

    def build(self) -> None:
        words = self.tower_names()
        self.backbone.require_open(self.name, image="image" in words, text="text" in words)
        changed: dict[str, nn.Module] = {}
        self._peft_configs: dict[str, Any] = {}
        frozen = {id(parameter) for parameter in self.backbone.parameters()}
        for word in words:
            tower = shared_copy(getattr(self.backbone, f"{word}_tower"))
            config = self.change(tower, word)
            if config is not None:
                self._peft_configs[word] = config
            self.backbone.requires_grad_(False)  # whatever peft marked: the copy holds the backbone's own parameters
            held = _Named()
            for name, parameter in tower.named_parameters():
                if parameter.requires_grad and id(parameter) not in frozen:
                    held.add(state_name(name), parameter)
            self.add_module(word, held)
            changed[word] = tower
        self._changed = (changed,)  # a tuple, so that torch counts only the trainables among our modules

    @property
    def changed_towers(self) -> dict[str, nn.Module]:
        """The changed copies by "image" and "text"; only towers that the settings name."""
        return self._changed[0]

    def draw_seed(self) -> int:
        """A seed for a library that draws from torch's own generator."""
        return int(torch.randint(2**62, (), generator=self.generator))

    def train(self, mode: bool = True) -> TowerMethod:
        for tower in self._changed[0].values() if hasattr(self, "_changed") else ():
            tower.train(mode)  # only peft's layers have anything (dropout) that the mode changes
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TowerMethod:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for tower in self._changed[0].values():
            for module in tower.modules():  # parameters are shared and have moved; a buffer is a new tensor afterwards
                module._buffers = {key: b if b is None else fn(b) for key, b in module._buffers.items()}
        return self

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Unnormalised adapted features [batch, dim] of preprocessed pixels [batch, 3, size, size]."""
        tower = self.changed_towers.get("image")
        features: Tensor = self.backbone.encode_image(pixels) if tower is None else tower(pixels)
        return features

    def class_weights(self) -> Tensor:
        tower = self.changed_towers.get("text")
        if tower is None:
            return self.zero_shot()
        features: Tensor = F.normalize(tower(self._text_rows()).float(), dim=-1)  # [templates · classes, dim]
        return F.normalize(features.unflatten(0, (len(self.templates), -1)).mean(dim=0), dim=-1)  # [classes, dim]

    def _text_rows(self) -> TextRows:
        """The layout of all prompts, template by template; remembered for one class list."""
        key = self.texts_key
        if self._rows_memo is None or self._rows_memo[0] != key:
            prompts = [prompt for template in self.templates for prompt in render_prompts(self.class_names, template)]
            backbone = cast(DualEncoder, self.backbone)
            with torch.inference_mode(False):  # it serves later calls that need gradients
                self._rows_memo = (key, backbone.text_rows(backbone.tokenize(prompts)))
        return self._rows_memo[1]

    def folded_weights(self) -> Tensor:
        if torch.is_grad_enabled() or self.training:  # dropout makes each draw of them another one
            return self.class_weights()
        with torch.autocast(self.backbone.device.type, enabled=False):  # they are remembered
            return super().folded_weights()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.cosine_logits(self.encode_image(inputs), self.folded_weights())

    def fold_tower(self) -> nn.Module | None:
        """A plain tower with what was learned merged in; weights that didn't change are the backbone's own.

        Raises:
            UnsupportedError: The frozen weights are quantised.
        """
        tower = self.changed_towers.get("image")
        if tower is None:
            return None
        return rebuilt_tower(cast(ImageTower, self.backbone.image_tower), merged_state(tower))

    # --- leaving ------------------------------------------------------------------------------------------------------

    def merged_towers(self) -> dict[str, dict[str, Tensor]]:
        """State of both towers ("image", "text") under our towers' names, what was learned merged in.

        Raises:
            UnsupportedError: The frozen weights are quantised.
            BackboneError: The tower that isn't changed can't be opened.
        """
        self.backbone.require_open("A merged checkpoint", image=True, text=True)
        states = {}
        for word in ("image", "text"):
            tower = self.changed_towers.get(word) or cast(nn.Module, getattr(self.backbone, f"{word}_tower"))
            states[word] = merged_state(tower)
        return states

    def write_extras(self, folder: Path) -> None:
        """Write the adapter in peft's own layout too, for transformers' CLIP of the same weights."""
        if not self._peft_configs:
            return
        state: dict[str, Tensor] = {}
        targets: list[str] = []
        fields: dict[str, Any] = {}
        for word, config in self._peft_configs.items():
            prefix = f"{word}."
            for key, value in self.adapter_state().items():
                if key.startswith(prefix):
                    state[f"base_model.model.{transformers_name(word, key.removeprefix(prefix))}"] = value
            targets += [transformers_name(word, name) for name in targeted(self.changed_towers[word])]
            fields |= config.to_dict()
        write_peft(folder, state, targets, fields | self.peft_extras())

    def peft_extras(self) -> dict[str, Any]:
        """Fields of the written config that name layers otherwise."""
        return {}


def write_peft(folder: Path, state: Mapping[str, Tensor], targets: list[str], fields: dict[str, Any]) -> None:
    """Write an adapter in peft's own layout into a folder of its own within `folder`.

    Args:
        folder: The adapter's folder.
        state: Tensors under peft's names.
        targets: Full names of the layers that are changed.
        fields: Peft's settings.
    """
    fields = fields | {"target_modules": sorted(targets), "inference_mode": True, "task_type": None}
    for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):  # the full names say it all
        if name in fields:
            fields[name] = None
    place = folder / PEFT_FOLDER
    place.mkdir()
    write_safetensors(place / "adapter_model.safetensors", {k: v.cpu().contiguous() for k, v in state.items()})
    write_json(place / "adapter_config.json", _plain(fields))


def targeted(tower: nn.Module) -> list[str]:
    """Names of the layers that peft has wrapped."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [name for name, module in tower.named_modules() if isinstance(module, BaseTunerLayer)]


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Peft's settings as JSON has them: enumerations by value, sets as lists; unset nested configs drop out."""
    result: dict[str, Any] = {}
    for key, value in fields.items():
        value = getattr(value, "value", value)
        if isinstance(value, (set, frozenset, tuple)):
            value = sorted(value)
        if value is None or isinstance(value, (bool, int, float, str, list, dict)):
            result[key] = value
    return result


_LAYERS = {
    "blocks": "encoder.layers",
    "attn": "self_attn",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "ln_pre": "pre_layrnorm",  # transformers' own spelling
    "ln_post": "post_layernorm",
    "ln_final": "final_layer_norm",
    "patch_embedding": "embeddings.patch_embedding",
    "token_embedding": "embeddings.token_embedding",
}


def transformers_name(word: str, name: str) -> str:
    """A layer (or what follows it) in transformers' CLIPModel.

    Example:
        >>> transformers_name("image", "blocks.0.attn.q_proj.lora_A.weight")
        'vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight'
    """
    first, _, rest = name.partition(".")
    if first == "projection":
        return ".".join(filter(None, ("visual_projection" if word == "image" else "text_projection", rest)))
    model = "vision_model" if word == "image" else "text_model"
    return ".".join([model, *(_LAYERS.get(part, part) for part in name.split("."))])
