"""Golden cases of adapters and heads: TaskRes, CLAP, LP++, cross-modal adaptation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from adaptkit.methods import methods
from adaptkit.methods.adapters.clap import CLAP, CLAPConfig
from adaptkit.types import TensorInputs


def taskres(config: Mapping[str, Any]) -> dict[str, Any]:
    assert config["TRAINER.TaskRes.ENHANCED_BASE"] == "none"
    return {"alpha": config["TRAINER.TaskRes.RESIDUAL_SCALE"]}


def clap(config: Mapping[str, Any]) -> dict[str, Any]:
    assert config["TRAINER.ADAPTER.INIT"] == "ZS"
    return {"constraint": config["TRAINER.ADAPTER.CONSTRAINT"]}


def lp_plus_plus(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"epochs": config["train_epoch"]}


def cross_modal(config: Mapping[str, Any]) -> dict[str, Any]:
    assert (config["classifier_head"], config["classifier_init"]) == ("linear", "zeroshot")
    return {"scale": math.exp(config["logit"]), "iterations": config["iters"], "search": False}


def run_taskres(case: Mapping[str, Any], name: str, compare: Any) -> None:
    from tests.golden.test_golden import run_on_tiny_clip, tiny_clip_method

    compare.check("base_text_features", tiny_clip_method(case, name).base_weights())
    compare.unseen.discard("logits_novel")  # null: the residuals belong to their classes
    _run_without_novel(case, name, compare, run_on_tiny_clip)


def _run_without_novel(case: Mapping[str, Any], name: str, compare: Any, run: Any) -> None:
    """The common run; the reference has no novel classes here, ours serves them by their text features."""
    again = {f"novel_{field}": case[field] for field in ("classnames", "prompts", "tokens")}
    compare.expected = {key: value for key, value in compare.expected.items() if key != "logits_novel"}
    run({**case, **again}, name, compare)


def run_clap(case: Mapping[str, Any], name: str, compare: Any) -> None:
    from tests.golden.test_golden import draw, template_of
    from tests.golden.tiny_clip import build_tiny_clip

    backbone = build_tiny_clip(case["clip"], case["seed"])
    size = case["clip"]["image_size"]
    with torch.no_grad():
        features = backbone.encode_image(draw(case["seed"], "images", (case["B"], 3, size, size)))
    labels = torch.tensor(case["labels"])
    shots = TensorInputs(features[None], labels)

    def made(constraint: str) -> CLAP:
        method = CLAP(backbone, case["classnames"], templates=template_of(case), config=CLAPConfig(constraint))
        method.set_multipliers(shots)
        return method

    method = made(**clap(case["config"]))
    compare.check("base_text_features", method.base_weights())
    compare.check("logits_zero_shot", method(features))
    compare.unseen -= {"multipliers", "outer_steps", "logits_novel"}
    for constraint, wanted in compare.expected["multipliers"].items():
        compare.close(constraint, made(constraint).multipliers, wanted)
    (drawn,) = case["parameters"]
    assert drawn["added_to"] == "base_text_features"
    value = draw(case["seed"], f"{case['method']}:{drawn['name']}", tuple(drawn["shape"])) * drawn["scale"]
    method.load_reference_state({drawn["name"]: method.base_weights() + value})
    compare.check("logits_base", method(features))
    terms = method.losses(features, labels)
    compare.check("loss_ce", terms["ce"])
    compare.check("loss_constraint", terms["constraint"])
    compare.check("loss", sum(terms.values()))
    sum(terms.values()).backward()
    compare.gradients("gradients", method)
    for number, wanted in enumerate(compare.expected["outer_steps"]):
        method.outer_step()
        compare.close(f"multipliers after step {number + 1}", method.multipliers, wanted["multipliers"])
        compare.close(f"penalties after step {number + 1}", method.penalties, wanted["penalty"])


def run_lp_plus_plus(case: Mapping[str, Any], name: str, compare: Any) -> None:
    from tests.golden.test_golden import GivenText, draw, feature_sets

    sets = feature_sets(case)
    names = tuple(f"class {index}" for index in range(case["features"]["classes"]))
    kind = methods.get(name)
    method = kind(GivenText(sets["text"][0]), names, config=kind.config_class(**lp_plus_plus(case["config"])))
    (bias,) = case["parameters"]
    with torch.no_grad():
        drawn = draw(case["seed"], f"{case['method']}:{bias['name']}", tuple(bias["shape"]))
        method.bias.copy_(drawn * bias["scale"])
    support = method.start(*sets["support"])
    compare.check("init_weight", method.weight)
    compare.close("alpha is one number at first", method.alpha, [compare.expected["init_alpha"]] * len(names))
    compare.check("init_alpha", method.alpha[0])
    compare.check("lr_w", support.lr_weight)
    compare.check("lr_alpha", support.lr_alpha)
    now = method.gradients(support)
    compare.unseen -= {"gradients_initial", "weight"}
    for key, wanted in compare.expected["gradients_initial"].items():
        compare.summary(f"gradient of {key}", getattr(now, key.removeprefix("classifier.")), wanted)
    report = method.train_epochs(support)
    compare.check("loss_per_iteration", torch.tensor(report["losses"]))
    compare.check("alpha", method.alpha)
    compare.summary("weight", method.weight, compare.expected["weight"])
    compare.check("bias", method.bias)
    compare.check("query_logits", method(sets["query"][0]))


def run_cross_modal(case: Mapping[str, Any], name: str, compare: Any) -> None:
    from tests.golden.test_golden import GivenText, feature_sets

    sets, config = feature_sets(case), case["config"]
    (images, image_labels), (texts, text_labels) = sets["image_train"], sets["text_train"]
    names = tuple(f"class {index}" for index in range(case["features"]["classes"]))
    per_class = len(texts) // len(names)
    by_class = torch.stack([texts[text_labels == index] for index in range(len(names))])  # [classes, templates, dim]
    backbone = GivenText(by_class.transpose(0, 1).flatten(0, 1))
    kind = methods.get(name)
    templates = tuple(f"{index} {{}}" for index in range(per_class))
    method = kind(backbone, names, templates=templates, config=kind.config_class(**cross_modal(config)))
    compare.unseen -= {"init_weight", "gradients_initial", "weight"}
    compare.summary("init_weight", method.head, compare.expected["init_weight"])
    logits, labels = method.batch_logits(images, texts), torch.cat([image_labels, text_labels])
    compare.check("batch_logits_initial", logits)
    loss = F.cross_entropy(logits, labels)
    compare.check("loss_initial", loss)
    loss.backward()
    compare.gradients("gradients_initial", method)
    optimiser = torch.optim.AdamW(method.parameters(), lr=config["lr"], weight_decay=config["weight_decay"])
    losses = [method.step(optimiser, (images, texts, labels), config["lr"]).detach() for _ in range(config["iters"])]
    compare.check("loss_per_step", torch.stack(losses))
    compare.summary("weight", method.head, compare.expected["weight"])
    compare.check("query_logits", method(sets["query"][0]))
    method.blend_with_zero_shot(0.5)
    compare.check("query_logits_wiseft_0.5", method(sets["query"][0]))
