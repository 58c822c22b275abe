"""Tasks with targets, halves of one's own, joint candidates: how they are laid out, keyed, run and refused."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import pytest

from adaptkit.backbones import load_backbone
from adaptkit.config import from_mapping, to_mapping
from adaptkit.data.features import FeatureStore
from adaptkit.data.sources import load_dataset
from adaptkit.errors import ConfigError, DataError, UnknownNameError, UnsupportedError
from adaptkit.evaluation import protocols
from adaptkit.evaluation.protocols import choose_recipe, plan_run, run_method
from adaptkit.evaluation.results import adapter_facts, headline, is_done, read_run, write_run
from adaptkit.evaluation.tasks import KNOWN_TARGETS, TaskSpec, load_task, make_task
from adaptkit.methods import methods
from adaptkit.methods.adapter import load_adapter
from tests.quick import described, quick_overrides


def loaded(name):
    """A dataset with a fifth of its test images: enough here, and quicker."""
    data = load_dataset(name)
    return dataclasses.replace(data, test=data.test.subset(range(0, len(data.test), 5)))


SHAPES, SKETCH, NOISE = (loaded(name) for name in ("shapes", "shapes-sketch", "shapes-noise"))
DIGITS, TEXTURES = (loaded(name) for name in ("digits", "textures"))
FEW = 6
"""Classes of the small shifted dataset."""


def small(dataset, classes, name="small", rename=str.upper):
    """Some classes of a dataset, in the order given, under other display names."""
    stored = [dataset.stored_names[label] for label in classes]
    place = {label: position for position, label in enumerate(classes)}

    def of(split):
        kept = split.subset(np.flatnonzero(np.isin(split.labels, classes)))
        labels = np.array([place[label] for label in kept.labels])
        return dataclasses.replace(kept, class_names=tuple(map(rename, stored)), labels=labels)

    return dataclasses.replace(
        dataset,
        name=name,
        class_names=tuple(map(rename, stored)),
        stored_names=tuple(stored),
        train=of(dataset.train),
        val=of(dataset.val),
        test=of(dataset.test),
    )


SMALL = small(SKETCH, [20, 3, 11, 0, 23, 8])
"""Six of the 24 shapes as sketches, out of order."""


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("mini")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return FeatureStore(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def run(backbone, store):
    def one(method, task, **given):
        return run_method(plan_run(method, backbone, task, **given), backbone, store=store)

    return one


def shifted(masking="logits", targets=(SMALL, NOISE), **given):
    return make_task(SHAPES, "domain-generalisation", 2, 1, targets=targets, masking=masking, **given)


def elsewhere(targets=(TEXTURES, DIGITS), source=SHAPES, **given):
    return make_task(source, "cross-dataset", 2, 1, targets=targets, **given)


# --- what is laid out -------------------------------------------------------------------------------------------------


def test_a_transfer_task_trains_on_all_classes_and_tests_everything():
    task, plain = elsewhere(), make_task(SHAPES, "few-shot", 2, 1)
    assert task.train.ids == plain.train.ids
    assert task.class_names == SHAPES.class_names
    assert [part.name for part in task.parts] == ["source", "textures", "digits"]
    for part, data in zip(task.parts, (SHAPES, TEXTURES, DIGITS), strict=True):
        assert part.asked == part.split.class_names == data.class_names
        assert part.split.ids == data.test.ids
        assert part.columns == ()
    assert task.parts[0].other is None
    assert [part.other.templates for part in task.parts[1:]] == [TEXTURES.templates, DIGITS.templates]
    assert make_task(SHAPES, "cross-dataset", 2, 2, targets=[DIGITS]).train.ids != task.train.ids


def test_masks_come_from_stored_names_in_the_order_of_the_source():
    part = shifted().parts[1]
    assert part.columns == (0, 3, 8, 11, 20, 23)
    assert part.asked == SHAPES.class_names
    assert part.split.class_names == tuple(SHAPES.class_names[column] for column in part.columns)
    named = [SMALL.stored_names[label] for label in SMALL.test.labels]  # display names are in capitals
    assert [part.split.class_names[label] for label in part.split.labels] == named
    assert len(set(named)) == FEW
    by_names = shifted("names").parts[1]
    assert by_names.asked == by_names.split.class_names == part.split.class_names
    assert np.array_equal(by_names.split.labels, part.split.labels)


def test_wordnet_ids_tell_classes_of_one_name_apart():
    """ImageNet has two classes called "missile": only ids tell which of them a shifted version holds."""
    ids = tuple(f"n{label:08d}" for label in range(24))
    source = dataclasses.replace(SHAPES, stored_names=ids)
    target = dataclasses.replace(small(SKETCH, [5, 2]), stored_names=(ids[5], ids[2]), class_names=("missile", "x"))
    part = make_task(source, "domain-generalisation", 2, 1, targets=[target]).parts[1]
    assert part.columns == (2, 5)
    assert part.split.class_names == (SHAPES.class_names[2], SHAPES.class_names[5])


def test_random_splits_depend_on_their_seed_alone():
    tasks = {seed: make_task(SHAPES, "base-to-novel", 2, 1, class_split=seed) for seed in (1, 2)}
    order = list(range(24))
    random.Random(1).shuffle(order)
    assert tasks[1].class_names == tuple(SHAPES.class_names[label] for label in sorted(order[:12]))
    assert tasks[1].class_names != tasks[2].class_names
    assert make_task(SHAPES, "base-to-novel", 2, 5, class_split=1).class_names == tasks[1].class_names
    for task in tasks.values():
        base, novel = (set(part.split.class_names) for part in task.parts)
        assert not base & novel
        assert base | novel == set(SHAPES.class_names)
        assert set(task.train.ids) <= set(make_task(SHAPES, "few-shot", 2, 1).train.ids)


def test_joint_candidates_are_all_classes():
    joint, plain = (make_task(SHAPES, "base-to-novel", 2, 1, joint=joint) for joint in (True, False))
    assert joint.train.ids == plain.train.ids
    assert [part.name for part in joint.parts] == ["base", "novel", "all"]
    assert all(part.asked == SHAPES.class_names for part in joint.parts)
    for part, half in zip(joint.parts, plain.parts, strict=False):
        assert part.split.ids == half.split.ids
        assert np.array_equal(part.positions, half.positions)
        assert np.array_equal(part.split.labels, SHAPES.test.labels[part.positions])
    assert len(joint.parts[2].split) == len(SHAPES.test)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["zero-shot", "coop", "maple", "clip-adapter"])
def test_both_masks_agree_for_methods_that_score_each_class_by_itself(run, method):
    results = [run(method, shifted(masking), overrides=quick_overrides(method)) for masking in ("logits", "names")]
    first, second = (outcome.result for outcome in results)
    assert [(part.name, part.correct, part.num_classes) for part in first.parts] == [
        (part.name, part.correct, part.num_classes) for part in second.parts
    ]
    for one, other in zip(results[0].predictions, results[1].predictions, strict=True):
        np.testing.assert_array_equal(one.predicted, other.predicted)
        np.testing.assert_allclose(one.confidence, other.confidence, atol=1e-4)
    assert first.parts[1].num_classes == FEW
    assert first.key_digest != second.key_digest


def test_masks_differ_where_classes_are_scored_together(run):
    """A Gaussian mixture over the batch puts images into classes that the other mask doesn't offer."""
    first, second = (run("transclip", shifted(masking, [SMALL])).predictions[1] for masking in ("logits", "names"))
    assert not np.allclose(first.confidence, second.confidence, atol=1e-3)


