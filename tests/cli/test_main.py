"""The group: help, versions, and that every error is one sentence with the right exit code."""

from __future__ import annotations

import click
import pytest

import adaptkit
from adaptkit.commands.main import _VERBS, main


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command below a group, as the words that call it."""
    if not isinstance(command, click.Group):
        return [path]
    context = click.Context(command)
    found = [path] if path else []
    for name in command.list_commands(context):
        below = command.get_command(context, name)
        assert below is not None
        found += leaves(below, (*path, name))
    return found


def test_every_command_shows_an_example_and_most_print_json(call):
    commands = leaves(main)
    assert len(commands) == len(_VERBS) + 11  # data has five of its own, features two, sweep four
    for words in commands:
        outcome = call(*words, "--help")
        assert outcome.exit_code == 0, words
        assert "Example" in outcome.output, words
        assert f"adaptkit {' '.join(words)}" in outcome.output, words
        assert ("--json" in outcome.output) == (words not in (("data",), ("features",), ("sweep",))), words


def test_the_group_lists_its_verbs_and_version(call):
    shown = call("--help").output
    for verb in _VERBS:
        command = main.get_command(click.Context(main), verb)
        assert command is not None
        assert command.short_help
        assert command.short_help in shown
    assert call("--version").output.strip().endswith(adaptkit.__version__)


@pytest.mark.parametrize(("word", "says"), [("comapre", "Did you mean 'compare'"), ("xyz", "There are: run, compare")])
def test_unknown_verbs(refused, word, says):
    assert says in refused(word).replace("\n", " ")


def test_an_error_is_one_line_on_standard_error(call, photos, tmp_path):
    out = tmp_path / "out"
    attempts = [
        ("run", photos, "--method", "mapel", "--out", out),
        ("run", photos, "--method", "coop", "--shots", 9, "--out", out),
        ("run", tmp_path / "nowhere", "--method", "coop", "--out", out),
        ("run", "digtis", "--method", "coop", "--out", out),
        ("run", photos, "--method", "coop", "--shots", 2, "--backbone", "ViT-B-16/opnai", "--out", out),
        ("run", photos, "--method", "coop", "--shots", 2, "--recipe", "csx", "--out", out),
        ("run", photos, "--method", "coop", "--shots", 2, "--set", "lrr=1", "--out", out),
        ("run", photos, "--method", "coop", "--shots", 2, "--out", tmp_path / ("long" * 100)),
        ("compare", photos, "--shots", 9, "--out", out),
        ("predict", out, photos / "oak/0.png"),
        ("list", "recipes", "coop/few-shto"),
        ("list", "datasets", "shaeps"),
        ("data", "check", tmp_path / "nowhere"),
    ]
    for words in attempts:
        outcome = call(*words)
        assert outcome.exit_code == 2, words
        assert isinstance(outcome.exception, SystemExit), words
        assert outcome.stdout == "", words
        assert outcome.stderr.startswith("Error: "), words
        assert outcome.stderr.count("\n") == 1, outcome.stderr
        assert outcome.stderr.rstrip().endswith((".", "?")), outcome.stderr
    assert not out.exists()


@pytest.mark.parametrize("seed", [0, -3, 2**64, 10**30])
def test_any_whole_number_is_a_seed(call, photos, tmp_path, seed):
    words = ("run", photos, "--shots", 2, "--out", tmp_path / "out", "--seed", seed, "--set", "training.epochs=1")
    outcome = call(*words, "--method", "clip-adapter", "--sampler", "coop-linear-probe")
    assert outcome.exit_code == 0, outcome.output
    assert call("predict", tmp_path / "out", photos / "oak/0.png").exit_code == 0
