"""Our methods against numbers computed by their published reference implementations.

Reads every case of the folder in ADAPTKIT_GOLDEN_DIR, or those kept here. A case is one JSON file; what its fields
mean, and the formulas for weights, images and trainables, is described where the cases come from: all is drawn by
NumPy's frozen legacy generator, so that nothing but numbers needs to be stored. A case of a known method runs without
new code, whatever its seed, sizes and classes; a new method needs a line in `SETTINGS` (and, if it acts on features
alone, one in `FEATURE_LEVEL`).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.base import Backbone, BackboneSpec, Preprocessing
from adaptkit.errors import UnsupportedError
from adaptkit.methods import methods
from adaptkit.methods.base import GradientMethod, Method, total_loss
from adaptkit.training.loop import GradientLoop
from adaptkit.types import FitTask, TensorInputs, TrainingSettings
from tests.golden import cases_adapters, cases_caches, cases_descriptions, cases_lora, cases_transductive
from tests.golden.tiny_clip import build_tiny_clip

OWN_FOLDER = Path(__file__).parent
FOLDER = Path(os.environ.get("ADAPTKIT_GOLDEN_DIR") or OWN_FOLDER)
CASES = sorted(FOLDER.glob("*.json"))

RELATIVE, ABSOLUTE = 1e-4, 1e-5  # fp32; rounding alone takes up at most a quarter of it


# --- a method's settings under the reference's names ------------------------------------------------------------------


def _coop(config: Mapping[str, Any]) -> dict[str, Any]:
    words = config["TRAINER.COOP.CTX_INIT"]
    return {
        "num_context": config["TRAINER.COOP.N_CTX"],
        "context_init": words,
        "class_specific": config["TRAINER.COOP.CSC"] and not words,  # words start one context for all
        "class_position": config["TRAINER.COOP.CLASS_TOKEN_POSITION"],
    }


def _maple(config: Mapping[str, Any]) -> dict[str, Any]:
    count = config["TRAINER.MAPLE.N_CTX"]
    words = config["TRAINER.MAPLE.CTX_INIT"] if count <= 4 else ""  # the reference drops them silently above four
    return {"num_context": count, "depth": config["TRAINER.MAPLE.PROMPT_DEPTH"], "context_init": words}


def _ivlp(config: Mapping[str, Any], section: str = "TRAINER.IVLP") -> dict[str, Any]:
    count = config[f"{section}.N_CTX_TEXT"]
    return {
        "num_text_context": count,
        "num_image_context": config[f"{section}.N_CTX_VISION"],
        "text_depth": config[f"{section}.PROMPT_DEPTH_TEXT"],
        "image_depth": config[f"{section}.PROMPT_DEPTH_VISION"],
        "context_init": config[f"{section}.CTX_INIT"] if count <= 4 else "",
    }


def _promptsrc(config: Mapping[str, Any]) -> dict[str, Any]:
    section = "TRAINER.PROMPTSRC"
    return _ivlp(config, section) | {
        "text_weight": config[f"{section}.TEXT_LOSS_WEIGHT"],
        "image_weight": config[f"{section}.IMAGE_LOSS_WEIGHT"],
        "averaging_mean": config[f"{section}.GPA_MEAN"],
        "averaging_std": config[f"{section}.GPA_STD"],
    }


def _words(config: Mapping[str, Any], section: str = "TRAINER.COOP", phrase: str = "") -> dict[str, Any]:
    """Words to start from: the setting's, or where that is a mere switch (KgCoOp, ProGrad) the method's `phrase`.

    KgCoOp's and CoCoOp's words say how many context vectors there are; ProGrad's may be fewer.
    """
    words = config[f"{section}.CTX_INIT"] and (phrase or config[f"{section}.CTX_INIT"])
    count = len(words.split()) if words and words != "template" else config[f"{section}.N_CTX"]
    return {"num_context": count, "context_init": words or ""}


def _mmrl(config: Mapping[str, Any], section: str = "TRAINER.MMRL") -> dict[str, Any]:
    return {
        "num_tokens": config[f"{section}.N_REP_TOKENS"],
        "first_layer": config[f"{section}.REP_LAYERS"][0],
        "last_layer": config[f"{section}.REP_LAYERS"][-1],
        "width": config[f"{section}.REP_DIM"],
        "alpha": config[f"{section}.ALPHA"],
        "consistency_weight": config[f"{section}.REG_WEIGHT"],
    }


def _mmrlpp(config: Mapping[str, Any]) -> dict[str, Any]:
    section = "TRAINER.MMRLpp"
    return _mmrl(config, section) | {
        "beta": config[f"{section}.BETA"],
        "projection_rank": config[f"{section}.PROJ_LORA_DIM"],
        "residual_rank": config[f"{section}.RES_LORA_DIM"],
    }


def _tip(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = {"alpha": config["init_alpha"], "beta": config["init_beta"]}
    if "search_scale" in config:
        (max_beta, max_alpha), (beta_steps, alpha_steps) = config["search_scale"], config["search_step"]
        settings |= {"max_beta": max_beta, "max_alpha": max_alpha}
        settings |= {"beta_steps": beta_steps, "alpha_steps": alpha_steps}
    return settings


SETTINGS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "em-dirichlet": lambda config: {},  # see cases_transductive
    "transclip": lambda config: {},  # see cases_transductive
    "unem": lambda config: {},  # see cases_transductive
    "zero-shot": lambda config: {},
    "coop": _coop,
    "maple": _maple,
    "cocoop": lambda config: _words(config, "TRAINER.COCOOP"),
    "vpt": lambda config: {
        "num_context": config["TRAINER.VPT.N_CTX_VISION"],
        "depth": config["TRAINER.VPT.PROMPT_DEPTH_VISION"],
    },
    "ivlp": _ivlp,
    "promptsrc": _promptsrc,
    "kgcoop": lambda config: _words(config, phrase="a photo of a") | {"weight": config["TRAINER.COOP.W"]},
    "prograd": lambda config: {
        **_words(config, phrase="template"),
        "temperature": config["LOSS.T"],
        "projection": config["LOSS.LAMBDA"],
    },
    "mmrl": _mmrl,
    "mmrlpp": _mmrlpp,
    "clip-lora": cases_lora.settings,
    "clip-adapter": lambda config: {"ratio": config["ratio"], "reduction": config["reduction"]},
    "tip-adapter": _tip,
    "tip-adapter-f": _tip,
    "dclip": cases_descriptions.dclip,
    "waffleclip": cases_descriptions.waffleclip,
    "vdt-adapter": cases_descriptions.vdt_adapter,
    "gda": cases_caches.gda,
    "taskres": cases_adapters.taskres,
    "clap": cases_adapters.clap,
    "lp-plus-plus": cases_adapters.lp_plus_plus,
    "cross-modal": cases_adapters.cross_modal,
    "ape": cases_caches.ape,
}


def our_name(method: str) -> str | None:
    """The registered name of a case's method: its own, or what it is a variant of ("coop-csc" of "coop")."""
    fitting = [name for name in methods if method == name or method.startswith(f"{name}-")]
    return max(fitting, key=len, default=None)


