"""EM-Dirichlet: a Dirichlet mixture over zero-shot probabilities, fitted to the batch (soft or hard).

Source: arXiv 2405.18437; em_dirichlet sheet; reference code SegoleneMartin/transductive-CLIP.
Differs from the reference: the concentrations are found by Newton steps towards the maximum that its MM updates
approach, 10 to 100 times faster (`solver="mm"` takes those, stopped by each task's own change, not by that of a batch
of tasks); float64; products of matrices instead of images × classes × classes; support and query aren't overwritten;
the few-class assumption (5 in its code, whatever its settings say) is the setting `effective_classes`. Kept: lambda =
floor(classes / effective classes), 0 for fewer classes than that; small clusters claim a class in the matching.
Classes without shots are served beside those with shots, by their names and the batch; if none has shots, zero-shot.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from adaptkit.methods import methods
from adaptkit.methods.transductive._dirichlet import DirichletMixture, Fitted, Layer, match_clusters
from adaptkit.methods.transductive._transduction import Support, TransductiveConfig, TransductiveMethod, positive

SOFT_ITERATIONS, HARD_ITERATIONS = 20, 10


@dataclass(frozen=True)
class EMDirichletConfig(TransductiveConfig):
    """Settings of EM-Dirichlet; the paper's, but for the batch (75 images of 3 to 10 classes there)."""

    effective_classes: int = field(
        default=5, metadata={"help": "How many classes a batch is assumed to hold; 0: all of them."}
    )
    assignment: Literal["soft", "hard"] = field(
        default="soft", metadata={"help": "Whether images are shared among clusters (soft) or go to one (hard)."}
    )
    iterations: int = field(default=0, metadata={"help": "EM iterations; 0: 20 soft, 10 hard."})
    temperature: float = field(default=30.0, metadata={"help": "Factor of the cosines in the probabilities."})
    matching: Literal["hungarian", "basic", "none"] = field(
        default="hungarian",
        metadata={"help": "Zero-shot: clusters get classes one to one, each its best one, or keep their number."},
    )

    solver: Literal["newton", "mm"] = field(
        default="newton", metadata={"help": "Concentrations by Newton steps, or by the paper's slower MM updates."}
    )

    def limits(self) -> tuple[tuple[str, str, bool], ...]:
        return (
            ("assignment", "soft or hard", self.assignment in ("soft", "hard")),
            ("iterations", "0 or more", self.iterations >= 0),
            ("temperature", "a positive number", positive(self.temperature)),
            ("solver", "newton or mm", self.solver in ("newton", "mm")),
            ("matching", "hungarian, basic or none", self.matching in ("hungarian", "basic", "none")),
        )


@methods.register("em-dirichlet")
class EMDirichlet(TransductiveMethod):
    """Nothing is trained; the shots are kept."""

    name = "em-dirichlet"
    config_class = EMDirichletConfig
    config: EMDirichletConfig

    def balance(self, classes: int) -> float:
        """Weight of the class-proportion term, lambda over the number of images."""
        return float(classes // (self.config.effective_classes or classes))

    def fitted_mixture(self, f: Tensor, text: Tensor, support: Support | None) -> Fitted:
        """The mixture of a batch; arguments as `assign`."""
        classes, hard = len(text), self.config.assignment == "hard"
        labelled = None if support is None else (support.features, support.one_hot(classes))
        config, parts = self.config, self.chunks(f, classes)
        mixture = DirichletMixture(parts, text, config.temperature, labelled, hard, config.solver)
        iterations = self.config.iterations or (HARD_ITERATIONS if hard else SOFT_ITERATIONS)
        return mixture.run([Layer(self.balance(classes))] * iterations)

    def assign(self, f: Tensor, text: Tensor, support: Support | None) -> Tensor:
        fitted = self.fitted_mixture(f, text, support)
        return fitted.log_u if support is not None else match_clusters(fitted, self.config.matching)
