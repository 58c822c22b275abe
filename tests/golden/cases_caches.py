"""Golden cases of the caches that are newer than Tip-Adapter: GDA and APE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from adaptkit.methods import methods
from adaptkit.methods.caches.gda import estimate
from adaptkit.types import FitTask, TensorInputs


def gda(config: Mapping[str, Any]) -> dict[str, Any]:
    grid = config["alpha_grid"]
    return {"min_exponent": round(math.log10(grid[0])), "max_exponent": round(math.log10(grid[-1]))}


def ape(config: Mapping[str, Any]) -> dict[str, Any]:
    (max_beta, max_alpha, max_gamma), (beta_steps, alpha_steps, gamma_steps) = (
        config["search_scale"],
        config["search_step"],
    )
    return {
        "channels": config["training_free_feat_num"],
        "scale_channels": False,
        "similarity_weight": config["w_training_free"][0],
        "variance_weight": config["w_training_free"][1],
        "alpha": config["init_alpha"],
        "beta": config["init_beta"],
        "gamma": config["init_gamma"],
        **{"max_alpha": max_alpha, "max_beta": max_beta, "max_gamma": max_gamma},
        **{"alpha_steps": alpha_steps, "beta_steps": beta_steps, "gamma_steps": gamma_steps},
    }


def _made(case: Mapping[str, Any], name: str, settings: Mapping[str, Any], sets: Mapping[str, Any]) -> Any:
    from tests.golden.test_golden import GivenText

    names = tuple(f"class {index}" for index in range(case["features"]["classes"]))
    kind = methods.get(name)
    return kind(GivenText(sets["text"][0]), names, config=kind.config_class(**settings))


def run_gda(case: Mapping[str, Any], name: str, compare: Any) -> None:
    from tests.golden.test_golden import feature_sets, support_views

    sets = feature_sets(case)
    method = _made(case, name, gda(case["config"]), sets)
    names = method.fitted_names
    train, val = support_views(sets), TensorInputs(sets["val"][0][None], sets["val"][1])
    gaussians = estimate(train, names)
    compare.check("class_means", gaussians.means)
    compare.unseen -= {"precision", "weight"}
    compare.summary("precision", gaussians.precision, compare.expected["precision"])
    facts = method.fit(FitTask(names, train, val))
    if isinstance(compare.expected["weight"], dict):
        compare.summary("weight", method.weight.T, compare.expected["weight"])
    else:
        compare.close("weight", method.weight.T, compare.expected["weight"])
    compare.check("bias", method.bias)
    query = sets["query"][0]
    compare.check("gda_scores", method.scores(query))
    compare.check("best_alpha", facts["alpha"])
    compare.check("logits", method(query))
    method.alpha.fill_(0.1)
    compare.check("val_logits_alpha_0.1", method(sets["val"][0]))


def run_ape(case: Mapping[str, Any], name: str, compare: Any) -> None:
    from tests.golden.test_golden import feature_sets

    sets = feature_sets(case)
    method = _made(case, name, ape(case["config"]), sets)
    query, (support, labels) = sets["query"][0], sets["support"]
    val = TensorInputs(sets["val"][0][None], sets["val"][1])
    task = FitTask(method.fitted_names, TensorInputs(support[None], labels), val)
    method.build_cache(task)
    compare.check("criterion", method.scores(method.keys, method.key_labels))
    refined = method.refined()
    compare.unseen -= {"selected_channels_sorted", "search"}
    assert refined.channels.tolist() == compare.expected["selected_channels_sorted"]
    compare.check("cache_divergence", refined.divergence)
    compare.check("logits", method(query))
    facts = method.fit(task)
    wanted = compare.expected["search"]
    for setting in ("beta", "alpha", "gamma"):
        compare.close(setting, facts[setting], wanted[f"best_{setting}"])
    compare.close("logits after the search", method(query), wanted["logits"])
    torch.testing.assert_close(method.keys, F.normalize(support, dim=-1))