def test_averages_leave_the_source_out(run):
    result = run("zero-shot", elsewhere()).result
    source, *targets = (part.accuracy for part in result.parts)
    assert result.target_average == pytest.approx(sum(targets) / 2)
    assert result.score == result.target_average != source
    assert result.drop is None
    assert headline(result)["average"] == result.target_average
    shift = run("zero-shot", shifted()).result
    assert shift.drop == pytest.approx(shift.parts[0].accuracy - shift.target_average)
    assert headline(shift)["drop"] == shift.drop
    assert adapter_facts(shift)["test accuracy, mean of targets"] == f"{100 * shift.target_average:.1f} %"
    plain = run("zero-shot", make_task(SHAPES, "few-shot", 2, 1)).result
    assert (plain.target_average, plain.drop, plain.score) == (None, None, plain.parts[0].accuracy)


def test_a_target_gives_what_zero_shot_gives_on_it_alone(run):
    """Its own names and templates, not the source's; and one list of templates for all where one is given."""
    crossed = run("zero-shot", elsewhere([DIGITS])).result
    alone = run("zero-shot", make_task(DIGITS, "few-shot", 2, 1)).result
    assert crossed.part("digits").correct == alone.parts[0].correct
    assert crossed.part("digits").templates == DIGITS.templates
    other = run("zero-shot", elsewhere([dataclasses.replace(DIGITS, templates=("{}",))])).result
    assert other.part("digits").templates == ("{}",)
    assert any("its own templates" in warning for warning in other.warnings)
    same = run("zero-shot", elsewhere([dataclasses.replace(DIGITS, templates=SHAPES.templates)])).result
    assert any("the same templates" in warning for warning in same.warnings)
    assert other.key_digest != crossed.key_digest
    assert other.part("source") == crossed.part("source")


