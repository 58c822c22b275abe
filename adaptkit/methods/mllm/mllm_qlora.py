"""MLLM QLoRA: low-rank updates beside a language model whose big matrices are kept in 4 bits.

Source: QLoRA arXiv 2305.14314; mllm sheets `lora-sft.md` and `backbones.md` (4-bit).
Differs from the sheet: the scales aren't quantised a second time, and products are in the backbone's own precision
(@bf16 for the paper's); the vision encoder, the bridge and the head stay as they are.
"""

from __future__ import annotations

from adaptkit.backbones.mllm.model import MLLM
from adaptkit.backbones.quantised import quantise
from adaptkit.methods import methods
from adaptkit.methods.lora._towers import is_quantised
from adaptkit.methods.mllm.mllm_lora import MllmLora


@methods.register("mllm-qlora")
class MllmQlora(MllmLora):
    """LoRA on a 4-bit twin: that of a backbone named with @nf4, which saves the memory, or quantised here."""

    name = "mllm-qlora"

    def tune(self, twin: MLLM) -> None:
        if not is_quantised(twin):
            quantise(twin, "nf4")
        super().tune(twin)