# --- comparing --------------------------------------------------------------------------------------------------------


THEIR_LAYERS = {"keys": "adapter.weight"}  # Tip-Adapter-F: a layer in training, a bare tensor in its files


class Comparison:
    """Compares results with a case's `expected`, keeps the largest deviation as a share of what is allowed."""

    def __init__(self, expected: Mapping[str, Any]) -> None:
        self.expected = expected
        self.unseen = set(expected)
        self.worst = 0.0

    def wants(self, name: str) -> bool:
        return name in self.expected

    def check(self, name: str, actual: Tensor | float) -> None:
        if name not in self.expected:
            return
        self.unseen.discard(name)
        self.close(name, actual, self.expected[name])

    def close(self, what: str, actual: Tensor | float, wanted: Any) -> None:
        wanted = np.asarray(wanted, dtype=np.float64)
        got = torch.as_tensor(actual).detach().cpu().double().numpy()
        assert got.shape == wanted.shape, f"{what}: shape {got.shape} instead of {wanted.shape}"
        allowed = ABSOLUTE * max(1.0, float(np.abs(wanted).max())) + RELATIVE * np.abs(wanted)
        share = float((np.abs(got - wanted) / allowed).max())
        self.worst = max(self.worst, share)
        assert share <= 1, f"{what}: off by {share:.3g} times what is allowed"

    def summary(self, what: str, actual: Tensor, wanted: Mapping[str, Any]) -> None:
        """An array given as its norm and its first entries (and, for some, its shape)."""
        self.close(f"{what}, norm", actual.norm(), wanted["norm"])
        self.close(f"{what}, first entries", actual.flatten()[: len(wanted["first8"])], wanted["first8"])
        assert list(actual.shape) == wanted.get("shape", list(actual.shape))

    def gradients(self, name: str, method: Method) -> None:
        if name not in self.expected:
            return
        self.unseen.discard(name)
        ours = {
            THEIR_LAYERS.get(key, method.reference_key(key)): parameter.grad
            for key, parameter in method.named_parameters()
        }
        assert set(ours) == set(self.expected[name])
        for key, wanted in self.expected[name].items():
            assert ours[key] is not None, f"{key} has no gradient"
            self.summary(f"gradient of {key}", ours[key], wanted)