def test_a_target_of_the_same_names_is_described_anew(run):
    """Nothing remembered for the source's class list may serve a target that is described otherwise."""
    source = described(SHAPES)
    twin = dataclasses.replace(source, name="twin", test=SHAPES.test.subset(range(90)), templates=("not a {} at all",))
    for method in ("zero-shot", "taskres", "tip-adapter", "cupl", "mmrl"):
        overrides = quick_overrides(method)
        if method == "cupl":
            overrides.append("method.prompts=combined")
        alike = dataclasses.replace(twin, templates=SHAPES.templates)
        parts = [run(method, elsewhere([target], source), overrides=overrides) for target in (alike, twin)]
        same, other = (outcome.predictions[1].confidence for outcome in parts)
        assert not np.allclose(same, other, atol=1e-4), method
        assert np.array_equal(*(outcome.predictions[0].confidence for outcome in parts)), method


def test_zero_shot_answers_are_flagged_also_where_a_name_is_known(run):
    """A target may share a name with the source; cache methods answer such a target zero-shot as a whole."""
    names = (SHAPES.class_names[0], *DIGITS.class_names[1:])
    target = dataclasses.replace(DIGITS, class_names=names, test=dataclasses.replace(DIGITS.test, class_names=names))
    for method in ("tip-adapter", "linear-probe", "gda"):
        result = run(method, elsewhere([target]), overrides=quick_overrides(method)).result
        assert not result.parts[0].fallback
        assert result.parts[1].fallback == (method != "gda")
    zero = run("zero-shot", elsewhere([target])).result
    cached = run("tip-adapter", elsewhere([target]), overrides=quick_overrides("tip-adapter")).result
    assert cached.parts[1].correct == zero.parts[1].correct
    assert any("zero-shot" in warning for warning in cached.warnings)


def test_it_is_trained_once(run, monkeypatch):
    calls, fit = [], protocols.fit_method
    monkeypatch.setattr(protocols, "fit_method", lambda *given: calls.append(1) or fit(*given))
    run("coop", elsewhere(), overrides=quick_overrides("coop"))
    assert calls == [1]


def test_joint_accuracy_is_below_that_of_each_half(run):
    joint, plain = (
        run("zero-shot", make_task(SHAPES, "base-to-novel", 2, 1, joint=joint)).result for joint in (True, False)
    )
    assert all(joint.part(name).accuracy < plain.part(name).accuracy for name in ("base", "novel"))
    assert joint.part("all").correct == joint.part("base").correct + joint.part("novel").correct
    assert joint.harmonic_mean < plain.harmonic_mean
    assert any("joint" in warning for warning in joint.warnings)
    assert joint.key.marks
    assert not plain.key.marks


