"""Frozen decoder layers spread over several processes (fully sharded, FSDP2); what is trained stays whole in each.

Source: torch 2.9, torch.distributed.fsdp (fully_shard, ignored_params).
Not tried: GPUs; two CPU processes are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from adaptkit.backbones.mllm.model import MLLM


def spread_layers(twin: MLLM, frozen: MLLM, trained: Sequence[nn.Parameter], device: str) -> None:
    """Spread a twin's decoder layers, and move all else of it to a device.

    A layer's parameters are brought together when it is used and let go again. The frozen model keeps its own, where
    they are: load it on the CPU, so that no device ever holds all of them. It can't be asked itself afterwards.

    Args:
        twin: What is trained.
        frozen: The model it was made from.
        trained: Parameters that stay whole.
        device: Of this process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),))
    kept = {id(parameter) for parameter in trained}
    for layer in twin.layers:
        for module in layer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in kept:  # an object of its own, so that the frozen model's keeps its place
                    setattr(module, name, nn.Parameter(parameter.detach(), requires_grad=False))
        whole = {parameter for parameter in layer.parameters() if id(parameter) in kept}
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    _move_rest(twin, device)
    frozen._buffers = dict(twin._buffers)  # what tells its device


def _move_rest(model: nn.Module, device: str) -> None:
    """Move what isn't spread; parameters keep their identity, so that whoever shares them sees them moved."""
    from torch.distributed.tensor import DTensor

    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter.data, DTensor):
                parameter.data = parameter.data.to(device)
        module._buffers = {name: b if b is None else b.to(device) for name, b in module._buffers.items()}
