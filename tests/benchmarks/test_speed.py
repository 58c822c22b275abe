"""The speed benchmarks on a tiny model: the plain path is the towers' equal, and what is written down is complete.

No time is asserted anywhere: it depends on the machine and on who else uses it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from adaptkit.errors import ConfigError, UnsupportedError
from adaptkit.methods import prompts
from adaptkit.methods.prompts.promptsrc import TEACHER_TEMPLATES
from adaptkit.storage import write_json
from benchmarks.speed import __main__ as cli
from benchmarks.speed import training
from benchmarks.speed.commands import adaptkit_command
from benchmarks.speed.extraction import make_jpegs, measure_extraction
from benchmarks.speed.measure import (
    Difference,
    ProcessFailedError,
    Row,
    Scope,
    machine_facts,
    medians,
    on_line,
    peak_above,
    run_process,
    time_in_turn,
)
from benchmarks.speed.memory import one_step
from benchmarks.speed.plain import plain_image, plain_text
from benchmarks.speed.plain_prompts import PlainDeep
from benchmarks.speed.table import line, quantity
from benchmarks.speed.training import SUBJECTS, Case, Sizes, class_names, compare, time_steps
from tests.methods.tiny import DIM, image_only, tiny_clip

SIZES = Sizes(classes=(2, 3, 5), most_plain=3, batches=(2,), rounds=1)


@pytest.fixture(scope="module")
def backbone():
    return tiny_clip()


# --- training ---------------------------------------------------------------------------------------------------------

TRAINED = {
    "coop": 1,
    "kgcoop": 1,
    "prograd": 1,
    "cocoop": 5,
    "maple": 9,
    "ivlp": 6,
    "promptsrc": 6,
    "mmrl": 10,
    "mmrlpp": 17,
}
"""Tensors that each method trains on the tiny model's three layers (two of them for MMRL)."""


def test_every_prompt_method_but_one_is_measured():
    folder = Path(prompts.__file__).parent
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert files - set(SUBJECTS) == {"vpt"}  # its texts don't learn: the image side is IVLP's
    assert set(SUBJECTS) == set(TRAINED)


@pytest.mark.parametrize("name", SUBJECTS)
def test_ours_and_the_plain_path_give_the_same_step(name, backbone):
    case = Case(name, backbone, 5, 3, seed=1)
    ours, plain = case.our_numbers(), case.plain.step()
    assert ours.logits.shape == (3, 10 if "mmrl" in name else 5)  # two branches
    assert len(plain.gradients) == len(case.trained) == TRAINED[name]
    assert all(float(gradient.abs().max()) > 0 for gradient in plain.gradients)
    differences = compare(ours, plain)
    assert set(differences) == {"logits", "loss", "gradient"}
    allowed = 5e-5 if "mmrl" in name else 1e-5  # its logits are 100 times a cosine, and so is their rounding
    assert all(difference.relative < allowed for difference in differences.values())


@pytest.mark.parametrize("name", SUBJECTS)
def test_pieces_give_what_the_whole_gives(name, backbone):
    case = Case(name, backbone, 5, 3)
    differences = compare(case.plain.step(piece=2), case.plain.step())
    assert all(difference.relative < 1e-5 for difference in differences.values())


@pytest.mark.parametrize("name", ["kgcoop", "promptsrc", "mmrl"])
def test_anchors_are_the_hand_written_prompts_features(name, backbone):
    """The plain paths take them from our methods: here they are computed the plain way."""
    case = Case(name, backbone, 3, 2)
    templates = TEACHER_TEMPLATES if name == "promptsrc" else case.method.templates
    total = torch.zeros(3, DIM)
    for template in templates:
        tokens = backbone.tokenize([template.format(word) for word in class_names(3)])
        total += plain_text(backbone.text_tower, tokens.ids, tokens.ends).detach()
    torch.testing.assert_close(case.plain.anchors, F.normalize(total, dim=-1), rtol=1e-5, atol=1e-6)


