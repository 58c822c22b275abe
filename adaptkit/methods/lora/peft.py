"""Peft's own adapters (LoRA, DoRA, IA3, layer-norm and bias tuning) inside the towers, with peft's own settings.

Source: peft's documentation and code, 0.21; LoRA arXiv 2106.09685, DoRA arXiv 2402.09353, IA3 arXiv 2205.05638,
layer-norm tuning arXiv 2312.11420, BitFit arXiv 2106.10199.
Differs from plain peft: the frozen tower is never changed (peft's layers go into a structural copy of it), so settings
that write to frozen weights or replace whole modules are refused; prompts' shared words see one draw of dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from adaptkit.backbones.tower import ImageTower, TextTower
from adaptkit.errors import ConfigError
from adaptkit.methods import methods
from adaptkit.methods.base import MethodConfig
from adaptkit.methods.lora._towers import (
    TowerMethod,
    inject,
    is_quantised,
    load_peft,
    own_biases,
    targeted,
    transformers_name,
)
from adaptkit.types import NovelClasses, TrainingSettings

_TOWERS = {"both": ("image", "text"), "image": ("image",), "text": ("text",)}
_WHICH = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_LORA = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "lora_bias",
    "init_lora_weights", *_WHICH,
)  # fmt: skip
KINDS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "lora": ("LoraConfig", _LORA, {"target_modules": ["q_proj", "k_proj", "v_proj"]}),
    "dora": ("LoraConfig", _LORA, {"target_modules": ["q_proj", "k_proj", "v_proj"], "use_dora": True}),
    "ia3": (
        "IA3Config",
        ("target_modules", "exclude_modules", "feedforward_modules", "init_ia3_weights"),
        {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]},
    ),
    "ln-tuning": (
        "LNTuningConfig",
        ("target_modules", "exclude_modules"),
        {"target_modules": ["ln_1", "ln_2", "ln_pre", "ln_post", "ln_final"]},
    ),
    "bitfit": ("", ("target_modules",), {}),
}
"""By kind: peft's config class, its settings that apply to a shared frozen tower, and our defaults."""

_DRAWS = ("lora", "dora")
_SAFE_INITS = (True, False, "gaussian", "orthogonal")  # the others write to the frozen weights


@dataclass(frozen=True)
class PeftConfig(MethodConfig):
    """Settings of the peft method."""

    kind: Literal["lora", "dora", "ia3", "ln-tuning", "bitfit"] = field(
        default="lora", metadata={"help": "lora, dora, ia3, ln-tuning (layer norms) or bitfit (biases)."}
    )
    towers: Literal["both", "image", "text"] = field(default="both", metadata={"help": "Towers that are changed."})
    settings: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Peft's own settings of that kind by name, such as r, lora_alpha or target_modules."},
    )

    def __post_init__(self) -> None:
        _, known, _ = KINDS[self.kind]
        unknown = [name for name in self.settings if name not in known]
        if unknown:
            raise ConfigError(
                f"settings holds {unknown[0]!r}, which {self.kind} doesn't take here; known: {', '.join(known)}."
            )
        settings = {name: _value(value) for name, value in self.settings.items()}
        object.__setattr__(self, "settings", settings)
        rank, dropout = settings.get("r", 8), settings.get("lora_dropout", 0.0)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ConfigError(f"settings.r is {rank!r}; a whole number of at least 1 is accepted.")
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ConfigError(f"settings.lora_dropout is {dropout!r}; at least 0 and below 1 is accepted.")
        if settings.get("init_lora_weights", True) not in _SAFE_INITS:
            raise ConfigError(
                f"settings.init_lora_weights is {settings['init_lora_weights']!r}, which would change the frozen"
                " weights; true, false, gaussian or orthogonal is accepted."
            )


def _value(value: Any) -> Any:
    """A number or truth value that came as text from the command line."""
    if not isinstance(value, str):
        return list(value) if isinstance(value, tuple) else value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


@methods.register("peft")
class Peft(TowerMethod):
    """Peft's layers in the towers; names as peft has them, after "image." or "text."."""

    name = "peft"
    config_class = PeftConfig
    config: PeftConfig
    novel_classes: NovelClasses = "open"
    default_training: ClassVar[TrainingSettings | None] = TrainingSettings(
        optimiser="adamw", lr=1e-3, weight_decay=1e-2, schedule="cosine-step", warmup_epochs=0, views=4
    )

    def tower_names(self) -> tuple[str, ...]:
        return _TOWERS[self.config.towers]

    def change(self, tower: ImageTower | TextTower, word: str) -> Any:
        kind, settings = self.config.kind, self.config.settings
        class_name, _, defaults = KINDS[kind]
        if kind == "bitfit":
            self._own_biases(tower, word)
            return None
        if kind == "dora" and is_quantised(tower):  # peft puts other weights into a layer whenever it reads its norm
            raise ConfigError(
                f"DoRA needs the norms of full weights, and {self.backbone.spec.name!r} is quantised: choose kind=lora,"
                " or the backbone without @int8 or @nf4."
            )
        if settings.get("bias", "none") != "none":  # peft would train the shared ones
            own_biases(tower)
            tower.requires_grad_(False)
        try:
            config = getattr(load_peft(), class_name)(**{**defaults, **settings})
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"peft's {class_name} refuses these settings: {reason:.300}.") from error
        inject(tower, config, word=word, seed=self.draw_seed() if kind in _DRAWS else None)
        if kind in _DRAWS:
            self._check_ranks(tower, word)
        return config

    def _own_biases(self, tower: nn.Module, word: str) -> None:
        wanted = self.config.settings.get("target_modules", "")
        ends = [wanted] if isinstance(wanted, str) else wanted
        own_biases(tower, lambda name: any(f".{name}".endswith(f".{end}") or not end for end in ends))
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            raise ConfigError(f"No layer of the {word} tower with a bias is named {', '.join(map(repr, ends))}.")

    def _check_ranks(self, tower: nn.Module, word: str) -> None:
        for name in targeted(tower):
            layer: Any = tower.get_submodule(name)
            rank, width = layer.r["default"], min(layer.in_features, layer.out_features)
            if rank > width:
                raise ConfigError(
                    f"settings give {name} of {self.backbone.spec.name!r}'s {word} tower the rank {rank}, but it has"
                    f" width {width}: choose r of at most {width}."
                )

    def peft_extras(self) -> dict[str, Any]:
        wanted = self._peft_configs and next(iter(self._peft_configs.values())).to_dict().get("feedforward_modules")
        if not wanted:
            return {}
        names = [
            transformers_name(word, name)
            for word, tower in self.changed_towers.items()
            for name in targeted(tower)
            if getattr(tower.get_submodule(name), "is_feedforward", False)
        ]
        return {"feedforward_modules": names}


def kinds() -> Mapping[str, tuple[str, ...]]:
    """The kinds with the settings that each takes."""
    return {name: known for name, (_, known, _) in KINDS.items()}
