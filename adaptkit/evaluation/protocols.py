"""Runs: one method planned, fitted and tested on a task."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptkit.backbones.base import Backbone
from adaptkit.backbones.load import EMBEDDED
from adaptkit.backbones.stored import StoredBackbone
from adaptkit.config import to_mapping
from adaptkit.data.features import FeatureStore, Precision, ViewSettings, feature_inputs_fresh, pixels_inputs
from adaptkit.data.splits import Split, TestSplit
from adaptkit.errors import AdaptKitWarning, DataError
from adaptkit.evaluation.leaks import check_leaks
from adaptkit.evaluation.metrics import Metrics, compute_metrics, harmonic_mean, log_softmax
from adaptkit.evaluation.recipes import STAND_INS, Recipe, Resolved, find_recipe, load_recipe, resolve
from adaptkit.evaluation.results import (
    SCHEMA_VERSION,
    PartResult,
    Predictions,
    RunKey,
    RunResult,
    environment,
    peak_memory_bytes,
)
from adaptkit.evaluation.stored import check_stored
from adaptkit.evaluation.tasks import Task, TestPart
from adaptkit.methods import methods
from adaptkit.methods.adapter import AdaptedModel
from adaptkit.methods.base import GradientMethod, Method, check_novel
from adaptkit.storage import digest_json
from adaptkit.training.checkpoints import Checkpoints
from adaptkit.training.loop import check_shared, fit_method
from adaptkit.training.processes import current
from adaptkit.types import EpochCallback, FitTask, Inputs, ProgressCallback, TrainingSettings

_TEST_BATCH = 256


# --- which recipe -----------------------------------------------------------------------------------------------------


def choose_recipe(method: str, protocol: str, backbone: Backbone, name: str | None = None) -> Recipe | None:
    """The recipe of a run: the one named, else "quick" for an embedded backbone and the paper's for any other.

    Where a method has none for a protocol with targets, that of a protocol that trains alike serves (`STAND_INS`).

    Raises:
        UnknownNameError: No such recipe.
        ConfigError: The recipe is for another method or protocol.
    """
    if name == "none":
        return None
    protocols = (protocol, *STAND_INS.get(protocol, ()))
    if name is None:
        embedded = backbone.spec.family == "mini" or backbone.spec.name.partition("@")[0] in EMBEDDED
        variants = ("quick", "") if embedded else ("",)
        found = (find_recipe(method, one, variant) for variant in variants for one in protocols)
        return next((recipe for recipe in found if recipe is not None), None)
    if "/" in name or name.endswith((".yaml", ".yml")):
        recipe = load_recipe(name)
    else:
        own = next((one for one in protocols if find_recipe(method, one, name)), protocol)
        recipe = load_recipe(f"{method}/{own}-{name}")
    recipe.check_fits(method, protocol)
    return recipe


def templates_of(task: Task, recipe: Recipe | None, backbone: Backbone) -> tuple[str, ...]:
    """The zero-shot templates of a run: the recipe's where it brings some, else the dataset's.

    A backbone that reads only templates of its own gets these, or those of the dataset's among them.
    """
    if backbone.own_templates:
        held = set(task.dataset.templates) <= set(backbone.own_templates)
        return task.dataset.templates if held else backbone.own_templates
    return recipe.templates if recipe is not None and recipe.template_use == "recipe" else task.dataset.templates


def settle_targets(task: Task, recipe: Recipe | None) -> Task:
    """The task with its other datasets described as the recipe wants them.

    Raises:
        ConfigError: The recipe has settings per target, and none for one of them.
    """
    if recipe is None:
        return task
    parts = []
    for part in task.parts:
        if part.other is not None:
            templates = recipe.templates if recipe.template_use == "recipe" else part.other.templates
            other = replace(part.other, templates=templates, settings=recipe.for_target(part.name))
            part = replace(part, other=other)
        parts.append(part)
    return replace(task, parts=tuple(parts))


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunOutcome:
    """What a run gives.

    Args:
        result: For `result.json`.
        predictions: First choices on the test split, by part.
        model: The adapted model.
    """

    result: RunResult
    predictions: tuple[Predictions, ...]
    model: AdaptedModel


@dataclass(frozen=True)
class RunPlan:
    """A run before it happens: checked settings, and the key that names it.

    Args:
        method: Registered name.
        task: What to run on.
        recipe: Where the settings start from.
        resolved: Settings with their origins.
        key: Everything that changes the numbers.
    """

    method: str
    task: Task
    recipe: Recipe | None
    resolved: Resolved
    key: RunKey


def plan_run(
    method: str,
    backbone: Backbone,
    task: Task,
    *,
    recipe: str | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    precision: Precision = "fp32",
) -> RunPlan:
    """Check everything about a run that can be checked before any work starts.

    Args:
        method: Registered name.
        backbone: Loaded.
        task: From `make_task`.
        recipe: A recipe's name, a variant ("csc"), a YAML file, "none" for the method's defaults; None chooses.
        overrides: As after --set.
        precision: Of the frozen encoder.

    Raises:
        UnknownNameError: No such method or recipe.
        ConfigError: Settings that can't be used, all in one message.
        DataError: A search was asked for, and there are too few validation images for one.
        UnsupportedError: Several processes were started, and the method can't share batches.
    """
    kind = methods.get(method)
    if kind.needs_mllm and issubclass(kind, GradientMethod):
        check_shared(kind)  # others may train nothing; these may look at all images before they train
    chosen = choose_recipe(method, task.protocol, backbone, recipe)
    task = settle_targets(task, chosen)
    for part in task.parts:
        check_novel(kind, task.class_names, part.asked, part.other is not None)
    resolved = resolve(kind, chosen, overrides, shots=task.few_shot.shots, dataset=task.dataset.name)
    _check_searches(resolved, task)
    templates = templates_of(task, chosen, backbone)
    check_stored(kind, backbone, task.dataset, templates, resolved)
    settings = {
        "method": _key_values(resolved.config),
        "training": _key_values(resolved.training) if kind.default_training is not None else {},
        "templates": list(templates),
        "precision": precision,
    }
    if isinstance(backbone, StoredBackbone):
        settings["text_features"] = backbone.digest_of_texts
    if kind.reads_descriptions != "never":
        settings["descriptions"] = _descriptions_digest(task.dataset.descriptions)
    settings |= {**task.settings, **_target_settings(kind, task)}
    key = RunKey(
        method,
        backbone.spec.name,
        backbone.spec.digest,
        task.dataset.name,
        task.dataset.digest,
        task.protocol,
        task.few_shot.shots,
        task.seed,
        task.few_shot.sampler,
        settings,
    )
    return RunPlan(method, task, chosen, resolved, key)


def _target_settings(kind: type[Method], task: Task) -> dict[str, Any]:
    """What is said about each target beside its images, as far as it isn't the source's, for the key."""
    others = {part.name: part.other for part in task.parts if part.other is not None}
    settings: dict[str, Any] = {}
    if task.protocol == "cross-dataset":
        settings["target_templates"] = {name: list(other.templates) for name, other in others.items()}
        if kind.reads_descriptions != "never":
            digests = {name: _descriptions_digest(other.descriptions) for name, other in others.items()}
            settings["target_descriptions"] = digests
    if any(other.settings for other in others.values()):
        settings["target_settings"] = {name: dict(other.settings) for name, other in others.items()}
    return settings


def _descriptions_digest(descriptions: Mapping[str, Sequence[str]]) -> str:
    return digest_json({name: list(sentences) for name, sentences in descriptions.items()})


def _key_values(settings: Any) -> dict[str, Any]:
    """Settings as plain values, without those marked "later" that are at their default.

    They came after runs had been made, and leave the keys of those as they are.
    """
    later = {item.name: item.default for item in fields(settings) if item.metadata.get("later")}
    return {key: value for key, value in to_mapping(settings).items() if key not in later or value != later[key]}


def _check_searches(resolved: Resolved, task: Task) -> None:
    """Refuse a search that someone asked for where there is nothing to choose on.

    A search that is merely a method's or a recipe's default is left out there, and the result says so. It takes
    validation images of two classes: among those of one, whatever always answers that class is best.
    """
    asked = [
        key
        for key, origin in resolved.origins.items()
        if key.startswith("method.search") and origin != "default" and not origin.startswith("recipe ")
    ]
    wanted = [key for key in asked if getattr(resolved.config, key.removeprefix("method.")) is True]
    seen = 0 if task.val is None else len(set(task.val.labels.tolist()))
    if wanted and seen < 2:
        raise DataError(
            f"{wanted[0]} asks for a choice on validation images of at least two classes, and {task.dataset.name} has"
            f" {'none' if not seen else 'them of one only'}: add validation images, or leave the setting out."
        )


def run_method(
    plan: RunPlan,
    backbone: Backbone,
    *,
    store: FeatureStore | None = None,
    batch_size: int = 64,
    progress: ProgressCallback | None = None,
    on_epoch: EpochCallback | None = None,
    checkpoints: Checkpoints | None = None,
    both_lists: bool = False,
) -> RunOutcome:
    """Fit a method on a task and test it.

    Ctrl-C while it trains ends training early: what was learned is tested, and the result's warnings say so.

    Args:
        plan: From `plan_run`.
        backbone: The one it was planned with.
        store: Where frozen features are kept; None for the default store.
        batch_size: Images encoded at once.
        progress: Called as (what, done, total).
        on_epoch: Called after every epoch of a method trained by gradients.
        checkpoints: Where its training keeps checkpoints, and goes on from; `Checkpoints.clear` them once the result
            is written.
        both_lists: Whether base and novel images are also answered among all classes, beside their own half (multimodal
            language models always do): where a class's score doesn't depend on the others, it costs one pass.
    """
    run = _Run(plan, backbone, store or FeatureStore(), batch_size, progress, on_epoch, checkpoints, both_lists)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AdaptKitWarning)
        method = run.fit()
        tested = [run.test(method, part) for part in plan.task.parts]
    said = tuple(dict.fromkeys(str(item.message) for item in caught if issubclass(item.category, AdaptKitWarning)))
    parts = tuple(part for part, _ in tested)
    result = run.result(method, parts, said)
    return RunOutcome(result, tuple(predictions for _, predictions in tested), AdaptedModel(method))


class _Run:
    """One run: what its steps share, and the seconds each takes."""

    def __init__(
        self,
        plan: RunPlan,
        backbone: Backbone,
        store: FeatureStore,
        batch_size: int,
        progress: ProgressCallback | None,
        on_epoch: EpochCallback | None = None,
        checkpoints: Checkpoints | None = None,
        both_lists: bool = False,
    ) -> None:
        self.plan, self.backbone, self.store = plan, backbone, store
        self.batch_size, self.progress, self.on_epoch = batch_size, progress, on_epoch
        self.checkpoints, self.processes = checkpoints, current()
        self.both_lists = both_lists
        self.precision: Precision = plan.key.settings["precision"]
        self.seconds: dict[str, float] = {}
        self.encoded_before = store.encoded
        self.report: dict[str, Any] = {}

    def _timed(self, what: str, began: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began

    # --- fitting ------------------------------------------------------------------------------------------------------

    def fit(self) -> Method:
        task, resolved = self.plan.task, self.plan.resolved
        method = methods.get(self.plan.method)(
            self.backbone,
            task.class_names,
            templates=templates_of(task, self.plan.recipe, self.backbone),
            config=resolved.config,
            seed=task.seed,
            descriptions=task.dataset.descriptions,
        )
        for part in task.parts:  # classes that it refuses or can't read are said before it is trained
            method.set_classes(part.asked, part.other)
        novel = [name for part in task.parts if part.other is None for name in part.asked]
        check_leaks(method.training_texts(), [name for name in novel if name not in task.class_names], task.class_names)
        if self.processes.sharded:
            method.spread(self.processes.device)
        began = time.perf_counter()
        train = self._inputs(method, task.train, resolved.training)
        val = None if task.val is None else self._inputs(method, task.val, TrainingSettings(views=0))
        frozen = self._frozen(method, task.train, resolved.training)
        self._timed("features", began)
        began = time.perf_counter()
        fit_task = FitTask(task.class_names, train, val, task.seed, frozen)
        settings = resolved.training
        self.report = fit_method(method, fit_task, settings, self.progress, self.on_epoch, self.checkpoints)
        self._timed("fit", began)
        return method

    def _inputs(self, method: Method, split: Split, training: TrainingSettings) -> Inputs:
        """What the method trains on, in its views."""
        views = self._views(training)
        if method.reads == "images":
            return pixels_inputs(
                self.backbone,
                split,
                views=training.views,
                settings=views,
                fresh=training.fresh_views,
                batch_size=self.batch_size,
                progress=self.progress,
            )
        if training.fresh_views and isinstance(method, GradientMethod):
            return feature_inputs_fresh(
                self.backbone, split, settings=views, batch_size=self.batch_size, precision=self.precision
            )
        return self._stored(split, training)

    def _views(self, training: TrainingSettings) -> ViewSettings:
        return ViewSettings(training.crop_scale, training.flip, self.plan.task.seed, training.colour_jitter)

    def _frozen(self, method: Method, split: Split, training: TrainingSettings) -> Inputs | None:
        """Frozen features of the training images, for methods that train on pixels beside them.

        Views drawn anew in every epoch have none stored: the method encodes each batch twice, as its reference does.
        """
        wanted = isinstance(method, GradientMethod) and method.wants_frozen and not training.fresh_views
        return self._stored(split, training) if wanted else None

    def _stored(self, split: Split, training: TrainingSettings) -> Inputs:
        """Stored frozen features in the training's views."""
        return self.store.inputs(
            self.backbone,
            split,
            views=training.views,
            settings=self._views(training),
            batch_size=self.batch_size,
            progress=self.progress,
            precision=self.precision,
        )

    # --- testing ------------------------------------------------------------------------------------------------------

    def test(self, method: Method, part: TestPart) -> tuple[PartResult, Predictions]:
        every = self._every_class(method)
        method.set_classes(every or part.asked, part.other)
        logits, labels = self._logits(method, part.split), part.split.labels
        columns = [every.index(name) for name in part.split.class_names] if every else part.columns
        among_all = _among_all(logits, labels, columns) if every else {}
        if columns:
            logits = np.ascontiguousarray(logits[:, columns])
        answered = np.ones(len(labels), dtype=bool)
        if method.needs_mllm:  # any other method's NaN is an error, which the metrics refuse
            logits, answered = counted_wrong(logits, labels)
        classes = len(part.split.class_names)
        metrics = compute_metrics(logits, labels, logits.shape[1])
        if logits.shape[1] > classes:
            metrics = replace(metrics, num_classes=classes, per_class=metrics.per_class[:classes])
        confidence = np.where(answered, np.exp(log_softmax(logits).max(axis=1)), 0.0)
        predicted = np.where(answered, logits.argmax(axis=1), -1)
        more: dict[str, Any] = {"among_all": among_all} if every else {}
        if not self._answered_together(method):  # else of this process's share
            asked = [columns[label] if columns else int(label) for label in labels]
            if facts := {**method.judged_facts(asked), **method.answer_facts()}:
                more["answers"] = facts
        result = _part_result(part, metrics, method, more)
        method.set_classes(method.fitted_names)
        return result, Predictions(part.name, part.positions, labels, predicted, confidence)

    @torch.no_grad()
    def _logits(self, method: Method, split: TestSplit) -> np.ndarray:
        """Logits [n, classes] in fp32; features come from the store, which every method and seed shares."""
        rows: list[Tensor] = []
        began = time.perf_counter()
        if method.reads == "images":
            inputs = pixels_inputs(self.backbone, split, fresh=True, batch_size=self.batch_size)
            size = self.batch_size
        else:
            inputs = self.store.inputs(
                self.backbone, split, batch_size=self.batch_size, progress=self.progress, precision=self.precision
            )
            size = method.images_at_once(len(split), _TEST_BATCH)
            self._timed("features", began)
            began = time.perf_counter()
        order = torch.arange(len(split))
        together = self._answered_together(method)
        if together:  # each process its share
            order = self.processes.padded_share(order)
        elif method.transductive and size < len(split):
            # many datasets list their images class by class, and batches in that order would give the labels away
            order = torch.randperm(len(split), generator=torch.Generator().manual_seed(self.plan.task.seed))
        for done, indices in enumerate(torch.split(order, size)):
            if self.progress is not None and method.reads == "images":
                self.progress(f"{method.name}: testing", done * size, len(order))
            rows.append(method(inputs.select(indices).to(self.backbone.device)).float().cpu())
        self._timed("evaluate", began)
        logits = torch.cat(rows)
        if together:
            return self.processes.joined(logits.to(self.processes.device), len(split)).cpu().numpy()
        if len(logits) != len(split):
            raise DataError(f"{method.name} answered {len(logits)} images of {len(split)}.")
        return torch.empty_like(logits).index_copy_(0, order, logits).numpy()

    def _every_class(self, method: Method) -> tuple[str, ...]:
        """All classes of the dataset, where its halves are answered among them too; else none."""
        task = self.plan.task
        asked = self.both_lists or method.needs_mllm
        plain = task.protocol == "base-to-novel" and not task.settings.get("joint")
        can = method.scores_alone and method.mixes_classes and method.open_vocabulary
        return task.dataset.class_names if asked and plain and can else ()

    def _answered_together(self, method: Method) -> bool:
        """Whether the processes share the test images; not where they would wait for each other in spread layers."""
        waits = self.processes.sharded and getattr(method.config, "route", "") == "open"  # answers of any length
        return self.processes.count > 1 and not method.transductive and not waits

    # --- the record ---------------------------------------------------------------------------------------------------

    def result(self, method: Method, parts: tuple[PartResult, ...], said: tuple[str, ...]) -> RunResult:
        task, recipe, key = self.plan.task, self.plan.recipe, self.plan.key
        by_name = {part.name: part.accuracy for part in parts}
        h = harmonic_mean(by_name["base"], by_name["novel"]) if "novel" in by_name else None
        state = method.adapter_state()
        tuned_on = _tuned_on(recipe, self.report)
        return RunResult(
            schema_version=SCHEMA_VERSION,
            key=key,
            key_digest=key.digest,
            parts=parts,
            harmonic_mean=h,
            trained_parameters=method.num_trained(),
            adapter_bytes=sum(value.numel() * value.element_size() for value in state.values()),
            seconds=self.seconds,
            peak_memory_bytes=peak_memory_bytes(),
            images_encoded=self.store.encoded - self.encoded_before,
            few_shot_digest=task.few_shot.digest,
            class_names=task.class_names,
            templates=method.templates,
            recipe="" if recipe is None else recipe.name,
            tuned_on=tuned_on,
            origins=dict(self.plan.resolved.origins),
            fit=_plain_report(self.report),
            dataset=task.dataset.summary() | ({} if task.spec is None else {"asked": to_mapping(task.spec)}),
            warnings=(
                *key.marks,
                *task.dataset.notes,
                *task.few_shot.notes,
                *task.notes,
                *self._target_facts(method),
                *self._cautions(parts, tuned_on),
                *said,
            ),
            environment=environment(str(self.backbone.device), self.plan.resolved.training.precision) | self._company(),
        )

    def _company(self) -> dict[str, Any]:
        """How many processes did the run, where it was more than one."""
        if self.processes.count == 1:
            return {}
        return {"processes": self.processes.count, "sharded": self.processes.sharded}

    def _target_facts(self, method: Method) -> list[str]:
        """Which settings trained the model that answers for targets, and what their classes were described with."""
        task, recipe = self.plan.task, self.plan.recipe
        if not any(part.other for part in task.parts):
            return []
        facts = []
        if recipe is not None and recipe.protocol != task.protocol:
            facts.append(f"trained by recipe {recipe.name}, which is written for {recipe.protocol}")
        if method.context_vectors():
            facts.append("names of the targets' classes stand in the learned prompt, in the place of any template")
        elif task.protocol == "cross-dataset":
            used = {part.other.templates for part in task.parts if part.other is not None} | {method.templates}
            alike = method.fixed_templates or len(used) == 1
            facts.append(
                "source and targets are described by the same templates"
                if alike
                else "each target is described by its own templates (in the result of each part)"
            )
        if any(part.columns for part in task.parts):
            facts.append(
                "candidates of shifted datasets: logits over all source classes, the columns of the others dropped"
            )
        return facts

    def _cautions(self, parts: Sequence[PartResult], tuned_on: str) -> list[str]:
        cautions = [
            f"{part.name} classes: zero-shot, the method has no answer of its own" for part in parts if part.fallback
        ]
        if tuned_on in ("test", "per-dataset-config"):
            cautions.append(f"settings were chosen on: {tuned_on}")
        if self.report.get("interrupted"):
            cautions.append(f"training was interrupted after {self.report.get('epochs')} epochs")
        if "resumed_at" in self.report:
            cautions.append(f"training was gone on with after step {self.report['resumed_at']}, from a checkpoint")
        if self.report.get("why_not_searched"):
            cautions.append(f"settings weren't searched: {self.report['why_not_searched']}")
        return cautions


