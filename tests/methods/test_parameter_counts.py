"""How many numbers each method trains on a ViT-B/16, as its sheet says; the towers lie on the meta device."""

from __future__ import annotations

import pytest
import torch

from adaptkit.backbones.base import BackboneSpec, Preprocessing
from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.backbones.tokenizing import ClipTokenizer
from adaptkit.backbones.tower import BlockShape, ImageShape, ImageTower, TextShape, TextTower
from adaptkit.methods.adapters.clip_adapter import CLIPAdapter
from adaptkit.methods.adapters.linear_probe import LinearProbe
from adaptkit.methods.caches.tip_adapter import TipAdapter
from adaptkit.methods.caches.tip_adapter_f import TipAdapterF
from adaptkit.methods.prompts.cocoop import CoCoOp
from adaptkit.methods.prompts.coop import CoOp, CoOpConfig
from adaptkit.methods.prompts.ivlp import IVLP, IVLPConfig
from adaptkit.methods.prompts.kgcoop import KgCoOp
from adaptkit.methods.prompts.maple import MaPLe, MaPLeConfig
from adaptkit.methods.prompts.mmrl import MMRL, MMRLConfig
from adaptkit.methods.prompts.mmrlpp import MMRLpp
from adaptkit.methods.prompts.prograd import ProGrad, ProGradConfig
from adaptkit.methods.prompts.promptsrc import PromptSRC, PromptSRCConfig
from adaptkit.methods.prompts.vpt import VPT, VPTConfig
from adaptkit.types import FitTask, TensorInputs

IMAGENET = tuple(f"class {index}" for index in range(1000))


@pytest.fixture(scope="module")
def vit_b_16():
    with torch.device("meta"):
        image = ImageTower(ImageShape(BlockShape(768, 12, 12, 3072, "quick_gelu"), 224, 16, 512))
        text = TextTower(TextShape(BlockShape(512, 8, 12, 2048, "quick_gelu"), 49408, 77, 512))
    text.token_embedding.weight = torch.nn.Parameter(torch.zeros(49408, 512))  # words to start from are looked up
    spec = BackboneSpec("ViT-B-16", "open_clip", "0" * 64, 512, Preprocessing(224), 77)
    return DualEncoder(spec, image, text, ClipTokenizer(), logit_scale=100.0)


@pytest.mark.parametrize(
    ("kind", "config", "classes", "count"),
    [
        (CoOp, CoOpConfig(), IMAGENET, 8_192),
        (CoOp, CoOpConfig(context_init="a photo of a"), IMAGENET, 2_048),
        (CoOp, CoOpConfig(class_specific=True), IMAGENET[:10], 10 * 8_192),
        (KgCoOp, None, IMAGENET, 2_048),
        (ProGrad, None, IMAGENET, 8_192),
        (ProGrad, ProGradConfig(num_context=4), IMAGENET, 2_048),
        (CoCoOp, None, IMAGENET, 35_360),
        (MaPLe, MaPLeConfig(), IMAGENET[:3], 3_555_072),
        (MaPLe, MaPLeConfig(depth=3), IMAGENET[:3], 1_185_024),
        (VPT, VPTConfig(), IMAGENET[:3], 73_728),
        (VPT, VPTConfig(depth=1), IMAGENET[:3], 6_144),
        (IVLP, IVLPConfig(), IMAGENET[:3], 30_720),
        (IVLP, IVLPConfig(4, 4, 9, 9), IMAGENET[:3], 46_080),
        (IVLP, IVLPConfig(4, 0, 12, 0), IMAGENET[:3], 24_576),
        (PromptSRC, PromptSRCConfig(), IMAGENET[:3], 46_080),
        (PromptSRC, PromptSRCConfig(text_depth=3, image_depth=3), IMAGENET[:3], 15_360),
        (MMRL, None, IMAGENET[:3], 4_992_256),
        (MMRL, MMRLConfig(width=2048), IMAGENET[:3], 18_762_496),
        (MMRLpp, None, IMAGENET[:3], 813_312),
        (CLIPAdapter, None, IMAGENET, 131_072),
        (LinearProbe, None, IMAGENET, 513_000),
        (TipAdapter, None, IMAGENET, 0),
    ],
)
def test_counts(vit_b_16, kind, config, classes, count):
    assert kind(vit_b_16, classes, config=config).num_trained() == count


def test_tip_adapter_f_on_imagenet(vit_b_16):
    labels = torch.arange(1000).repeat_interleave(16)
    method = TipAdapterF(vit_b_16, IMAGENET)
    method.prepare(FitTask(IMAGENET, TensorInputs(torch.ones(1, 16_000, 512), labels)))
    assert method.num_trained() == 8_192_000
