"""Settings that make any method's run short, for tests that only need it to have run."""

from __future__ import annotations

from adaptkit.methods import methods
from adaptkit.methods.base import GradientMethod


def quick_overrides(name: str) -> list[str]:
    """As after --set: one epoch, one view, small searches, whichever the method reads."""
    kind = methods.get(name)
    overrides = [] if kind.default_training is None else ["training.views=1"]
    if issubclass(kind, GradientMethod):
        overrides.append("training.epochs=1")
    searched = [field for field in kind.config_class.__dataclass_fields__ if field.endswith("_steps")]
    return overrides + [f"method.{field}=3" for field in searched]