def draw(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    values = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode())).standard_normal(shape)
    return torch.from_numpy(values.astype(np.float32))


# --- methods on the tiny CLIP -----------------------------------------------------------------------------------------


def template_of(case: Mapping[str, Any]) -> tuple[str, ...]:
    """The template that fills in to the prompts; methods with prompts of their own need none."""
    for name, prompt in zip(case["classnames"], case.get("teacher_prompts", case["prompts"]), strict=True):
        if prompt.count(name.replace("_", " ")) == 1:
            return (prompt.replace(name.replace("_", " "), "{}"),)
    return ("{}",)


def tiny_clip_method(case: Mapping[str, Any], name: str) -> Method:
    backbone = build_tiny_clip(case["clip"], case["seed"])
    kind = methods.get(name)
    config = kind.config_class(**SETTINGS[name](case["config"]))
    method = kind(backbone, case["classnames"], templates=template_of(case), config=config)
    state = {}
    for parameter in case["parameters"]:
        value = draw(case["seed"], f"{case['method']}:{parameter['name']}", tuple(parameter["shape"]))
        state[parameter["name"]] = value * parameter["scale"] + parameter.get("offset", 0.0)
    if state:
        method.load_reference_state(state)
    assert method.num_trained() == sum(value.numel() for value in state.values())
    return method


def run_on_tiny_clip(case: Mapping[str, Any], name: str, compare: Comparison) -> None:
    method = tiny_clip_method(case, name)
    backbone = method.backbone
    pixels = draw(case["seed"], "images", (case["B"], 3, case["clip"]["image_size"], case["clip"]["image_size"]))
    labels = torch.tensor(case["labels"])
    for kind in ("", "novel_"):
        tokens = backbone.tokenize(case[f"{kind}prompts"])
        assert tokens.ends.tolist() == case[f"{kind}tokens"]["eot_index"]
        for row, wanted in zip(tokens.ids.tolist(), case[f"{kind}tokens"]["ids"], strict=True):
            assert row[: len(wanted)] == wanted
    with torch.no_grad():
        raw = backbone.encode_image(pixels)
        inputs = pixels if method.reads == "images" else raw
        compare.check("image_features_raw", raw)
        features = method.encode_image(pixels) if hasattr(method, "encode_image") else raw
        compare.check("image_features", F.normalize(features, dim=-1))
        if compare.wants("adapter_output"):
            compare.check("adapter_output", method.adapted(raw))

    method.train()
    logits = method(inputs)
    compare.check("logits_train", logits)
    if isinstance(method, GradientMethod):
        terms = method.losses(inputs, labels)
        compare.check("loss", total_loss(terms))
        for term, value in terms.items():
            compare.check(f"loss_{term}", value)
        if name in EXTRAS:
            EXTRAS[name](case, method, inputs, labels, compare)
        method.zero_grad()
        method.backward(method.losses(inputs, labels), lambda loss: loss)  # afresh: a graph may be used up
        compare.gradients("gradients", method)

    method.eval()
    with torch.no_grad():
        logits = method(inputs)
        compare.check("logits_base", logits)
        compare.check("loss_ce", F.cross_entropy(logits, labels))
        if compare.wants("text_features_base"):
            compare.check("text_features_base", text_features(method, inputs))
        _check_novel(case, method, inputs, compare)


