"""Golden cases of the methods that read descriptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from adaptkit.methods import methods
from adaptkit.methods.base import total_loss
from tests.golden.tiny_clip import build_tiny_clip


def dclip(config: Mapping[str, Any]) -> dict[str, Any]:
    names = {"prepend": "prepend", "append": "append"}
    return {
        "aggregation": config["aggregation_method"],
        "class_name": names.get(config["category_name_inclusion"], "none"),
        "link": config["apply_descriptor_modification"] and config["category_name_inclusion"] is not None,
        "before": config["before_text"],
        "between": config["between_text"],
        "after": config["after_text"],
        "compat": True,
    }


MODES = {
    "clip": "names",
    "gpt_descriptions": "descriptions",
    "waffle": "waffle",
    "waffle_characters": "characters",
    "waffle_and_gpt": "waffle-and-descriptions",
}


def waffleclip(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "count": config["waffle_count"],
        "before": config["label_before_text"],
        "between": config["descriptor_separator"],
        "after": config["label_after_text"],
        "link": config["apply_descriptor_modification"],
        "compat": True,
    }


def vdt_adapter(config: Mapping[str, Any]) -> dict[str, Any]:
    theirs = {"self_attn": "self-attention", "linear": "linear", "linear_residual": "linear-residual"}
    return {
        "adapter": theirs[config["TRAINER.CLIP_ADAPTER.WORD_ADAPTER_TYPE"]],
        "ratio": config["TRAINER.CLIP_ADAPTER.RATIO"],
        "reduction": config["reduction"],
    }


def raw_features(case: Mapping[str, Any], backbone: Any, draw: Any) -> torch.Tensor:
    size = case["clip"]["image_size"]
    with torch.no_grad():
        return backbone.encode_image(draw(case["seed"], "images", (case["B"], 3, size, size)))


def run_dclip(case: Mapping[str, Any], name: str, compare: Any, draw: Any) -> None:
    backbone = build_tiny_clip(case["clip"], case["seed"])
    kind, names = methods.get(name), tuple(case["descriptors"])
    method = kind(backbone, names, config=kind.config_class(**dclip(case["config"])), descriptions=case["descriptors"])
    features = raw_features(case, backbone, draw)
    compare.unseen.discard("texts")
    assert {one: method.sentences(one) for one in names} == case["expected"]["texts"]
    with torch.no_grad():
        compare.check("description_scores", method(features) / backbone.logit_scale)
        before, after = case["config"]["label_before_text"], case["config"]["label_after_text"]
        labels = F.normalize(backbone.text_features([f"{before}{one.replace('_', ' ')}{after}" for one in names]))
        compare.check("label_scores", F.normalize(features) @ labels.T)
        first = F.normalize(backbone.text_features(method.sentences(names[0])))
        compare.check("first_image_first_class_similarities", F.normalize(features)[0] @ first.T)


def run_waffleclip(case: Mapping[str, Any], name: str, compare: Any, draw: Any) -> None:
    backbone = build_tiny_clip(case["clip"], case["seed"])
    kind, names = methods.get(name), tuple(case["descriptors"])
    features = raw_features(case, backbone, draw)
    for theirs, wanted in case["expected"].items():
        compare.unseen.discard(theirs)
        for aggregation, scores in (("mean", "scores"), ("merged", "merged_scores")):
            settings = {
                **waffleclip(case["config"]),
                "mode": MODES[theirs],
                "repetition": wanted["rep"],
                "aggregation": aggregation,
                "words": tuple(case["word_list"]),
            }
            method = kind(backbone, names, config=kind.config_class(**settings), descriptions=case["descriptors"])
            assert method.sentences() == wanted["texts"]
            with torch.no_grad():
                compare.close(f"{theirs} {scores}", method(features) / backbone.logit_scale, wanted[scores])


def run_vdt_adapter(case: Mapping[str, Any], name: str, compare: Any, draw: Any) -> None:
    backbone = build_tiny_clip(case["clip"], case["seed"])
    sentences = dict(zip(case["classnames"], case["sentences"], strict=True))
    sentences |= dict(zip(case["novel_classnames"], case["novel_sentences"], strict=True))
    kind = methods.get(name)
    config = kind.config_class(**vdt_adapter(case["config"]))
    method = kind(backbone, case["classnames"], config=config, descriptions=sentences)
    state = {}
    for parameter in case["parameters"]:
        value = draw(case["seed"], f"{case['method']}:{parameter['name']}", tuple(parameter["shape"]))
        state[parameter["name"]] = value * parameter["scale"] + parameter.get("offset", 0.0)
    method.load_reference_state(state)
    assert method.num_trained() == sum(value.numel() for value in state.values())
    features, labels = raw_features(case, backbone, draw), torch.tensor(case["labels"])
    features_of_first, _ = method.sentences()
    compare.check("sentence_features_first_class", features_of_first[0])
    terms = method.losses(features, labels)  # in evaluation mode: without dropout
    compare.check("loss", total_loss(terms))
    method.backward(terms, lambda loss: loss)
    compare.gradients("gradients", method)
    with torch.no_grad():
        compare.check("class_features", method.class_features())
        compare.check("logits_base", method(features))
        compare.check("logits_novel", method.set_classes(case["novel_classnames"])(features))
