"""CLAP: ZS-LP whose class weights are held near the text features, the more so the better zero-shot knows the class.

Source: arXiv 2312.12730, Sec. 4; clap sheet; reference code jusiro/CLAP, trainers/adapters.py.
Differs from the reference: the constraint's name is checked (substrings of any text there); what is trained and kept is
the difference from the text features (the same numbers); no setting is chosen on test images.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.errors import ConfigError
from adaptkit.methods import methods
from adaptkit.methods.adapters._residual import PrototypeMethod
from adaptkit.methods.adapters._texts import trained_views
from adaptkit.methods.base import MethodConfig, read_all
from adaptkit.types import FitTask, Inputs

DISTANCES = ("l2", "cosine")
SWITCHES = ("balanced", "constant", "corrected", "adaptative")  # the last one is the reference's spelling
_ROWS = 4096


@dataclass(frozen=True)
class CLAPConfig(MethodConfig):
    """Settings of CLAP."""

    constraint: str = field(
        default="l2",
        metadata={
            "help": "l2 or cosine distance to the text features, and switches behind a hyphen: balanced (all classes"
            " weigh 1), constant (all weigh the mean), corrected (weights sum to the number of classes), adaptative"
            " (weights updated after every epoch). The reference's names: l2-constant."
        },
    )

    def __post_init__(self) -> None:
        distance, *switches = self.constraint.split("-")
        if distance not in DISTANCES or not set(switches) <= set(SWITCHES):
            raise ConfigError(
                f"constraint is {self.constraint!r}, but must be {' or '.join(DISTANCES)}, with any of"
                f" {', '.join(SWITCHES)} behind hyphens (l2-constant)."
            )

    @property
    def distance(self) -> str:
        return self.constraint.split("-")[0]

    @property
    def switches(self) -> frozenset[str]:
        return frozenset(self.constraint.split("-")[1:])


@methods.register("clap")
class CLAP(PrototypeMethod):
    """Class weights from the text features, held there by a penalty that follows zero-shot's own accuracy per class.

    Attributes:
        multipliers: How hard each class is held, [classes]; made by `prepare`, not saved.
        penalties: What "adaptative" adds to them for each unit of distance, [classes]; not saved.
    """

    name = "clap"
    config_class = CLAPConfig
    config: CLAPConfig
    multipliers: Tensor
    penalties: Tensor

    def build(self) -> None:
        super().build()
        classes = len(self.fitted_names)
        self.register_buffer("multipliers", torch.zeros(classes), persistent=False)
        self.register_buffer("penalties", torch.zeros(classes), persistent=False)

    def prepare(self, task: FitTask) -> None:
        super().prepare(task)
        self.set_multipliers(task.train)

    @torch.no_grad()
    def set_multipliers(self, inputs: Inputs) -> None:
        """Start the multipliers from zero-shot probabilities of all stored views of the shots."""
        classes = len(self.fitted_names)
        if "balanced" in self.config.switches:
            self.multipliers.fill_(1.0)
        else:
            known = self._zero_shot_knows(inputs)
            if "corrected" in self.config.switches:
                known = known * (classes / known.sum())
            if "constant" in self.config.switches:
                known = known.mean().expand(classes)
            self.multipliers.copy_(known)
        self.penalties.zero_()

    def _zero_shot_knows(self, inputs: Inputs) -> Tensor:
        """Mean zero-shot probability of its own class over the views of each class's shots, [classes]."""
        text = F.normalize(self.text_of(self.fitted_names), dim=-1)
        sums, counts = torch.zeros_like(self.multipliers), torch.zeros_like(self.multipliers)
        for view in trained_views(inputs):
            features, labels = read_all(inputs, view).to(text.device), inputs.labels.to(text.device)
            for x, y in zip(features.split(_ROWS), labels.split(_ROWS), strict=True):
                own = self.cosine_logits(x, text).softmax(dim=-1).gather(1, y[:, None])[:, 0]  # [rows]
                sums.index_add_(0, y, own)
                counts.index_add_(0, y, torch.ones_like(own))
        return sums / counts

    def distances(self) -> Tensor:
        """How far each fitted class's prototype is from its text features, [classes]; squared, for l2."""
        if self.config.distance == "l2":
            return self.residual.square().sum(dim=-1)
        text = self.text_of(self.fitted_names)
        return 1 - F.cosine_similarity(text + self.residual, text, dim=-1)

    def losses(self, inputs: Tensor, labels: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        constraint = (self.multipliers * self.distances()).mean()
        return {**super().losses(inputs, labels), "constraint": constraint}

    def after_epoch(self, epoch: int, epochs: int) -> None:
        if "adaptative" in self.config.switches:
            self.outer_step()

    @torch.no_grad()
    def outer_step(self) -> None:
        """One step of the augmented Lagrangian on the multipliers: they grow by penalty · squared distance."""
        squared = self.residual.square().sum(dim=-1)
        self.multipliers.copy_((self.multipliers + self.penalties * squared).clamp(min=0))
        self.penalties.copy_(squared)