def _check_novel(case: Mapping[str, Any], method: Method, inputs: Tensor, compare: Comparison) -> None:
    if compare.wants("logits_novel") and compare.expected["logits_novel"] is None:
        compare.unseen.discard("logits_novel")
        with pytest.raises(UnsupportedError):
            method.set_classes(case["novel_classnames"])
        return
    method.set_classes(case["novel_classnames"])
    compare.check("logits_novel", method(inputs))
    if compare.wants("text_features_novel"):
        compare.check("text_features_novel", text_features(method, inputs))
    if "logits_class_novel" in case["expected"]:
        check_branches(method, inputs, compare, "novel")


def text_features(method: Any, inputs: Tensor) -> Tensor:
    """Unit text features [classes, dim], or [batch, classes, dim] of a method whose texts depend on the image."""
    if hasattr(method, "image_class_weights"):
        return method.image_class_weights(inputs)
    return method.class_weights()


def check_branches(method: Any, pixels: Tensor, compare: Comparison, kind: str) -> None:
    """MMRL's three sets of logits."""
    branches = method.branch_logits(pixels)
    for theirs, ours in (("class", "class"), ("rep", "representation"), ("fusion", "fused")):
        compare.check(f"logits_{theirs}_{kind}", branches[ours])


# --- what single methods have beyond logits, loss and gradients -------------------------------------------------------


def extra_promptsrc(case: Mapping[str, Any], method: Any, pixels: Tensor, labels: Tensor, compare: Comparison) -> None:
    terms = method.losses(pixels, labels)
    compare.check("loss_scl_text", terms["text_consistency"])
    compare.check("loss_scl_image", terms["image_consistency"])
    compare.check("loss_scl_logits", terms["logit_consistency"])
    compare.check("loss_l1_text_unweighted", terms["text_consistency"] / method.config.text_weight)
    compare.check("loss_l1_image_unweighted", terms["image_consistency"] / method.config.image_weight)
    teacher = method.frozen_features(pixels, None)
    compare.check("image_features_teacher", teacher)
    compare.check("text_features_teacher", method.text_anchors())
    compare.check("logits_teacher", method.cosine_logits(teacher, method.text_anchors()))
    from adaptkit.methods.prompts.promptsrc import gaussian_weights

    weights = gaussian_weights(
        case["config"]["OPTIM.MAX_EPOCH"], method.config.averaging_mean, method.config.averaging_std
    )
    compare.check("gpa_weights", torch.tensor(weights))


def extra_kgcoop(case: Mapping[str, Any], method: Any, features: Tensor, labels: Tensor, compare: Comparison) -> None:
    compare.check("loss_kg", method.losses(features, labels)["knowledge"] / method.config.weight)
    compare.check("text_features_handcrafted", method.zero_shot())


def extra_prograd(case: Mapping[str, Any], method: Any, features: Tensor, labels: Tensor, compare: Comparison) -> None:
    compare.check("text_features_teacher", method.zero_shot())
    compare.check("logits_teacher", method.cosine_logits(features, method.zero_shot()))
    terms = method.losses(features, labels)
    compare.check("loss_kl", terms["distillation"])
    flat = {}
    for term, theirs in (("cross_entropy", "gradients_ce"), ("distillation", "gradients_kl")):
        method.zero_grad()
        terms[term].backward(retain_graph=True)
        compare.gradients(theirs, method)
        flat[theirs] = method.context.grad.flatten()
    cosine = F.cosine_similarity(flat["gradients_ce"], flat["gradients_kl"], dim=0)
    compare.check("cosine", cosine)
    compare.unseen.discard("conflict")
    assert bool(cosine < 0) == case["expected"]["conflict"]
    if "labels" not in case["expected"].get("second_labels", {}):
        return
    compare.unseen.discard("second_labels")
    second = Comparison({k: v for k, v in case["expected"]["second_labels"].items() if k != "labels"})
    again = dict(case, expected=case["expected"]["second_labels"] | {"second_labels": {}})
    second_labels = torch.tensor(case["expected"]["second_labels"]["labels"])
    second.check("loss_ce", method.losses(features, second_labels)["cross_entropy"])
    extra_prograd(again, method, features, second_labels, second)
    method.zero_grad()
    method.backward(method.losses(features, second_labels), lambda loss: loss)
    second.gradients("gradients", method)
    assert not second.unseen, f"second labels: {sorted(second.unseen)} was expected and not compared"
    compare.worst = max(compare.worst, second.worst)