def test_gradients_in_conflict_are_projected(backbone):
    """Both outcomes of ProGrad's test occur among a few seeds, and ours follows."""
    seen = []
    for seed in range(4):
        case = Case("prograd", backbone, 5, 3, seed=seed)
        plain = case.plain
        images = plain.images(plain.pixels)
        _, losses = plain.losses(images, plain.texts(slice(None), images), plain.labels)
        own, teacher = (torch.autograd.grad(loss, plain.trained, retain_graph=True)[0] for loss in losses)
        seen.append(bool((own * teacher).sum() < 0))
        (given,) = case.our_numbers().gradients
        assert bool((given - own).norm() > 1e-4 * own.norm()) == seen[-1]
        torch.testing.assert_close(given, plain.step().gradients[0], rtol=1e-4, atol=1e-5)
    assert set(seen) == {True, False}


def test_a_wrong_gradient_is_seen(backbone):
    case = Case("coop", backbone, 4, 2)
    numbers = case.our_numbers()
    wrong = compare(numbers._replace(gradients=(numbers.gradients[0] * 1.01,)), case.plain.step())
    row = Row("coop", "x", "s", 1.0, differences=wrong)
    assert wrong["logits"].relative < 1e-5
    assert wrong["gradient"].relative > 1e-3
    assert not row.same_numbers
    assert "NUMBERS DIFFER" in line(row)


def test_step_rows(backbone, monkeypatch):
    monkeypatch.setitem(SUBJECTS, "coop", replace(SUBJECTS["coop"], wanted={3: 30.0}, note="a word"))
    rows = list(time_steps("coop", backbone, SIZES, 2))
    assert [row.extrapolated for row in rows] == [False, False, True]
    assert [row.wanted_ratio for row in rows] == [None, 30.0, None]
    assert [set(row.samples) for row in rows] == [{"ours", "plain"}, {"ours", "plain"}, {"ours"}]
    assert all(row.same_numbers and set(row.differences) == {"logits", "loss", "gradient"} for row in rows)
    two, three, five = (row.plain for row in rows)
    assert five == pytest.approx(three + 2 * (three - two))
    assert rows[0].note == "a word"
    assert "2 and 3" in rows[2].note


def test_memory_rows(backbone, monkeypatch):
    """Steps that a GPU doesn't hold are extrapolated on the plain side, and refused on ours."""
    peaks = {("ours", 2): 1, ("plain", 2): 10, ("ours", 3): 2, ("plain", 3): None, ("ours", 5): 3}

    def peak(name, backbone_name, device, *, side, classes, batch):
        assert (name, backbone_name, device, batch) == ("ivlp", "tiny", "cpu", 2)
        return peaks[side, classes]

    monkeypatch.setattr(training, "peak_in_child", peak)
    rows = list(training.peak_memory("ivlp", backbone, SIZES, 2))
    assert [(row.ours, row.plain, row.extrapolated) for row in rows] == [(1, 10, False), (2, 15, True), (3, 25, True)]
    peaks["ours", 3] = None
    with pytest.raises(ConfigError, match="memory doesn't hold ivlp's step with 3 classes"):
        list(training.peak_memory("ivlp", backbone, SIZES, 2))


def test_a_plain_step_that_the_gpu_does_not_hold_is_extrapolated(backbone, monkeypatch):
    whole = PlainDeep.step

    def step(self, piece=None):
        if piece is None and len(self.ids) > 2:
            raise torch.OutOfMemoryError("too much")
        return whole(self, piece)

    monkeypatch.setattr(PlainDeep, "step", step)
    rows = list(time_steps("ivlp", backbone, SIZES, 2))
    assert [row.extrapolated for row in rows] == [False, True, True]
    assert all(row.same_numbers for row in rows)


def test_what_a_run_measures():
    subject = SUBJECTS["mmrl"]
    assert Sizes.of(subject, Scope()) == Sizes((10, 50, 100, 1000), 100, [4], 3)
    assert Sizes.of(subject, Scope(classes=(10,))).classes == (10,)
    on_gpu = Sizes.of(subject, Scope(device="cuda"))
    assert (on_gpu.batches, on_gpu.most_plain) == ([4, 32, 128], 1000)
    assert Sizes.of(SUBJECTS["coop"], Scope(device="cuda")).batches == [32, 128]
    quick = Sizes.of(subject, Scope(quick=True, classes=(10,)))
    assert (quick.classes, quick.most_plain, quick.rounds) == ((10,), 10, 1)
    with pytest.raises(ConfigError, match="at least one smaller class count"):
        Sizes.of(subject, Scope(classes=(1000,)))


