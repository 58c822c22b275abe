"""Plans: keys that name runs, what is done, and everything wrong with data and settings said at once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from adaptkit.errors import ConfigError
from adaptkit.sweeps.costs import Probe, distinct_views, estimate
from adaptkit.sweeps.plan import counted, make_plan, states
from adaptkit.sweeps.results import RunRecord
from adaptkit.sweeps.suite import read_suite
from tests.sweeps.made import made_result, write_result


def planned(**content):
    facts = {"name": "small", "methods": ["zero-shot"], "datasets": ["digits"], "shots": [1], "seeds": [1]}
    return make_plan(read_suite({**facts, **content}))


def test_keys_cover_what_changes_a_result():
    plain = {"methods": ["tip-adapter"]}
    changes = [
        {},
        {"shots": [2]},
        {"seeds": [2]},
        {"protocols": ["base-to-novel"]},
        {"methods": ["linear-probe"]},
        {"methods": [{"name": "tip-adapter", "set": ["alpha_steps=3"]}]},
        {"set": ["beta_steps=3"]},
        {"precision": "bf16"},
        {"datasets": ["textures"]},
        {"datasets": [{"dataset": "digits", "templates": ["the number {}"]}]},
        {"task": {"sampler": "tip"}},
    ]
    digests = [planned(**{**plain, **change}).runs[0].digest for change in changes]
    assert len(set(digests)) == len(changes) == 11
    assert planned(**plain).runs[0].digest == digests[0]  # the same on every call


def test_everything_wrong_is_collected(bench):
    with pytest.raises(ConfigError) as caught:
        planned(
            methods=[{"name": "coop", "set": ["training.epoch=3"]}, "cupl"],
            datasets=["photos", "digitts", "caltech101", {"dataset": "others", "descriptions": "nowhere.json"}],
            shots=[1, 500],
            backbones=["mini", "no-such-backbone/x"],
        )
    message = str(caught.value)
    for part in ("training.epoch", "'digitts'", "'digits'", "caltech101", "nowhere.json", "no-such-backbone", "500"):
        assert part in message, part
    assert "cupl can't run on photos with mini: it needs descriptions" in message
    assert not (bench.root / "out").exists()


def test_words_leave_out_what_cannot_work(bench):
    plan = planned(methods=["feature-level"], datasets=["photos"])
    methods = {run.spec.method for run in plan.runs}
    assert "zero-shot" in methods
    assert not methods & {"cupl", "dclip"}
    [note] = plan.notes
    assert note.startswith("left out on photos: cupl, dclip")
    assert "needs descriptions" in note


def test_methods_that_ask_a_language_model_are_left_out_on_a_clip():
    plan = planned(methods=["all"])
    assert not {run.spec.method for run in plan.runs} & {"mllm-lora", "vladva", "twin"}
    [note] = [note for note in plan.notes if "language model" in note]
    assert note.startswith("left out on digits: dive-k, fromage, ")
    with pytest.raises(ConfigError, match="mllm-lora can't run on digits with mini: it needs a multimodal"):
        planned(methods=["mllm-lora"])


def test_a_clip_stands_beside_every_language_model():
    """Fairness rule 3 of the sheet `base-to-novel.md`."""

    def rows(**content):
        plan = planned(**{"methods": ["mllm-zero-shot"], "backbones": ["mini-mllm"], **content})
        return sorted((run.key.method, run.key.backbone, run.key.seed) for run in plan.runs)

    alone = [("mllm-zero-shot", "mini-mllm", 1)]
    both = [("clip-adapter", "mini", 1), *alone, ("zero-shot", "mini", 1)]
    assert rows() == both
    assert rows(include=[{"methods": ["zero-shot"], "backbones": ["mini"]}]) == both  # named as well: once
    assert rows(methods=["zero-shot"]) == [*both[:1], *both[2:], ("zero-shot", "mini-mllm", 1)]  # on its features
    assert rows(clip_backbone="none") == alone
    assert len(rows(seeds=[1, 2])) == 6
    with pytest.raises(ConfigError, match="no-such"):
        rows(clip_backbone="no-such/x")
    with pytest.raises(ConfigError, match="clip_backbone 'mini-mllm' is a multimodal language model itself"):
        rows(clip_backbone="mini-mllm")


def test_nothing_left_is_said():
    with pytest.raises(ConfigError, match="leave out everything"):
        planned(exclude=[{"datasets": ["digits"]}])


def test_states(tmp_path):
    plan = planned(seeds=[1, 2, 3, 4, 5])
    first, second, third, fourth, _ = plan.runs
    for run in (first, second, third):
        write_result(tmp_path, replace(made_result(), key=run.key, key_digest=run.digest))
    (tmp_path / second.place / "result.json").write_text("{")
    early = json.loads((tmp_path / third.place / "result.json").read_text())
    (tmp_path / third.place / "result.json").write_text(json.dumps({**early, "fit": {"interrupted": True}}))
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / f"{fourth.digest}.json").write_text("{}")
    found = states(plan, tmp_path)
    assert list(found.values()) == ["done", "damaged", "damaged", "failed", "missing"]
    [row] = counted(plan, found)
    assert (row["runs"], row["done"], row["damaged"], row["failed"], row["missing"]) == (5, 1, 2, 1, 1)


def test_costs_come_from_earlier_runs_where_there_are_some(tmp_path):
    plan = planned(methods=["tip-adapter", "zero-shot"], seeds=[1, 2])
    probes = {"default": Probe(seconds=0.001, dim=512, bytes=10_000_000)}
    views = distinct_views(plan.runs)
    tip = next(run for run in plan.runs if run.spec.method == "tip-adapter")
    assert tip.size.views > 0
    assert views == {"default": tip.size.test + 2 * tip.size.train * (1 + tip.size.views)}  # each view once, by seed
    rough = estimate(plan.runs, [], probes)
    assert (rough.runs, rough.measured) == (4, 0)
    assert "rough model" in rough.basis
    earlier = replace(made_result(), seconds={"features": 50.0, "fit": 3.0, "evaluate": 1.0}, peak_memory_bytes=10**10)
    known = estimate(plan.runs, [RunRecord(tmp_path, earlier)], probes)
    assert (known.measured, known.memory_bytes) == (2, 1e10)
    assert known.encoding_seconds == pytest.approx(views["default"] * 0.001)
    assert known.seconds - rough.seconds == pytest.approx(2 * (4.0 - 0.2))
