"""How many numbers each method trains on a ViT-B/16, as its sheet says; the towers lie on the meta device."""

from __future__ import annotations

import copy

import pytest
import torch

from adaptkit.backbones.base import BackboneSpec, Preprocessing
from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.backbones.tokenizing import ClipTokenizer
from adaptkit.backbones.tower import BlockShape, ImageShape, ImageTower, TextShape, TextTower
from adaptkit.methods.adapters.clap import CLAP
from adaptkit.methods.adapters.clip_adapter import CLIPAdapter
from adaptkit.methods.adapters.cola_adapter import ColaAdapter
from adaptkit.methods.adapters.linear_probe import LinearProbe
from adaptkit.methods.adapters.lp_plus_plus import LPPlusPlus
from adaptkit.methods.adapters.taskres import TaskRes
from adaptkit.methods.adapters.zs_lp import ZSLP
from adaptkit.methods.caches.ape import APE
from adaptkit.methods.caches.ape_t import APET, APETConfig
from adaptkit.methods.caches.gda import GDA
from adaptkit.methods.caches.tip_adapter import TipAdapter
from adaptkit.methods.caches.tip_adapter_f import TipAdapterF
from adaptkit.methods.descriptions.adaptclipzs import AdaptCLIPZS, AdaptCLIPZSConfig
from adaptkit.methods.descriptions.dclip import DCLIP
from adaptkit.methods.descriptions.gist import GIST, GISTConfig
from adaptkit.methods.descriptions.proapo import ProAPO
from adaptkit.methods.descriptions.vdt_adapter import VDTAdapter, VDTAdapterConfig
from adaptkit.methods.lora.clip_lora import ClipLora, ClipLoraConfig
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
from adaptkit.methods.transductive.fed_mp import FedMP
from adaptkit.methods.transductive.unem import UNEM
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
        (ColaAdapter, None, IMAGENET[:3], 7_752_704),
        (FedMP, None, IMAGENET[:3], 525_312),
        (UNEM, None, IMAGENET, 21),
        (LinearProbe, None, IMAGENET, 513_000),
        (TaskRes, None, IMAGENET, 512_000),
        (TaskRes, None, IMAGENET[:100], 51_200),
        (CLAP, None, IMAGENET, 512_000),
        (ZSLP, None, IMAGENET, 512_000),
        (LPPlusPlus, None, IMAGENET, 514_000),
        (TipAdapter, None, IMAGENET, 0),
        (GDA, None, IMAGENET, 0),
        (APE, None, IMAGENET, 0),
    ],
)
def test_counts(vit_b_16, kind, config, classes, count):
    assert kind(vit_b_16, classes, config=config).num_trained() == count


def test_tip_adapter_f_on_imagenet(vit_b_16):
    labels = torch.arange(1000).repeat_interleave(16)
    method = TipAdapterF(vit_b_16, IMAGENET)
    method.prepare(FitTask(IMAGENET, TensorInputs(torch.ones(1, 16_000, 512), labels)))
    assert method.num_trained() == 8_192_000


def test_ape_t_on_imagenet(vit_b_16):
    labels = torch.arange(1000).repeat_interleave(16)
    method = APET(vit_b_16, IMAGENET, config=APETConfig(channels=500, scale_channels=False))
    method.zero_shot = lambda: torch.eye(1000, 512)  # the towers hold no numbers
    method.prepare(FitTask(IMAGENET, TensorInputs(torch.ones(1, 16_000, 512), labels)))
    assert method.num_trained() == 516_000


@pytest.mark.parametrize(
    ("kind", "config", "count"),
    [
        (DCLIP, None, 0),
        (ProAPO, None, 0),
        (GIST, None, 3 * 513),
        (VDTAdapter, None, 263_680),
        (VDTAdapter, VDTAdapterConfig(adapter="linear"), 131_072),
        (VDTAdapter, VDTAdapterConfig(adapter="none"), 0),
    ],
)
def test_methods_that_read_descriptions(vit_b_16, kind, config, count):
    sentences = dict.fromkeys(IMAGENET[:3], ("a sentence",))
    assert kind(vit_b_16, IMAGENET[:3], config=config, descriptions=sentences).num_trained() == count


@pytest.mark.parametrize(
    ("config", "count"),
    [(None, 184_320), (ClipLoraConfig(rank=8), 737_280), (ClipLoraConfig(towers="image"), 110_592)],
)
def test_clip_lora(vit_b_16, config, count):
    pytest.importorskip("peft")
    backbone = copy.deepcopy(vit_b_16).to("meta")  # the trainables are made where the layers lie
    assert ClipLora(backbone, IMAGENET, config=config).num_trained() == count


@pytest.mark.parametrize(
    ("kind", "config", "count"),
    [
        (AdaptCLIPZS, None, 67_755_010),
        (AdaptCLIPZS, AdaptCLIPZSConfig(tune="all"), 149_620_738),  # the towers, the scale and tau
        (GIST, GISTConfig(fine_tune=True), 149_620_737 + 3 * 513),
    ],
)
def test_methods_that_tune_the_towers(vit_b_16, monkeypatch, kind, config, count):
    backbone = copy.deepcopy(vit_b_16).to("meta")
    monkeypatch.setattr(backbone, "tokenize", lambda texts: None)  # whether they fit isn't asked for
    sentences = dict.fromkeys(IMAGENET[:3], ("a sentence",))
    method = kind(backbone, IMAGENET[:3], config=config, descriptions=sentences)
    assert method.num_trained() == count
