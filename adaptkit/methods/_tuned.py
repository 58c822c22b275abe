"""Private copies of a backbone's weights, for methods that tune the towers themselves.

A method never edits the backbone. Here it gets a twin of it: the same modules over again, which share every frozen
tensor with the original and hold parameters of their own where the method tunes. Only those are the method's.

Source: the design, "A method never edits a backbone's modules".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from adaptkit.backbones.base import Backbone
from adaptkit.errors import UnsupportedError
from adaptkit.methods.folding import image_encoder


class TunedWeights(nn.Module):
    """Trainable copies of some of a backbone's parameters, under the backbone's own names.

    Args:
        backbone: Where the first values come from.
        choose: Whether the parameter of that name is tuned.
        needed_by: Who asks, for the error.

    Raises:
        UnsupportedError: There is no such parameter.
    """

    def __init__(self, backbone: Backbone, choose: Callable[[str], bool], needed_by: str) -> None:
        super().__init__()
        chosen = {name: value for name, value in backbone.named_parameters() if choose(name)}
        if not chosen:
            raise UnsupportedError(
                f"{needed_by} tunes the weights of the encoders, and {backbone.spec.name!r} has none of those it asks"
                " for: choose another backbone, or a method that works on features."
            )
        for name, value in chosen.items():
            set_parameter(self, name, nn.Parameter(value.detach().clone()))
        self._twin: list[tuple[Backbone, Backbone]] = []  # a list, so that torch doesn't count it among our modules

    def values(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each tuned parameter by its name in the backbone."""
        return self.named_parameters()

    def twin(self, backbone: Backbone) -> Backbone:
        """The backbone with the tuned weights in place of its own; kept, and without memory of its own.

        Ask for it anew after a training step: features of texts that it remembers are forgotten then.
        """
        if not self._twin or self._twin[0][0] is not backbone:
            self._twin = [(backbone, share_all_but(backbone, dict(self.values())))]
        twin = self._twin[0][1]
        twin._text_memo.clear()
        return twin

    def image_copy(self, backbone: Backbone) -> nn.Module:
        """The tuned image encoder, from pixels to features, with weights of its own."""
        return copy.deepcopy(image_encoder(self.twin(backbone))).requires_grad_(False).eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TunedWeights:
        self._twin = []  # its buffers would stay on the old device
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def share_all_but(backbone: Backbone, own: dict[str, nn.Parameter]) -> Backbone:
    """A structural copy of a backbone that shares every tensor with it but the parameters in `own`, by name."""
    memo: dict[int, object] = {id(value): own.get(name, value) for name, value in backbone.named_parameters()}
    memo |= {id(value): value for value in backbone.buffers()}
    for key, thing in vars(backbone).items():
        if key.startswith("_") and not isinstance(thing, (dict, nn.Module)) and hasattr(thing, "__dict__"):
            memo[id(thing)] = thing  # a tokenizer is large, and never changes
    memo[id(backbone._text_memo)] = {}
    return copy.deepcopy(backbone, memo)


def set_parameter(module: nn.Module, name: str, value: nn.Parameter) -> None:
    """Register a parameter under a dotted name, which torch keeps as modules within modules."""
    *path, last = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(last, value)