def test_class_names_are_distinct_and_spread():
    assert len(set(class_names(1000))) == 1000
    assert len(set(class_names(100))) == 100
    assert class_names(10)[1] == class_names(100)[10]
    with pytest.raises(ConfigError, match="1001 class names"):
        class_names(1001)


def test_the_plain_path_refuses_what_it_does_not_know(backbone):
    tower = tiny_clip().image_tower
    tower.blocks[0].scale_1 = torch.nn.Parameter(torch.ones(24))
    with pytest.raises(UnsupportedError, match="layer scale"):
        plain_image(tower, torch.zeros(1, 3, 16, 16))
    text = tiny_clip().text_tower
    object.__setattr__(text.shape, "causal", False)
    with pytest.raises(UnsupportedError, match="causal"):
        plain_text(text, torch.zeros(1, 77, dtype=torch.long), torch.tensor([3]), torch.zeros(1, 16))


# --- extraction -------------------------------------------------------------------------------------------------------


def test_extraction_rows():
    backbone = image_only()
    rows = list(measure_extraction(backbone, 5, 1, library=backbone.encode_image))
    assert [row.ratio is not None for row in rows] == [True] * 4
    through, library, half, stored = rows
    assert through.same_numbers
    assert library.same_numbers
    assert 0 < half.differences["features"].relative < 0.1
    assert half.facts["smallest_cosine"] > 0.99
    assert half.met is None
    assert stored.case.startswith("features read")
    assert len(list(measure_extraction(backbone, 2, 1, library=None))) == 3


def test_jpegs_are_files_that_a_split_reads(tmp_path):
    split = make_jpegs(tmp_path, 3)
    assert [split.image(index).size for index in range(3)] == [(400, 300)] * 3
    assert len({(tmp_path / name).read_bytes() for name in split.ids}) == 3
    assert all(10_000 < (tmp_path / name).stat().st_size < 80_000 for name in split.ids)


# --- measuring --------------------------------------------------------------------------------------------------------


def test_differences():
    found = Difference.of_many(
        [torch.tensor([1.0, 2.5]), torch.tensor([0.0])], [torch.tensor([1.0, 2.0]), torch.tensor([0.25])]
    )
    assert found == Difference(0.5, 1.0)  # the second array is off by all of itself
    assert Difference.between(torch.zeros(2), torch.zeros(2)) == Difference(0.0, 0.0)


def test_ratio_and_whether_it_is_met():
    assert Row("x", "", "s", 2.0, 6.0, wanted_ratio=3.0).met is True
    assert Row("x", "", "s", 2.0, 5.0, wanted_ratio=3.0).met is False
    assert Row("x", "", "s", 2.0, wanted_most=1.0).met is False
    assert Row("x", "", "s", 2.0, 6.0).met is None
    assert Row("x", "", "s", 2.0).ratio is None


def test_lines():
    assert on_line({10: 2.0, 100: 11.0, 50: 6.0}, 1000) == pytest.approx(101.0)
    assert on_line({4: 2.0}, 8) == pytest.approx(4.0)
    shown = line(Row("coop", "step", "s", 0.5, 20.0, wanted_ratio=30.0, extrapolated=True, note="a note"))
    assert all(part in shown for part in ("500 ms", "~20 s", "~40x", ">= 30x met", "a note"))
    assert "MISSED" in line(Row("x", "", "s", 2.0, wanted_most=1.0))
    assert "MISSED" not in line(Row("x", "", "s", 2.0, wanted_most=1.0), judged=False)
    assert quantity(3 * 2**30, "bytes") == "3.00 GB"
    assert quantity(3 * 2**20, "bytes") == "3 MB"


def test_sides_take_turns():
    order = []
    samples = time_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 3
    assert {side: len(values) for side, values in samples.items()} == {"a": 3, "b": 3}
    assert medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def test_peak_memory_sees_what_a_run_needs():
    size = 2**28

    def run():
        return bytearray(size).count(1)  # touches every page

    assert 0.9 * size < peak_above(run) < 1.5 * size
    assert peak_above(lambda: None) < 0.1 * size


