from __future__ import annotations

import shlex
from dataclasses import fields, replace

import pytest

from adaptkit.commands.run import command as run_command
from adaptkit.errors import DataError
from adaptkit.evaluation import protocols
from adaptkit.evaluation.results import read_run
from adaptkit.evaluation.tasks import TaskSpec
from adaptkit.sweeps.report.repeat import command_text, command_words, option_of, spec_of
from tests.cli.conftest import call, own_cache, photos
from tests.sweeps.report.build import JSON, record

__all__ = ["call", "own_cache", "photos"]  # fixtures

CASES = {
    "settings, several templates": (
        "{photos}", "--method", "tip-adapter", "--shots", 2, "--set", "method.beta=2.5", "--set", "method.search=false",
        "--set", "views=1", "--template", "a 'photo' of $HOME {{}}.", "--template", 'the "{{}}"',
    ),
    "halves, a seed and a recipe": (
        "digits", "--method", "coop", "--protocol", "base-to-novel", "--shots", 1, "--seed", 3,
        "--recipe", "coop/base-to-novel", "--set", "epochs=1", "--set", "views=1", "--set", "lr=1e-5",
    ),
    "precision, sampler, no recipe": (
        "{photos}", "--method", "zero-shot", "--shots", 2, "--precision", "bf16", "--sampler", "clip-lora",
        "--recipe", "none", "--allow-fewer",
    ),
    "targets": (
        "{photos}", "--method", "clip-adapter", "--protocol", "cross-dataset", "--targets", "digits",
        "--shots", 1, "--set", "epochs=1",
    ),
    "joint, a class split": (
        "digits", "--method", "zero-shot", "--protocol", "base-to-novel", "--shots", 1, "--joint", "--class-split", 5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_command_plans_the_same_run_again(case, call, photos, tmp_path, monkeypatch):
    words = [str(word).format(photos=photos) for word in CASES[case]]
    first = call("run", *words, "--out", tmp_path / "first", "--json")
    assert first.exit_code == 0, first.output
    made = read_run(tmp_path / "first")
    text = command_text(made)
    assert text is not None
    assert shlex.split(text)[:2] == ["adaptkit", "run"]
    planned = []

    def remember(plan, *_given, **_also):
        planned.append(plan)
        raise DataError("enough")

    monkeypatch.setattr(protocols, "run_method", remember)
    again = call(*shlex.split(text)[1:], "--out", tmp_path / "again")
    assert again.exit_code == 2, again.output
    assert planned[0].key == made.key
    assert planned[0].recipe is None if not made.recipe else planned[0].recipe.name == made.recipe


def test_the_command_gives_the_same_numbers(call, photos, tmp_path):
    words = (photos, "--method", "linear-probe", "--shots", 2, "--json", "--out")
    assert call("run", *words, tmp_path / "first").exit_code == 0
    made = read_run(tmp_path / "first")
    again = call(*shlex.split(command_text(made) or "")[1:], "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert read_run(tmp_path / "again").parts == made.parts


def test_every_field_of_a_spec_has_its_option():
    known = {option for parameter in run_command.params for option in parameter.opts}
    checked = [item.name for item in fields(TaskSpec) if option_of(item.name) in known]
    assert len(checked) == len(fields(TaskSpec)) >= 15


def test_embedded_runs_without_a_spec_still_have_a_command(tmp_path):
    made = record(tmp_path, "coop").result
    words = command_words(made)
    assert words is not None
    assert words[2:6] == ["--method", "coop", "--dataset", "digits"]
    assert spec_of(made) == TaskSpec("digits", shots=4)


@pytest.mark.parametrize("asked", [None, {"dataset": 3}, {"dataset": "x", "nonsense": 1}, "text"])
def test_runs_on_unknown_data_have_none(tmp_path, asked):
    made = record(tmp_path, "coop", source=JSON).result
    if asked is not None:
        made = replace(made, dataset={**made.dataset, "asked": asked})
    assert command_text(made) is None


def test_names_from_outside_are_quoted_for_the_shell(tmp_path):
    made = record(tmp_path, "coop").result
    made = replace(made, dataset={"asked": {"dataset": "x; rm -rf ~", "templates": ["$(id) {}"]}})
    text = command_text(made)
    assert text is not None
    assert "'x; rm -rf ~'" in text
    assert "'$(id) {}'" in text