def test_a_saved_adapter_gives_the_same_numbers_on_targets(run, backbone, store, tmp_path):
    overrides = quick_overrides("coop")
    plan = plan_run("coop", backbone, elsewhere(), overrides=overrides)
    outcome = run_method(plan, backbone, store=store)
    folder = write_run(tmp_path / "run", outcome.result, outcome.predictions, outcome.model)
    assert read_run(folder) == outcome.result
    again = protocols._Run(plan, backbone, store, 64, None)
    loaded = load_adapter(folder / "adapter", backbone).method
    assert loaded.class_names == SHAPES.class_names
    assert loaded.templates == SHAPES.templates
    for part, wanted in zip(plan.task.parts, outcome.result.parts, strict=True):
        assert again.test(loaded, part)[0] == wanted
    assert is_done(folder, outcome.result.key)
    assert not is_done(folder, plan_run("coop", backbone, elsewhere([DIGITS]), overrides=overrides).key)


@pytest.mark.parametrize("method", ["mmrl", "mmrlpp"])
def test_mmrl_answers_fused_on_the_source_alone(run, method, monkeypatch):
    kind, seen = methods.get(method), []
    plain = kind.set_classes

    def watched(self, names, other=None):
        plain(self, names, other)
        seen.append((other is None, self.answers_fused()))
        return self

    monkeypatch.setattr(kind, "set_classes", watched)
    run(method, shifted(targets=[SMALL]), overrides=quick_overrides(method))
    assert {(True, True), (False, False)} == set(seen)


def test_mmrlpp_may_have_a_beta_for_each_target_and_is_marked(run, backbone, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "method: mmrlpp\nprotocol: cross-dataset\nsummary: s\nsource: s\nshots: [16]\ntuned_on: per-dataset-config\n"
        "by_target: {digits: {beta: 0.1}}\n"
    )
    given = {"overrides": quick_overrides("mmrlpp"), "recipe": str(recipe)}
    result = run("mmrlpp", elsewhere([DIGITS]), **given)
    plain = run("mmrlpp", elsewhere([DIGITS]), overrides=given["overrides"], recipe="none")
    assert np.array_equal(*(outcome.predictions[0].confidence for outcome in (result, plain)))
    assert not np.allclose(*(outcome.predictions[1].confidence for outcome in (result, plain)))
    assert result.result.tuned_on == "per-dataset-config"
    assert any("for each target" in warning for warning in result.result.warnings)
    with pytest.raises(ConfigError, match="none for 'textures'"):
        plan_run("mmrlpp", backbone, elsewhere(), **given)
    recipe.write_text(recipe.read_text().replace("beta: 0.1", "alpha: 0.1"))
    with pytest.raises(ConfigError, match="it takes beta"):
        run("mmrlpp", elsewhere([DIGITS]), **given)


# --- keys and recipes -------------------------------------------------------------------------------------------------


def test_every_option_changes_the_key_and_plain_tasks_keep_theirs(backbone, tmp_path):
    def key(**given):
        task = load_task(TaskSpec("shapes", shots=2, **given))
        return plan_run("zero-shot", backbone, task).key

    lists = tmp_path / "base.txt"
    lists.write_text("\n".join(SHAPES.class_names[:5]))
    novel, cross = {"protocol": "base-to-novel"}, {"protocol": "cross-dataset", "targets": ("digits",)}
    shift = {"protocol": "domain-generalisation", "targets": ("shapes-noise",)}
    plain = [key(), key(**novel)]
    assert all(set(each.settings) == {"method", "training", "templates", "precision"} for each in plain)
    every = [
        *plain,
        key(seed=2),
        key(**novel, joint=True),
        key(**novel, class_split=0),
        key(**novel, class_split=1),
        key(**novel, class_split=1, joint=True),
        key(**novel, base_classes=str(lists)),
        key(**cross),
        key(**cross, seed=2),
        key(**cross, templates=("{}",)),
        key(protocol="cross-dataset", targets=("digits", "textures")),
        key(**shift),
        key(**shift, masking="names"),
    ]
    digests = [each.digest for each in every]
    assert len(set(digests)) == len(digests) == 14
    assert every[8].settings["targets"] == {"digits": load_dataset("digits").digest}
    assert [bool(each.marks) for each in every] == [False] * 3 + [True] * 5 + [False] * 5 + [True]