def extra_mmrl(case: Mapping[str, Any], method: Any, pixels: Tensor, labels: Tensor, compare: Comparison) -> None:
    branches, terms, config = method.branch_logits(pixels), method.losses(pixels, labels), method.config
    for kind in ("train", "base"):
        check_branches(method, pixels, compare, kind)
    compare.check("loss_ce_class", F.cross_entropy(branches["class"], labels))
    compare.check("loss_ce_rep", F.cross_entropy(branches["representation"], labels))
    compare.close("weighted", terms["class_cross_entropy"], config.alpha * case["expected"]["loss_ce_class"])
    compare.check("loss_reg_image", terms["image_consistency"] / config.consistency_weight)
    compare.check("loss_reg_text", terms["text_consistency"] / config.consistency_weight)
    compare.check("text_features_teacher", method.zero_shot())
    compare.check("image_features_teacher", method.frozen_features(pixels, None))
    compare.check("image_features_rep", F.normalize(method.encode_both(pixels)[1], dim=-1))


EXTRAS: dict[str, Callable[[Mapping[str, Any], Any, Tensor, Tensor, Comparison], None]] = {
    "promptsrc": extra_promptsrc,
    "kgcoop": extra_kgcoop,
    "prograd": extra_prograd,
    "mmrl": extra_mmrl,
    "mmrlpp": extra_mmrl,
    "clip-lora": cases_lora.extra,
}


# --- methods on features alone ----------------------------------------------------------------------------------------


class GivenText(Backbone):
    """A backbone whose text features are given; there is nothing else to it."""

    def __init__(self, features: Tensor) -> None:
        super().__init__(BackboneSpec("given", "test", "", features.shape[1], Preprocessing(1), 77), 100.0)
        self.given = features

    def text_features(self, texts: Any) -> Tensor:
        assert len(texts) == len(self.given)
        return self.given


