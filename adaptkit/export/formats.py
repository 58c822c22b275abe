"""A folded adapter as a file that other programs run: ONNX (also in 8 bits) or torch.export."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adaptkit.errors import UnsupportedError
from adaptkit.export.fold import Folded

Answer = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Pixels [batch, 3, size, size] to logits [batch, classes], computed by a file that was written."""

ONNX_FILE, INT8_FILE, TORCH_FILE = "model.onnx", "model.int8.onnx", "model.pt2"
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_ONE_FILE_BYTES = 1.8e9  # protobuf holds 2 GB at most; larger weights lie in a file of their own
_LOUD = ("onnxscript", "onnx_ir", "torch.onnx", "root")


def check_onnx() -> None:
    """Refuse to go on where a package that writing ONNX needs isn't installed.

    Raises:
        UnsupportedError: One is missing.
    """
    missing = [name for name in _ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"Writing ONNX needs {', '.join(missing)}: pip install 'adaptkit[onnx]'.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporters say about their own insides off the screen."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def export_program(folded: Folded, side: int) -> torch.export.ExportedProgram:
    """The program of a folded adapter, on the CPU, with the batch left open.

    Raises:
        UnsupportedError: torch can't follow the image encoder.
    """
    if any(value.device.type != "cpu" for value in (*folded.parameters(), *folded.buffers())):
        folded = copy.deepcopy(folded).cpu()  # moving it would move the backbone
    try:
        with _quiet(), torch.no_grad():
            batch = torch.export.Dim("batch")
            shapes = {"pixels": {0: batch}}
            program = torch.export.export(folded, (torch.zeros(2, 3, side, side),), dynamic_shapes=shapes)
    except Exception as error:  # torch documents no kind of its own for what it can't follow
        reason = " ".join(str(error).split())
        raise UnsupportedError(
            f"torch.export can't follow this image encoder ({type(error).__name__}: {reason:.200}): use the adapter"
            " folder itself, or a backbone whose towers adaptkit opens."
        ) from error
    for node in program.graph.nodes:  # they name folders of this machine
        node.meta.pop("stack_trace", None)
    return program


def write_onnx(program: torch.export.ExportedProgram, folder: Path) -> Answer:
    """Write `model.onnx`, check it, and return what answers with it.

    Args:
        program: From `export_program`.
        folder: Where to.
    """
    import onnx

    path = folder / ONNX_FILE
    with _quiet(), torch.no_grad():
        written: Any = torch.onnx.export(
            program, dynamo=True, input_names=["pixels"], output_names=["logits"], verbose=False
        )
        for node in written.model.graph:
            node.metadata_props.clear()  # stack traces, several times the size of a small model
            node.doc_string = None
        written.save(str(path), external_data=_bytes(program) > _ONE_FILE_BYTES)
    onnx.checker.check_model(str(path), full_check=True)
    return onnx_answer(path)


def _bytes(program: torch.export.ExportedProgram) -> int:
    return sum(value.numel() * value.element_size() for value in program.state_dict.values())


def onnx_answer(path: Path) -> Answer:
    """What answers with an ONNX file, by ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def answer(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(["logits"], {"pixels": pixels})[0]
        return logits

    return answer


def write_int8(folder: Path) -> Answer:
    """Write `model.int8.onnx` beside `model.onnx`: products with weights in 8 bits, activations scaled as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / INT8_FILE
    with _quiet():
        quantize_dynamic(
            folder / ONNX_FILE,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],  # ONNX Runtime's CPU has no signed 8-bit convolution
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
    return onnx_answer(path)


def write_torch(program: torch.export.ExportedProgram, folder: Path) -> Answer:
    """Write `model.pt2`, and return what answers with it, read back."""
    path = folder / TORCH_FILE
    with _quiet():
        torch.export.save(program, path)
        module = torch.export.load(path).module()  # just written here, so it may be trusted

    def answer(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            logits: NDArray[np.float32] = module(torch.from_numpy(pixels)).numpy()
        return logits

    return answer