def test_recipes_of_a_protocol_that_trains_alike_stand_in(backbone):
    large = SimpleNamespace(spec=SimpleNamespace(family="open_clip", name="large"))
    assert choose_recipe("coop", "cross-dataset", backbone).name == "coop/cross-dataset-quick"
    assert choose_recipe("coop", "domain-generalisation", backbone).name == "coop/cross-dataset-quick"
    assert choose_recipe("prograd", "cross-dataset", backbone).name == "prograd/few-shot-quick"
    assert choose_recipe("coop", "cross-dataset", backbone, "csc").name == "coop/few-shot-csc"
    assert choose_recipe("coop", "domain-generalisation", backbone, "coop/cross-dataset").protocol == "cross-dataset"
    with pytest.raises(ConfigError, match="is for coop with base-to-novel"):
        choose_recipe("coop", "cross-dataset", backbone, "coop/base-to-novel")
    with pytest.raises(ConfigError, match="is for coop with cross-dataset"):
        choose_recipe("coop", "few-shot", backbone, "coop/cross-dataset")
    assert choose_recipe("coop", "domain-generalisation", large).name == "coop/cross-dataset"
    assert choose_recipe("tip-adapter", "cross-dataset", large).name == "tip-adapter/few-shot"


def test_a_spec_is_plain_values():
    spec = TaskSpec("shapes", "cross-dataset", targets=("digits",), class_split=3)
    assert from_mapping(TaskSpec, to_mapping(spec)) == spec
    assert TaskSpec("shapes", "domain-generalisation").all_targets[0] == "shapes-sketch"
    assert TaskSpec("shapes").all_targets == ()
    assert {len(targets) for targets in KNOWN_TARGETS.values()} == {3, 4, 10}


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"targets": ("digits",)}, "--targets"),
        ({"protocol": "base-to-novel", "targets": ("digits",)}, "--targets"),
        ({"protocol": "cross-dataset", "dataset": "digits"}, "Name the targets of digits"),
        ({"protocol": "cross-dataset", "targets": ("shapes", "digits")}, "shapes is the source"),
        ({"protocol": "cross-dataset", "targets": ("digits", "digits")}, "more than once as a target: digits"),
        ({"protocol": "cross-dataset", "masking": "names"}, "--masking"),
        ({"protocol": "domain-generalisation", "masking": "rows"}, "Unknown masking 'rows'"),
        ({"joint": True, "class_split": 1}, "--class-split, --joint: for --protocol base-to-novel"),
        ({"protocol": "base-to-novel", "class_split": 1, "class_order": "x"}, "each say which classes are base"),
        ({"protocol": "base-to-novel", "novel_classes": "x"}, "needs --base-classes"),
        ({"protocol": "cross-datasets"}, "Did you mean 'cross-dataset'"),
    ],
)
def test_what_cannot_go_together_is_said_before_anything_is_read(given, says):
    with pytest.raises(ConfigError, match=says):
        load_task(TaskSpec(**{"dataset": "shapes", **given}))


def test_all_problems_are_said_at_once():
    with pytest.raises(ConfigError) as said:
        load_task(TaskSpec("shapes", "cross-dataset", targets=("shapes", "shapes"), joint=True))
    assert "3 things" in str(said.value)
    with pytest.raises(ConfigError, match="3 things") as both:
        load_task(TaskSpec("shapes", "cross-dataset", targets=("digts", "textures", "./nowhere"), joint=True))
    assert all(word in str(both.value) for word in ("'digits'", "nowhere", "--joint"))
    with pytest.raises(UnknownNameError, match="textures"):
        load_task(TaskSpec("shapes", "cross-dataset", targets=("texture",)))


