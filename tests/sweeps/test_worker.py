"""One worker, in this process: what it keeps, what it takes, what it writes down; and claims."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from functools import partial

import pytest

from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.data import sources
from adaptkit.evaluation import stored
from adaptkit.evaluation.results import read_run
from adaptkit.sweeps import worker
from adaptkit.sweeps.claims import Claim, abandoned, in_progress
from adaptkit.sweeps.plan import make_plan, place_of, states
from adaptkit.sweeps.suite import read_suite
from adaptkit.sweeps.worker import Job, Worker, WorkerSettings, is_full, jobs_file
from adaptkit.training.checkpoints import Checkpoints


def plan_for(methods, **content):
    facts = {"name": "test", "methods": methods, "datasets": ["photos"], "shots": [1], "seeds": [1]}
    return make_plan(read_suite({**facts, **content}))


@pytest.fixture
def do(bench):
    """Do a plan in this process; returns the outcomes."""

    def work(plan):
        with jobs_file(bench.out, [Job(run.digest, run.spec) for run in plan.runs]) as jobs:
            worker = Worker(WorkerSettings(str(bench.out), jobs, "cpu"))
            outcomes = list(iter(worker.next, None))
            worker.close()
        return outcomes

    return work


def test_backbone_datasets_and_views_are_loaded_once(bench, do, monkeypatch):
    plan = plan_for(
        ["zero-shot", "tip-adapter", "linear-probe"], datasets=["photos", "others"], shots=[1, 2], seeds=[1, 2]
    )
    counts = {"backbones": 0, "pixels": 0, "folders": 0}

    def counting(what, plain, size=lambda *args, **said: 1):
        def counted(*args, **said):
            counts[what] += size(*args, **said)
            return plain(*args, **said)

        return counted

    monkeypatch.setattr(stored, "load_backbone", counting("backbones", stored.load_backbone))
    monkeypatch.setattr(
        DualEncoder, "encode_image", counting("pixels", DualEncoder.encode_image, lambda tower, pixels: len(pixels))
    )
    monkeypatch.setattr(sources, "_find_folder", counting("folders", sources._find_folder))
    outcomes = do(plan)
    assert [outcome.state for outcome in outcomes] == ["done"] * 3 * 2 * 2 * 2
    assert counts["backbones"] == 1
    assert counts["folders"] == 2 * 2  # a folder's own split depends on the shots
    assert counts["pixels"] == sum(outcome.images_encoded for outcome in outcomes)
    again = do(plan_for(["zero-shot", "tip-adapter"], datasets=["photos"], seeds=[1]))
    assert again == []  # nothing is left to do


def test_failures_are_written_down_and_others_go_on(bench, do):
    plan = plan_for(["broken", "zero-shot"])
    outcomes = {outcome.state: outcome for outcome in do(plan)}
    assert set(outcomes) == {"failed", "done"}
    assert outcomes["failed"].reason == "ValueError: the reason of it all"
    assert sorted(states(plan, bench.out).values()) == ["done", "failed"]
    assert do(plan) == []  # a failed run waits for `retry`


def test_data_that_changed_since_the_plan_is_a_failure(bench, do):
    plan = plan_for(["zero-shot"])
    (bench.root / "photos" / "oak" / "0.png").rename(bench.root / "photos" / "oak" / "new.png")
    [outcome] = do(plan)
    assert outcome.state == "failed"
    assert "plan it again" in outcome.reason


def test_a_full_disk_is_no_failure_of_the_run(bench, do, monkeypatch):
    import adaptkit.evaluation.results as results

    def full(*args, **said):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results, "write_run", full)
    plan = plan_for(["zero-shot"])
    [outcome] = do(plan)
    assert outcome.state == "no-space"
    assert list(states(plan, bench.out).values()) == ["missing"]
    assert is_full(OSError(errno.EDQUOT, "quota")) and not is_full(ValueError("other"))  # noqa: PT018


DIGEST = "ab" * 32


def test_a_claim_is_held_until_it_is_given_back(tmp_path):
    claim = Claim.take(tmp_path, DIGEST)
    assert claim is not None
    assert Claim.take(tmp_path, DIGEST) is None
    assert in_progress(tmp_path) == {DIGEST}
    assert abandoned(tmp_path) == []
    claim.release()
    assert in_progress(tmp_path) == set()
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_dead_process_keeps_no_claim_and_its_half_made_folder_goes(tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom adaptkit.sweeps.claims import Claim\n"
        f"assert Claim.take(Path(sys.argv[1]), {DIGEST!r})\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=120)
    assert done.returncode == -9
    half = (tmp_path / place_of(DIGEST)).parent / f".{DIGEST[:48]}.123.abcd.tmp"
    for number in range(2):
        half.mkdir(parents=True)
        (half / "result.json").write_text("{}")
        if number == 0:
            assert in_progress(tmp_path) == set()
            claim = Claim.take(tmp_path, DIGEST)  # taken over
            assert claim is not None
            assert not half.exists()
            os.close(claim._handle)  # as the system does for a dead process
        else:
            assert abandoned(tmp_path) == [DIGEST]
            assert not half.exists()
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_training_that_was_cut_off_goes_on(bench, do, monkeypatch):
    plan = plan_for(["coop"])
    monkeypatch.setattr(worker, "Checkpoints", partial(Checkpoints, every=0))
    write, written = Checkpoints.write, []

    def until_the_end(self, facts, tensors):
        write(self, facts, tensors)
        written.append(facts.steps)
        if len(written) == 3:
            raise SystemExit  # the process ends

    monkeypatch.setattr(Checkpoints, "write", until_the_end)
    with pytest.raises(SystemExit):
        do(plan)
    digest = plan.runs[0].digest
    assert len(list((bench.out / worker.UNFINISHED / digest).iterdir())) == 2
    assert [outcome.state for outcome in do(plan)] == ["done"]
    result = read_run(bench.out / place_of(digest))
    assert result.fit["resumed_at"] == written[2]
    assert any(f"gone on with after step {written[2]}" in warning for warning in result.warnings)
    assert not (bench.out / worker.UNFINISHED / digest).exists()