def test_peak_memory_of_a_started_process_is_its_own():
    """A process inherits `ru_maxrss` from a bigger one that starts it, which would hide its own peak."""
    held = bytearray(2**30)
    assert held.count(1) == 0  # now resident here
    program = "from benchmarks.speed.measure import peak_above; print(peak_above(lambda: bytearray(2**27).count(1)))"
    assert 0.9 * 2**27 < int(run_process([sys.executable, "-c", program])) < 1.5 * 2**27


def test_a_step_by_its_side(backbone):
    case = Case("coop", backbone, 3, 2)
    torch.testing.assert_close(one_step(case, "ours"), one_step(case, "plain").loss, rtol=1e-4, atol=1e-5)


def test_failing_processes_are_told():
    assert run_process(adaptkit_command("--version")).startswith("adaptkit")
    with pytest.raises(ProcessFailedError, match=r"exit code 2.*No such command"):
        run_process(adaptkit_command("runn"))
    with pytest.raises(ProcessFailedError, match="no-such-program"):
        run_process(["no-such-program"])


# --- the whole --------------------------------------------------------------------------------------------------------


def two_benchmarks(monkeypatch, difference):
    def good(load, scope):
        assert load().spec.embed_dim == DIM
        apart = {"logits": Difference(difference, difference)}
        yield Row("good", "step", "s", 0.5, 20.0, differences=apart, samples={"ours": [0.5], "plain": [20.0]})

    def bad(load, scope):
        raise ProcessFailedError("it broke")
        yield

    monkeypatch.setattr(cli, "BENCHMARKS", {"good": good, "bad": bad})
    monkeypatch.setattr(cli, "load_backbone", lambda name, device: tiny_clip())


def test_report_and_exit(monkeypatch, tmp_path):
    two_benchmarks(monkeypatch, 1e-6)
    rows, failed = cli.run_benchmarks(["good", "bad"], tiny_clip, Scope(quick=True), show=lambda text: None)
    assert failed == {"bad": "it broke"}
    write_json(tmp_path / "x.json", cli.report(rows, failed, {"machine": machine_facts(), "quick": True}))
    read = json.loads((tmp_path / "x.json").read_text())
    assert read["schema"] == cli.SCHEMA
    assert set(read) == {"schema", "machine", "quick", "rows", "failed"}
    (row,) = read["rows"]
    assert (row["ratio"], row["met"], row["same_numbers"]) == (40.0, None, True)
    assert row["differences"] == {"logits": {"absolute": 1e-6, "relative": 1e-6}}
    assert row["samples"] == {"ours": [0.5], "plain": [20.0]}
    machine = read["machine"]
    assert machine["threads"] == torch.get_num_threads()
    assert machine["cores"] >= 1
    assert machine["memory_bytes"] > 2**28
    assert machine["versions"]["torch"]


def test_the_program(monkeypatch, tmp_path):
    def run(*arguments):
        done = CliRunner().invoke(cli.main, [*arguments, "--out", str(tmp_path / "new" / "out.json")])
        return done.exit_code, done.output, json.loads((tmp_path / "new" / "out.json").read_text())

    monkeypatch.setattr(cli.main.params[0].type, "choices", ["good", "bad"])
    two_benchmarks(monkeypatch, 1e-6)
    code, shown, written = run("--only", "good")
    assert (code, written["failed"], len(written["rows"])) == (0, {}, 1)
    assert (written["backbone"], written["device"]) == ("ViT-B-16/random", "cpu")
    assert "40x" in shown
    code, shown, written = run()
    assert (code, written["failed"]) == (1, {"bad": "it broke"})
    assert "FAILED: it broke" in shown
    two_benchmarks(monkeypatch, 1e-2)
    code, shown, written = run("--only", "good")
    assert (code, written["rows"][0]["same_numbers"]) == (1, False)
    assert "NUMBERS DIFFER" in shown


def test_which_benchmarks_run(monkeypatch):
    assert cli.chosen([], "cpu") == list(cli.BENCHMARKS)
    assert cli.chosen(["startup", "prompts"], "cpu") == [*SUBJECTS, "startup"]
    assert cli.chosen(["mmrl"], "cpu") == ["mmrl"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(click.UsageError, match="no CUDA GPU"):
        cli.chosen(["mmrl"], "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.chosen([], "cuda") == list(SUBJECTS)
    with pytest.raises(click.UsageError, match="startup is measured on the CPU only"):
        cli.chosen(["startup"], "cuda")