def test_targets_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"24 classes that shapes hasn't .*cross-dataset"):
        shifted(targets=[TEXTURES])
    with pytest.raises(DataError, match="no test images"):
        elsewhere([dataclasses.replace(DIGITS, test=DIGITS.test.subset([]))])
    with pytest.raises(DataError, match="copy is the source itself"):
        elsewhere([dataclasses.replace(SHAPES, name="copy")])
    with pytest.raises(DataError, match="called 'source'"):
        elsewhere([dataclasses.replace(DIGITS, name="source")])
    with pytest.raises(DataError, match="called 'digits'"):
        elsewhere([DIGITS, dataclasses.replace(TEXTURES, name="digits")])
    with pytest.raises(DataError, match="no target"):
        elsewhere([])


def test_methods_that_refuse_classes_say_so_before_training(run, backbone, monkeypatch):
    monkeypatch.setattr(protocols, "fit_method", lambda *given: pytest.fail("it was trained"))
    with pytest.raises(UnsupportedError, match="can't predict 'bricks'"):
        run("coop", elsewhere(), overrides=["class_specific=true"], recipe="none")
    joint = make_task(SHAPES, "base-to-novel", 2, 1, joint=True)
    for method in ("tip-adapter", "gda"):
        with pytest.raises(UnsupportedError, match="different scales"):
            plan_run(method, backbone, joint)
    with pytest.raises(DataError, match="reads descriptions"):
        run("vdt-adapter", elsewhere([DIGITS], described(SHAPES)))


# --- files ------------------------------------------------------------------------------------------------------------


def spec_with(folder, **lists):
    paths = {}
    for option, names in lists.items():
        paths[option] = str(folder / f"{option}.txt")
        (folder / f"{option}.txt").write_text("\n".join(names), encoding="utf-8")
    return TaskSpec("digits", "base-to-novel", 2, **paths)


def test_class_lists_decide_the_halves(tmp_path):
    names = list(DIGITS.class_names)
    turned = load_task(spec_with(tmp_path, class_order=names[::-1]))
    assert turned.class_names == tuple(names[5:])
    assert turned.settings["class_halves"] == {"base": names[5:], "novel": names[:5]}
    odd = load_task(spec_with(tmp_path, base_classes=["three", "one", "nine"]))
    assert odd.class_names == ("one", "three", "nine")
    assert [len(part.split.class_names) for part in odd.parts] == [3, 7]
    both = load_task(spec_with(tmp_path, base_classes=names[:2], novel_classes=names[2:]))
    assert both.class_names == tuple(names[:2])


def test_class_lists_with_mistakes_are_refused_with_all_of_them(tmp_path):
    names = list(DIGITS.class_names)
    with pytest.raises(DataError) as said:
        load_task(spec_with(tmp_path, base_classes=["one", "won", "two"], novel_classes=["two", "three"]))
    assert all(word in str(said.value) for word in ("'won'", "more than once: two", "7 classes of digits in no list"))
    with pytest.raises(DataError, match="1 class of digits in no list: four"):
        load_task(spec_with(tmp_path, class_order=[name for name in names if name != "four"]))
    with pytest.raises(DataError, match="listed more than once: one"):
        load_task(spec_with(tmp_path, base_classes=["one", "one"]))
    with pytest.raises(DataError, match="No novel class"):
        load_task(spec_with(tmp_path, base_classes=names))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_task(TaskSpec("digits", "base-to-novel", 2, class_order=str(tmp_path / "nowhere.txt")))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="no class names"):
        load_task(TaskSpec("digits", "base-to-novel", 2, class_order=str(tmp_path / "empty.txt")))


def test_templates_come_from_files(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("a {} drawn small\n\nthe number {}\n")
    task = load_task(TaskSpec("shapes", "cross-dataset", 2, templates=(f"@{path}", "{}"), targets=("digits",)))
    wanted = ("a {} drawn small", "the number {}", "{}")
    assert task.dataset.templates == wanted
    assert task.parts[1].other.templates == wanted
    path.write_text("no place\n")
    with pytest.raises(ConfigError, match="no place"):
        load_task(TaskSpec("digits", shots=2, templates=(f"@{path}",)))
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        load_task(TaskSpec("digits", shots=2, templates=(f"@{tmp_path}/absent.txt",)))
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match="UTF-8"):
        load_task(TaskSpec("digits", shots=2, templates=(f"@{path}",)))
