"""Suites: what a file may say, and that everything wrong with it is said at once."""

from __future__ import annotations

import pytest

from adaptkit.data.synthetic import EMBEDDED
from adaptkit.errors import ConfigError, MissingPathError, UnknownNameError
from adaptkit.evaluation.recipes import PROTOCOLS, list_recipes, load_recipe
from adaptkit.methods import methods
from adaptkit.sweeps.suite import expand, list_suites, load_suite, methods_of, narrowed, read_suite

SMALL = {"name": "small", "methods": ["zero-shot"], "datasets": ["digits"], "seeds": [1]}


def asked(**content):
    return expand(read_suite({**SMALL, **content}))


def test_every_combination_is_run_once():
    specs = asked(methods=["zero-shot", "tip-adapter"], datasets=["digits", "shapes"], shots=[1, 2, 2], seeds=[1, 2, 3])
    assert len(specs) == len(set(specs)) == 2 * 2 * 2 * 3
    assert [spec.task.dataset for spec in specs] == ["digits"] * 12 + ["shapes"] * 12
    tasks = [spec.task for spec in specs]
    assert all(first == second for first, second in zip(tasks[::2], tasks[1::2], strict=True))  # one task's together


def test_entries_carry_settings_of_their_own():
    [spec] = asked(
        methods=[{"name": "coop", "recipe": "csc", "set": ["training.epochs=3"]}],
        datasets=[{"dataset": "digits", "templates": ["number {}"], "sampler": "portable"}],
        task={"allow_fewer": True, "sampler": "coop"},
        set=["training.lr=0.1"],
    )
    assert (spec.recipe, spec.overrides, spec.shared) == ("csc", ("training.epochs=3",), ("training.lr=0.1",))
    assert (spec.task.templates, spec.task.sampler, spec.task.allow_fewer) == (("number {}",), "portable", True)


def test_more_grids_and_exclusions():
    specs = asked(
        methods=["coop", "tip-adapter"],
        shots=[1, 16],
        include=[{"methods": ["zero-shot"], "shots": [1]}],
        exclude=[{"methods": ["coop"], "shots": [1]}],
    )
    found = sorted((spec.method, spec.task.shots) for spec in specs)
    assert found == [("coop", 16), ("tip-adapter", 1), ("tip-adapter", 16), ("zero-shot", 1)]


def test_words_stand_for_many():
    both = {*methods_of("feature-level"), *methods_of("tower-level")}
    assert both == set(methods_of("all")) == set(methods)
    specs = asked(methods=["feature-level", "zero-shot"], datasets="embedded")
    assert {spec.task.dataset for spec in specs} == set(EMBEDDED)
    assert len(specs) == len(EMBEDDED) * len(methods_of("feature-level"))
    assert {spec.method for spec in specs if spec.named} == {"zero-shot"}


def test_everything_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        read_suite(
            {
                "name": "wrong",
                "methods": ["coopp", "tip-adaptr"],
                "datasets": [{"dataset": "digits"}],
                "shots": [0],
                "seeds": [-1],
                "protocols": ["few-shots"],
                "exclude": [{"methods": ["nobody"]}, {}],
            }
        )
    message = str(caught.value)
    parts = ("'coopp'", "'coop'", "'tip-adaptr'", "'tip-adapter'", "shots holds 0", "seeds holds -1", "'few-shots'")
    for part in (*parts, "'few-shot'", "'nobody'", "an entry of exclude is empty"):
        assert part in message, part
    assert message.count("\n- ") == 7


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"datasets": ["digits"]}, "methods is missing"),
        ({**SMALL, "metods": []}, "did you mean 'methods'"),
        ({**SMALL, "methods": [{"name": "coop", "recipee": "csc"}]}, "did you mean 'recipe'"),
        ({**SMALL, "methods": []}, "methods is empty"),
        ({**SMALL, "shots": "many"}, "a whole number"),
        ({**SMALL, "datasets": [{"dataset": "digits", "shots": 3}]}, "write it as the suite's shots"),
        ({**SMALL, "task": {"seed": 3}}, "write it as the suite's seeds"),
        ({**SMALL, "task": 7}, "task is 7"),
        ({**SMALL, "include": [{"method": ["coop"]}]}, "did you mean 'methods'"),
        ({**SMALL, "include": 5}, "include is 5"),
        ({**SMALL, "datasets": [7]}, "datasets is"),
    ],
)
def test_what_is_no_suite_is_refused(content, reason):
    with pytest.raises(ConfigError, match=reason):
        read_suite({"name": "x", **content})


def test_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("methods: [zero-shot]\ndatasets: [digits]\n")
    suite = load_suite(path, data_root="/data")
    assert (suite.name, suite.datasets[0].data_root) == ("mine", "/data")
    path.write_text("name: other\nmethods: [zero-shot]\ndatasets: [digits]\n")
    with pytest.raises(ConfigError, match="remove the key 'name'"):
        load_suite(str(path))
    with pytest.raises(MissingPathError, match=r"no suite file .*nothing\.yaml"):
        load_suite(tmp_path / "nothing.yaml")
    with pytest.raises(UnknownNameError, match="Did you mean 'embedded'"):
        load_suite("embeded")


def test_a_suite_is_narrowed_by_name():
    suite = read_suite({**SMALL, "methods": ["coop", "zero-shot", "gda"], "datasets": ["digits", "shapes"]})
    assert {spec.method for spec in expand(narrowed(suite, "methods", ["feature-level"]))} == {"gda", "zero-shot"}
    assert {spec.task.dataset for spec in expand(narrowed(suite, "datasets", ["shapes"]))} == {"shapes"}
    with pytest.raises(UnknownNameError, match="'coop'"):
        narrowed(suite, "methods", ["cop"])


def test_the_shipped_suites_are_read_and_are_no_recipes():
    shipped = {"embedded", "coop-11", "base-to-novel-11", "cross-dataset", "domain-generalisation"}
    assert set(list_suites()) == shipped
    names = sorted(shipped if "cross-dataset" in PROTOCOLS else shipped - {"cross-dataset", "domain-generalisation"})
    assert len(names) >= 3
    sizes = {name: len(expand(load_suite(name))) for name in names}
    assert sizes["embedded"] == len(methods) * len(EMBEDDED) * 3
    assert sizes["coop-11"] % 11 == sizes["base-to-novel-11"] % 11 == 0
    for name in names:
        suite = load_suite(name)
        assert suite.summary
        assert suite.source
        assert f"suites/{name}" not in list_recipes()
        with pytest.raises(UnknownNameError):
            load_recipe(f"suites/{name}")