def _tuned_on(recipe: Recipe | None, report: Mapping[str, Any]) -> str:
    """ "val" only where a search on validation images really took place."""
    planned = "none" if recipe is None else recipe.tuned_on
    if planned in ("test", "per-dataset-config"):
        return planned
    return "val" if report.get("searched") else "none"


def counted_wrong(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits in which an image without an answer counts as wrong, and which images have one.

    A method that gets no usable answer for an image gives a row of NaN. In place of it all classes but the right one
    share the probability, so that no metric profits. A single class gets a second column for "none of it".

    Args:
        logits: [n, classes].
        labels: [n].

    Returns:
        The logits, and bool [n].
    """
    answered = ~np.isnan(logits).all(axis=1)
    if answered.all():
        return logits, answered
    if logits.shape[1] == 1:
        return np.where(answered[:, None] == [[True, False]], 0.0, -np.inf), answered
    logits = logits.copy()
    logits[~answered] = 0.0
    logits[~answered, labels[~answered]] = -np.inf
    return logits, answered


def _among_all(logits: np.ndarray, labels: np.ndarray, columns: Sequence[int]) -> dict[str, Any]:
    """What comes out where all classes are candidates.

    Args:
        logits: [n, all classes].
        labels: Within the part's classes, [n].
        columns: Which of all classes the part's are.
    """
    correct = int((logits.argmax(axis=1) == np.asarray(columns)[labels]).sum())
    return {"classes": logits.shape[1], "correct": correct, "accuracy": correct / len(labels)}


def _part_result(part: TestPart, metrics: Metrics, method: Method, more: Mapping[str, Any]) -> PartResult:
    learned = bool(method.context_vectors()) and not method.uses_fallback
    return PartResult(
        part.name,
        metrics.num_classes,
        metrics.correct,
        metrics.total,
        {**metrics.to_dict(), **more},
        metrics.per_class,
        method.uses_fallback,
        () if part.other is None or learned else method.templates,
        () if part.split.class_names == method.fitted_names else part.split.class_names,
    )


def _plain_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """The method's report as plain JSON values."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.tolist()
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return {key: plain(value) for key, value in report.items()}
