"""Runs: one method planned, fitted and tested on a task."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptkit.backbones.base import Backbone
from adaptkit.config import to_mapping
from adaptkit.data.features import FeatureStore, Precision, ViewSettings, feature_inputs_fresh, pixels_inputs
from adaptkit.data.splits import Split, TestSplit
from adaptkit.errors import AdaptKitWarning, DataError
from adaptkit.evaluation.metrics import Metrics, compute_metrics, harmonic_mean, log_softmax
from adaptkit.evaluation.recipes import Recipe, Resolved, find_recipe, load_recipe, resolve
from adaptkit.evaluation.results import (
    SCHEMA_VERSION,
    PartResult,
    Predictions,
    RunKey,
    RunResult,
    environment,
    peak_memory_bytes,
)
from adaptkit.evaluation.tasks import Task, TestPart
from adaptkit.methods import methods
from adaptkit.methods.adapter import AdaptedModel
from adaptkit.methods.base import GradientMethod, Method
from adaptkit.storage import digest_json
from adaptkit.training.loop import fit_method
from adaptkit.types import FitTask, Inputs, ProgressCallback, TrainingSettings

_TEST_BATCH = 256


# --- which recipe -----------------------------------------------------------------------------------------------------


def choose_recipe(method: str, protocol: str, backbone: Backbone, name: str | None = None) -> Recipe | None:
    """The recipe of a run: the one named, else "quick" for the embedded backbone and the paper's for any other.

    Raises:
        UnknownNameError: No such recipe.
        ConfigError: The recipe is for another method or protocol.
    """
    if name == "none":
        return None
    if name is None:
        variant = "quick" if backbone.spec.family == "mini" else ""
        return find_recipe(method, protocol, variant) or find_recipe(method, protocol)
    whole = "/" in name or name.endswith((".yaml", ".yml"))
    recipe = load_recipe(name if whole else f"{method}/{protocol}-{name}")
    recipe.check_fits(method, protocol)
    return recipe


def templates_of(task: Task, recipe: Recipe | None) -> tuple[str, ...]:
    """The zero-shot templates of a run: the recipe's where it brings some, else the dataset's."""
    return recipe.templates if recipe is not None and recipe.template_use == "recipe" else task.dataset.templates


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
    """
    kind = methods.get(method)
    chosen = choose_recipe(method, task.protocol, backbone, recipe)
    resolved = resolve(kind, chosen, overrides, shots=task.few_shot.shots, dataset=task.dataset.name)
    _check_searches(resolved, task)
    settings = {
        "method": _key_values(resolved.config),
        "training": _key_values(resolved.training) if kind.default_training is not None else {},
        "templates": list(templates_of(task, chosen)),
        "precision": precision,
    }
    if kind.reads_descriptions != "never":
        settings["descriptions"] = digest_json({k: list(v) for k, v in task.dataset.descriptions.items()})
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
) -> RunOutcome:
    """Fit a method on a task and test it.

    Ctrl-C while it trains ends training early: what was learned is tested, and the result's warnings say so.

    Args:
        plan: From `plan_run`.
        backbone: The one it was planned with.
        store: Where frozen features are kept; None for the default store.
        batch_size: Images encoded at once.
        progress: Called as (what, done, total).
    """
    run = _Run(plan, backbone, store or FeatureStore(), batch_size, progress)
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
    ) -> None:
        self.plan, self.backbone, self.store = plan, backbone, store
        self.batch_size, self.progress = batch_size, progress
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
            templates=templates_of(task, self.plan.recipe),
            config=resolved.config,
            seed=task.seed,
            descriptions=task.dataset.descriptions,
        )
        began = time.perf_counter()
        train = self._inputs(method, task.train, resolved.training)
        val = None if task.val is None else self._inputs(method, task.val, TrainingSettings(views=0))
        frozen = self._frozen(method, task.train, resolved.training)
        self._timed("features", began)
        began = time.perf_counter()
        fit_task = FitTask(task.class_names, train, val, task.seed, frozen)
        self.report = fit_method(method, fit_task, resolved.training, self.progress)
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
        method.set_classes(part.split.class_names)
        logits = self._logits(method, part.split)
        labels = part.split.labels
        logits, answered = counted_wrong(logits, labels)
        metrics = compute_metrics(logits, labels, len(part.split.class_names))
        confidence = np.where(answered, np.exp(log_softmax(logits).max(axis=1)), 0.0)
        predicted = np.where(answered, logits.argmax(axis=1), -1)
        fallback, answers = method.uses_fallback, method.answer_facts()
        method.set_classes(method.fitted_names)
        return _part_result(part, metrics, fallback, answers), Predictions(
            part.name, part.positions, labels, predicted, confidence
        )

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
        if method.transductive and size < len(split):
            # many datasets list their images class by class, and batches in that order would give the labels away
            order = torch.randperm(len(split), generator=torch.Generator().manual_seed(self.plan.task.seed))
        for done, indices in enumerate(torch.split(order, size)):
            if self.progress is not None and method.reads == "images":
                self.progress(f"{method.name}: testing", done * size, len(split))
            rows.append(method(inputs.select(indices).to(self.backbone.device)).float().cpu())
        self._timed("evaluate", began)
        logits = torch.cat(rows)
        return torch.empty_like(logits).index_copy_(0, order, logits).numpy()

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
            dataset=task.dataset.summary(),
            warnings=(*task.dataset.notes, *task.few_shot.notes, *self._cautions(parts, tuned_on), *said),
            environment=environment(str(self.backbone.device), self.plan.resolved.training.precision),
        )

    def _cautions(self, parts: Sequence[PartResult], tuned_on: str) -> list[str]:
        cautions = [
            f"{part.name} classes: zero-shot, the method has no answer of its own" for part in parts if part.fallback
        ]
        if tuned_on in ("test", "per-dataset-config"):
            cautions.append(f"settings were chosen on: {tuned_on}")
        if self.report.get("interrupted"):
            cautions.append(f"training was interrupted after {self.report.get('epochs')} epochs")
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
    share the probability, so that no metric profits.

    Args:
        logits: [n, classes].
        labels: [n].

    Returns:
        The logits, and bool [n].
    """
    answered = ~np.isnan(logits).all(axis=1)
    if answered.all():
        return logits, answered
    logits = logits.copy()
    logits[~answered] = 0.0
    logits[~answered, labels[~answered]] = -np.inf
    return logits, answered


def _part_result(part: TestPart, metrics: Metrics, fallback: bool, answers: Mapping[str, Any]) -> PartResult:
    return PartResult(
        part.name,
        metrics.num_classes,
        metrics.correct,
        metrics.total,
        {**metrics.to_dict(), **({"answers": dict(answers)} if answers else {})},
        metrics.per_class,
        fallback,
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
