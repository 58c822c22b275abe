"""Golden cases of the transductive methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptkit.methods.transductive._dirichlet import match_clusters
from adaptkit.methods.transductive._transduction import Support
from adaptkit.methods.transductive.em_dirichlet import EMDirichlet, EMDirichletConfig
from adaptkit.methods.transductive.transclip import Mixture, TransCLIP, TransCLIPConfig
from adaptkit.methods.transductive.unem import UNEM, Tasks, UNEMConfig


def _sets(case: Mapping[str, Any]) -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[str, ...], Any]:
    from tests.golden.test_golden import GivenText, feature_sets  # which imports this file

    sets = feature_sets(case)
    names = tuple(f"class {index}" for index in range(case["features"]["classes"]))
    return sets, names, GivenText(sets["text"][0])


def run_em_dirichlet(case: Mapping[str, Any], name: str, compare: Any) -> None:
    sets, names, backbone = _sets(case)
    config, expected = case["config"], case["expected"]
    (query, labels), (shots, shot_labels) = sets["query"], sets["support"]

    def method(kind: str, **settings: Any) -> EMDirichlet:
        # zero-shot, the reference divides by 5 whatever its settings say
        ours = {"effective_classes": config["k_eff"] if kind == "few_shot" else 5, "iterations": config["iter"]}
        ours |= {"temperature": config["T"], "use_support": kind == "few_shot", **settings}
        made = EMDirichlet(backbone, names, config=EMDirichletConfig(**ours))
        assert made.balance(len(names)) * len(query) == config[f"lambd_{'few' if kind == 'few_shot' else 'zero'}_shot"]
        return made

    def fit(kind: str, **settings: Any) -> Any:
        made = method(kind, **settings)
        return made.fitted_mixture(query, made.zero_shot(), Support(shots, shot_labels) if kind == "few_shot" else None)

    text = method("zero_shot").zero_shot()
    compare.check("query_probabilities", torch.softmax(config["T"] * query @ text.T, dim=-1))
    for kind, settings in (
        ("zero_shot", {}),
        ("zero_shot", {"solver": "mm"}),
        ("zero_shot_hard", {"assignment": "hard"}),
        ("zero_shot_hard", {"assignment": "hard", "solver": "mm"}),
        ("few_shot", {}),
        ("few_shot", {"solver": "mm"}),
    ):
        wanted = expected[kind]
        compare.unseen.discard(kind)
        fitted = fit(kind, **settings)
        u = fitted.log_u.exp()
        if kind == "zero_shot_hard":
            u = torch.nn.functional.one_hot(u.argmax(dim=1), len(names)).float()
        compare.close(f"{kind} assignments", u, wanted["assignments"])
        if "assignments_after_1" in wanted:
            compare.close("after 1", fit(kind, iterations=1, **settings).log_u.exp(), wanted["assignments_after_1"])
        for part in ("alpha", "v"):
            if part in wanted:
                compare.close(f"{kind} {part}", getattr(fitted, part), wanted[part])
        scores = fitted.log_u if kind == "few_shot" else match_clusters(fitted, "hungarian")
        accuracy = float((scores.argmax(dim=1) == labels).float().mean())
        compare.close(
            f"{kind} accuracy", accuracy, wanted["accuracy" if kind == "few_shot" else "accuracy_after_matching"]
        )


def run_transclip(case: Mapping[str, Any], name: str, compare: Any) -> None:
    sets, names, backbone = _sets(case)
    config = case["config"]
    query, support = sets["query"][0], Support(*sets["support"])
    settings = {
        "iterations": config["max_iter"],
        "inner_iterations": config["max_iter_z"],
        "neighbours": config["n_neighbors"],
        "confident": config["n_most_confident"],
        "text_weight": config["lambda_value_zero_shot"],
        "text_weight_support": config["lambda_value_few_shot"],
        "gammas": tuple(config["gamma_list"]),
    }

    def along(labelled: Support | None, **changes: Any) -> list[Mixture]:
        made = TransCLIP(backbone, names, config=TransCLIPConfig(**{**settings, **changes}))
        solver = made.solver(query, made.zero_shot(), labelled)
        compare.check("neighbour_index", solver.graph.index.sort(dim=1).values)
        gammas = settings["gammas"] if labelled is not None else (0.0,)
        return [Mixture(one.z, one.log_z, one.mu, one.variance) for one in solver.along(gammas)]

    for kind, parity in (("zero_shot", "none"), ("few_shot", "published"), ("few_shot_aligned", "aligned")):
        if kind not in case["expected"]:
            continue
        wanted, labelled = case["expected"][kind], None if kind == "zero_shot" else support
        compare.unseen.discard(kind)
        states = along(labelled, parity=parity)
        compare.close(f"{kind} assignments", states[-1].z, wanted["assignments"])
        compare.close(f"{kind} variance", states[-1].variance, wanted["variance"])
        compare.summary(f"{kind} mu", states[-1].mu, wanted["mu"])
        if kind == "zero_shot":
            compare.close("after 1", along(None, iterations=0)[0].z, wanted["assignments_after_1"])
            continue
        after = along(labelled, parity=parity, iterations=0)[0]  # before the centres move
        compare.close(f"{kind} after 1", after.z, wanted["assignments_after_1"])
        first = config["gamma_list"][0]
        compare.close(f"{kind} first gamma", states[0].z, wanted[f"assignments_gamma_{first}"])
        compare.close(f"{kind} accuracy", _published_accuracy(sets, states), wanted["accuracy_at_best_val"])


def _published_accuracy(sets: Mapping[str, tuple[Tensor, Tensor]], states: list[Mixture]) -> float:
    """Test accuracy at the gamma of the first best validation accuracy, as published: by nearest test images."""
    (query, labels), (val, val_labels) = sets["query"], sets["val"]
    near = (val @ query.T).argmax(dim=1)
    right = [int((state.z[near].argmax(dim=1) == val_labels).sum()) for state in states]
    chosen = states[right.index(max(right))].z
    return 100 * float((chosen.argmax(dim=1) == labels).float().mean())


def run_unem(case: Mapping[str, Any], name: str, compare: Any) -> None:
    from tests.golden.test_golden import draw

    sets, names, backbone = _sets(case)
    (query, labels), (shots, shot_labels) = sets["query"], sets["support"]
    state = {}
    for parameter in case["parameters"]:
        value = draw(case["seed"], f"{case['method']}:{parameter['name']}", tuple(parameter["shape"]))
        state[parameter["name"]] = value * parameter["scale"] + parameter["offset"]
    for differentiation, solver in (("implicit", "newton"), ("implicit", "mm"), ("unrolled", "mm")):
        config = UNEMConfig(
            layers=case["config"]["iter"],
            effective_classes=case["config"]["k_eff"],
            loss="double-softmax",
            differentiation=differentiation,  # type: ignore[arg-type]
            solver=solver,  # type: ignore[arg-type]
            unrolled_steps=0,
        )
        method = UNEM(backbone, names, config=config)
        method.load_reference_state(state)
        assert method.num_trained() == len(state)
        text = method.zero_shot()
        answers = method.assign(query, text, Support(shots, shot_labels))
        tasks = Tasks((query @ text.T)[None], labels[None], (shots @ text.T)[None], shot_labels[None])
        compare.check("assignments", answers.exp())
        compare.check("assignments", method.unrolled(tasks)[0].exp())
        loss = method.task_loss(tasks)
        compare.check("loss", loss)
        loss.backward()
        compare.unseen.discard("gradients")
        wanted = compare.expected["gradients"]
        compare.close("gradient of emb_t", method.feature_temperature.grad, wanted["emb_t"])
        for theirs, ours in (("gamma", method.class_weights), ("t", method.temperatures)):
            for index, value in enumerate(ours.grad):
                compare.close(f"{differentiation} gradient of {theirs}", value, wanted[f"{theirs}.{index}"])
