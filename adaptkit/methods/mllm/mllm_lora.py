"""MLLM LoRA: low-rank updates inside a multimodal language model, trained on questions about the shots.

Source: mllm sheets `lora-sft.md` (defaults, targets, saving) and `backbones.md` (layer names); LoRA arXiv 2106.09685,
DoRA arXiv 2402.09353, rsLoRA arXiv 2312.03732; peft 0.21.
Differs from the sheet: learning rates of the vision side and the bridge follow the schedule of the language model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn

from adaptkit.backbones.mllm.families import LANGUAGE_LINEARS, Target
from adaptkit.backbones.mllm.model import MLLM
from adaptkit.errors import AdapterError, ConfigError
from adaptkit.methods import methods
from adaptkit.methods.base import ParameterGroup, at_least, refuse
from adaptkit.methods.lora._towers import is_quantised, targeted, write_peft
from adaptkit.methods.mllm._lowrank import PEFT_PREFIX, add_low_rank
from adaptkit.methods.mllm._tuning import TunedMllm, TunedMllmConfig, own_parameters

_HELD = "adapter."


@dataclass(frozen=True)
class MllmLoraConfig(TunedMllmConfig):
    """Settings of MLLM LoRA."""

    kind: Literal["lora", "dora", "rslora"] = field(
        default="lora",
        metadata={"help": "lora, dora (direction and size apart) or rslora (scaled by the root of the rank)."},
    )
    r: int = field(default=16, metadata={"help": "Rank."})
    alpha: float = field(default=32, metadata={"help": "Scale of the update: alpha / r, or alpha / sqrt(r) of rslora."})
    dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the update."})
    layers: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Last names of the language model's layers, such as [q_proj, v_proj]; none for all linear."},
    )
    language: bool = field(default=True, metadata={"help": "Change the language model."})
    vision: bool = field(default=False, metadata={"help": "Change the vision encoder too."})
    bridge: bool = field(default=False, metadata={"help": "Train what lies between the two, whole."})
    vision_lr: float = field(default=1e-5, metadata={"help": "Learning rate of the vision encoder's updates."})
    bridge_lr: float = field(default=1e-5, metadata={"help": "Learning rate of the bridge."})

    def __post_init__(self) -> None:
        super().__post_init__()
        known, nothing = re.findall(r"\w+", LANGUAGE_LINEARS), not (self.language or self.vision)
        more = [f"layers holds {name!r}; known: {', '.join(known)}" for name in self.layers if name not in known][:1]
        more += ["language and vision are both off, so there is nothing for low-rank updates to change"] * nothing
        refuse(
            self,
            *at_least(self, 1, "r"),
            ("alpha", "above 0", self.alpha > 0),
            ("dropout", "at least 0 and below 1", 0 <= self.dropout < 1),
            ("vision_lr", "above 0", self.vision_lr > 0),
            ("bridge_lr", "above 0", self.bridge_lr > 0),
            more=more,
        )


@methods.register("mllm-lora")
class MllmLora(TunedMllm):
    """Peft's layers in the twin of the model; their names are those of transformers' model."""

    name = "mllm-lora"
    config_class = MllmLoraConfig
    config: MllmLoraConfig

    def tune(self, twin: MLLM) -> None:
        config = self.config
        self.vision_frozen = not (config.vision or config.bridge)
        if config.kind == "dora" and is_quantised(twin):  # peft puts other weights in whenever it reads a norm
            raise ConfigError(
                f"DoRA needs the norms of full weights, and {twin.spec.name!r} is quantised: choose kind=lora."
            )
        self._peft_config = add_low_rank(
            twin,
            self._targets(twin),
            self.generator,
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            use_dora=config.kind == "dora",
            use_rslora=config.kind == "rslora",
        )
        found = targeted(twin.model)
        missing = [name for name in config.layers if not any(layer.endswith(f".{name}") for layer in found)]
        if missing:
            raise ConfigError(f"The language model of {twin.spec.name!r} has no layer named {missing[0]!r}.")
        if config.bridge:
            own_parameters(twin, "bridge")

    def _targets(self, twin: MLLM) -> str:
        """A pattern of full names: that of the family, narrowed to the layers asked for."""
        patterns = []
        if self.config.language:
            layers = "|".join(self.config.layers)
            pattern = twin.family.lora_targets("language")
            patterns.append(pattern.replace(LANGUAGE_LINEARS, f"({layers})") if layers else pattern)
        if self.config.vision:
            patterns.append(twin.family.lora_targets("vision"))
        return "|".join(f"(?:{pattern})" for pattern in patterns)

    # --- training -----------------------------------------------------------------------------------------------------

    def _parts(self) -> Iterator[tuple[Target, str, nn.Parameter]]:
        """Each trainable with the part of the model that it changes and its name in transformers' model."""
        family = self.mllm.family
        for name, parameter in self.named_parameters():
            plain = name.removeprefix(_HELD)
            if any(plain == path or plain.startswith(f"{path}.") for path in family.bridge):
                yield "bridge", plain, parameter
            else:
                yield "vision" if plain.startswith(f"{family.vision}.") else "language", plain, parameter

    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        rates: dict[Target, float | None] = {
            "language": None,
            "vision": self.config.vision_lr,
            "bridge": self.config.bridge_lr,
        }
        groups = []
        for part, rate in rates.items():
            own = tuple(parameter for kind, _, parameter in self._parts() if kind == part)
            if own:
                groups.append(ParameterGroup(own, lr=rate))
        return tuple(groups)

    def finish(self, task: Any) -> dict[str, Any]:
        counts = dict.fromkeys(("language", "vision", "bridge"), 0)
        for part, _, parameter in self._parts():
            counts[part] += parameter.numel()
        return {**super().finish(task), "trained_by_part": counts, "changed_layers": len(targeted(self.mllm.model))}

    # --- leaving and coming -------------------------------------------------------------------------------------------

    def write_extras(self, folder: Path) -> None:
        """Write the adapter in peft's own layout too, for transformers' model of the same weights.

        Peft can hold a bridge only where it is made of modules: BLIP's bare query tokens have no place there, and the
        folder is then left out.
        """
        fields = self._peft_config.to_dict()
        if self.config.bridge:
            parts = self.mllm.family.part(self.mllm.model, "bridge")
            if any(isinstance(item, nn.Parameter) for _, item in parts):
                return
            fields["modules_to_save"] = [path for path, _ in parts]
        state = {f"{PEFT_PREFIX}{name}": parameter.detach() for _, name, parameter in self._parts()}
        write_peft(folder, state, targeted(self.mllm.model), fields)

    @classmethod
    def reference_settings(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """What a peft file of a transformers model shows: rank, DoRA, changed layers. Alpha isn't in it."""
        ranks = {len(value) for key, value in state.items() if key.endswith(".lora_A.weight")}
        if not ranks:
            raise AdapterError("The checkpoint has no 'lora_A' entries: it isn't a LoRA of peft's.")
        if len(ranks) > 1:
            raise AdapterError(f"The checkpoint's layers have ranks {sorted(ranks)}; one rank for all is read.")
        changed = {key.rpartition(".lora_A")[0] for key in state if key.endswith(".lora_A.weight")}
        vision = {name for name in changed if re.search(r"\b(vision_tower|visual|vision_model)\b", name)}
        layers = sorted({name.rpartition(".")[2] for name in changed - vision})
        dora = any(key.endswith("lora_magnitude_vector.weight") or "lora_magnitude" in key for key in state)
        found: dict[str, Any] = {"r": ranks.pop(), "kind": "dora" if dora else "lora", "layers": layers}
        return found | {"language": bool(changed - vision), "vision": bool(vision)}

    def reference_key(self, key: str) -> str | None:
        return f"{PEFT_PREFIX}{key.removeprefix(_HELD)}" if key.startswith(_HELD) else None

    def reference_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A peft file's entries under today's names, whatever release of transformers wrote it; none gets lost.

        Raises:
            AdapterError: An entry has no place in this model, or the whole of them changes nothing.
        """
        own = {self.reference_key(key) for key in self.adapter_state()}
        placed = {self._todays_name(key, own): value for key, value in state.items()}
        lost = sorted(set(placed) - own)
        if lost:
            raise AdapterError(
                f"{len(lost)} of the checkpoint's {len(state)} entries have no place in {self.backbone.spec.name!r},"
                f" among them {lost[0]!r}: it was made for another model, or its layers were renamed."
            )
        if not any(bool(value.any()) for key, value in placed.items() if ".lora_B." in key):
            raise AdapterError("All 'lora_B' entries of the checkpoint are zero: it changes nothing.")
        return placed

    def _todays_name(self, key: str, own: set[str | None]) -> str:
        """An entry's name in this release: towers were called otherwise before transformers 5."""
        name, family = key.removeprefix(PEFT_PREFIX), cast(MLLM, self.backbone).family
        older = re.sub(r"^(language_model\.)?model\.layers\.", f"{family.language}.layers.", name)
        for candidate in (name, older, f"model.{name}"):
            if f"{PEFT_PREFIX}{candidate}" in own:
                return f"{PEFT_PREFIX}{candidate}"
        return key