def feature_sets(case: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """The case's sets of features with their labels, by name."""
    facts, root = case["features"], case["features"]["dim"] ** 0.5

    def z(name: str, *shape: int) -> Tensor:
        return draw(case["seed"], f"{case['method']}:{name}", shape) / root

    dim = facts["dim"]
    class_means, image_mean = z("class_means", facts["classes"], dim), z("image_mean", dim)
    means = {"image": image_mean, "text": z("text_mean", dim) + 0.5 * image_mean}
    sets = {}
    for entry in facts["sets"]:
        labels = torch.tensor(entry["labels"])
        rows = means[entry["kind"]] + facts["between"] * class_means[labels]
        rows = rows + entry["noise"] * z(entry["name"], entry["rows"], dim)
        sets[entry["name"]] = (F.normalize(rows, dim=-1) if entry["unit"] else rows, labels)
    return sets


def support_views(sets: Mapping[str, tuple[Tensor, Tensor]]) -> TensorInputs:
    """The support set in its augmented views; where there are several, a plain view that must not count leads them."""
    views = [sets[name][0] for name in sorted(sets) if name.startswith("support_view")]
    values = torch.stack(views if len(views) == 1 else [torch.full_like(views[0], 1e6), *views])
    return TensorInputs(values, sets["support_view0"][1])


def run_tip(case: Mapping[str, Any], name: str, compare: Comparison) -> None:
    sets = feature_sets(case)
    names = tuple(f"class {index}" for index in range(case["features"]["classes"]))
    kind = methods.get(name)
    method = kind(GivenText(sets["text"][0]), names, config=kind.config_class(**_tip(case["config"])))
    val = TensorInputs(sets["val"][0][None], sets["val"][1])
    task = FitTask(names, support_views(sets), val)
    query = sets["query"][0]
    if name == "tip-adapter-f":
        _run_tip_training(case, method, task, TensorInputs(sets["train"][0][None], sets["train"][1]), query, compare)
        return
    method.build_cache(task)
    compare.unseen.discard("cache_keys")
    compare.summary("cache_keys", method.keys, compare.expected["cache_keys"])
    compare.check("clip_logits", method.clip_logits(query))
    compare.check("cache_logits", method.cache_logits(query))
    compare.check("logits", method(query))
    facts = method.fit(task)
    wanted = compare.expected["search"]
    compare.unseen.discard("search")
    compare.close("beta", facts["beta"], wanted["best_beta"])
    compare.close("alpha", facts["alpha"], wanted["best_alpha"])
    compare.close("logits after the search", method(query), wanted["logits"])


def _run_tip_training(
    case: Mapping[str, Any], method: Any, task: FitTask, train: TensorInputs, query: Tensor, compare: Comparison
) -> None:
    method.prepare(task)
    features, labels = train.values[0], train.labels
    compare.check("train_logits_initial", method(features))
    (loss,) = method.losses(features, labels).values()
    compare.check("loss_initial", loss)
    loss.backward()
    compare.gradients("gradients_initial", method)
    after_epochs: list[Tensor] = []

    def keep(what: str, done: int, total: int) -> None:
        if done > len(after_epochs):  # one step an epoch
            with torch.no_grad():
                after_epochs.append(method(query))

    settings = TrainingSettings(
        epochs=case["config"]["train_epoch"],
        batch_size=len(labels),
        optimiser="adamw",
        lr=case["config"]["lr"],
        eps=1e-4,
        weight_decay=0.01,
        schedule="cosine-step",
        warmup_epochs=0,
    )
    report = GradientLoop(settings, keep)(method, FitTask(task.class_names, train))
    compare.close("learning rates", torch.tensor(report["learning_rates"]), case["config"]["lr_per_step"])
    compare.check("loss_per_epoch", torch.tensor(report["losses"]))
    compare.check("query_logits_per_epoch", torch.stack(after_epochs))


FEATURE_LEVEL: dict[str, Callable[[Mapping[str, Any], str, Comparison], None]] = {
    "em-dirichlet": cases_transductive.run_em_dirichlet,
    "transclip": cases_transductive.run_transclip,
    "unem": cases_transductive.run_unem,
    "tip-adapter": run_tip,
    "tip-adapter-f": run_tip,
    "dclip": lambda case, name, compare: cases_descriptions.run_dclip(case, name, compare, draw),
    "waffleclip": lambda case, name, compare: cases_descriptions.run_waffleclip(case, name, compare, draw),
    "vdt-adapter": lambda case, name, compare: cases_descriptions.run_vdt_adapter(case, name, compare, draw),
    "gda": cases_caches.run_gda,
    "taskres": cases_adapters.run_taskres,
    "clap": cases_adapters.run_clap,
    "lp-plus-plus": cases_adapters.run_lp_plus_plus,
    "cross-modal": cases_adapters.run_cross_modal,
    "ape": cases_caches.run_ape,
}


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path: Path, record_property: Callable[[str, object], None]) -> None:
    case = json.loads(path.read_text())
    name = our_name(case["method"])
    if name is None:
        pytest.skip(f"{case['method']} isn't in the registry")
    if name not in SETTINGS:
        pytest.fail(f"{name} is registered, but SETTINGS doesn't say how its golden settings map to ours")
    compare = Comparison(case["expected"])
    if name in FEATURE_LEVEL:
        FEATURE_LEVEL[name](case, name, compare)
    else:
        run_on_tiny_clip(case, name, compare)
    assert not compare.unseen, f"{sorted(compare.unseen)} was expected and not compared"
    record_property("share_of_tolerance", compare.worst)
    print(f"{path.stem}: at most {compare.worst:.3f} of what is allowed")


def test_the_cases_are_there() -> None:
    """The kept cases run, all of them: a renamed method or a moved folder must not turn them into skips."""
    kept = [json.loads(path.read_text())["method"] for path in OWN_FOLDER.glob("*.json")]
    assert sum(our_name(method) is not None for method in kept) >= 30
    assert CASES, f"{FOLDER} holds no cases"
