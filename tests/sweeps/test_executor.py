"""Running sweeps in real processes, ended with real signals, on a disk that is really full."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adaptkit.sweeps.claims import CLAIMS, in_progress
from adaptkit.sweeps.executor import LOG_FILE, run_sweep
from adaptkit.sweeps.plan import make_plan, state_of, states
from adaptkit.sweeps.suite import load_suite, read_suite

PATIENCE = 120  # seconds; the machine may be busy


def plan_for(methods, **content):
    facts = {"name": "test", "methods": methods, "datasets": ["photos"], "shots": [1], "seeds": [1]}
    return make_plan(read_suite({**facts, **content}))


def by_method(plan, out: Path) -> dict[str, str]:
    return {run.spec.method: state_of(out, run.digest) for run in plan.runs}


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it didn't happen"
        time.sleep(0.05)


def leftovers(out: Path) -> list[Path]:
    """Half-made folders, and claims."""
    return [*out.rglob("*.tmp"), *(out / CLAIMS).glob("*"), *(out / "jobs").glob("*")]


@pytest.mark.slow
def test_a_failing_run_does_not_stop_the_others_and_is_tried_again_on_request(bench):
    plan = plan_for(["broken", "zero-shot", "tip-adapter"], seeds=[1, 2])
    said = []
    first = run_sweep(plan, bench.out, jobs=1, progress=lambda *words: said.append(words))
    assert (first.done, len(first.failed), first.left) == (4, 2, 0)
    assert [failure.reason for failure in first.failed] == ["ValueError: the reason of it all"] * 2
    assert first.failed[0].run == "broken on photos, few-shot, 1 shots, seed 1"
    text = (bench.out / "failures" / first.failed[0].traceback).read_text()
    assert "Traceback" in text
    assert "misbehaving.py" in text
    assert said[-1] == ("runs: 2 failed", 6, 6)
    assert leftovers(bench.out) == []
    bench.gate.touch()  # what was wrong is put right
    again = run_sweep(plan, bench.out, jobs=1)
    assert (again.done, again.before, len(again.failed)) == (0, 4, 2)  # not without being asked
    retried = run_sweep(plan, bench.out, jobs=1, retry=True)
    assert (retried.done, retried.before, retried.failed, retried.left) == (2, 4, [], 0)
    assert list((bench.out / "failures").glob("*")) == []
    assert (bench.out / LOG_FILE).read_text() == ""  # workers are quiet


def test_a_killed_worker_costs_nothing_that_was_done(bench):
    """`kill -9`, in the middle of a run that does well the second time."""
    plan = plan_for(["zero-shot", "dying-once"])
    summary = run_sweep(plan, bench.out, jobs=1)
    assert bench.gate.exists()
    assert (summary.done, summary.left, summary.failed, summary.stopped) == (2, 0, [], "")
    assert leftovers(bench.out) == []
    assert (bench.out / LOG_FILE).read_text() == ""  # workers are quiet


@pytest.mark.slow
def test_the_run_that_kills_its_workers_is_found_among_others(bench):
    """`kill -9`, twice: of a run that does well the second time, and of one that never does."""
    plan = plan_for(["zero-shot", "dying", "dying-once", "tip-adapter"])
    summary = run_sweep(plan, bench.out, jobs=2)
    assert by_method(plan, bench.out) == {
        "zero-shot": "done",
        "dying": "failed",
        "dying-once": "done",
        "tip-adapter": "done",
    }
    assert (summary.left, summary.stopped) == (0, "")
    [failure] = summary.failed
    assert "ended twice from outside" in failure.reason
    assert leftovers(bench.out) == []


# --- a sweep that is ended -------------------------------------------------------------------------------------------

COMMAND = "import sys; sys.argv[0] = 'adaptkit'; from adaptkit.commands.main import main; main()"
WAITS = "methods: [zero-shot, waiting]\ndatasets: [photos]\nshots: [1]\nseeds: [1]\n"


@contextlib.contextmanager
def sweeping(bench, *words: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", COMMAND, "sweep", "run", "suite.yaml", "--out", "out", "--jobs", "1", *words]
    with open(bench.root / "printed", "wb") as printed:
        process = subprocess.Popen(
            command,
            cwd=bench.root,
            env=bench.environment,
            stdout=printed,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # pytest-xdist's workers ignore Ctrl-C
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            facts = entry.read_text().rpartition(")")[2].split()
            if int(facts[1]) == pid:
                found.append(int(entry.parent.name))
    return found


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes through /proc")
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, id="kill -9", marks=pytest.mark.slow),
    ],
)
def test_a_sweep_that_is_ended_goes_on_where_it_was(bench, number):
    plan = make_plan(load_suite(bench.suite(WAITS)))
    waiting = next(run.digest for run in plan.runs if run.spec.method == "waiting")
    with sweeping(bench) as process:
        until(lambda: waiting in in_progress(bench.out))
        workers = children(process.pid)
        assert workers
        process.send_signal(number)
        code = process.wait(PATIENCE)
    until(lambda: not any(map(alive, workers)))
    printed = (bench.root / "printed").read_text()
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 1), printed
    assert "Traceback" not in printed
    if number != signal.SIGKILL:
        assert "the same command goes on from there" in printed
        assert leftovers(bench.out) == []
    assert by_method(plan, bench.out) == {"zero-shot": "done", "waiting": "missing"}
    bench.gate.touch()
    summary = run_sweep(plan, bench.out, jobs=1)
    assert (summary.done, summary.before, summary.left, summary.failed) == (1, 1, 0, [])
    assert leftovers(bench.out) == []


@pytest.mark.slow
def test_a_worker_killed_from_outside(bench):
    """The worker's process is killed while a run is in progress; the sweep goes on and ends well."""
    plan = make_plan(load_suite(bench.suite(WAITS)))
    waiting = next(run.digest for run in plan.runs if run.spec.method == "waiting")
    with sweeping(bench) as process:
        until(lambda: waiting in in_progress(bench.out))
        for pid in children(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        bench.gate.touch()
        assert process.wait(PATIENCE) == 0, (bench.root / "printed").read_text()
    assert set(by_method(plan, bench.out).values()) == {"done"}


# --- one folder, several sweeps ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_sweeps_on_one_folder_share_the_runs(bench):
    plan = plan_for(["zero-shot", "waiting"], seeds=[1, 2])
    found = {}

    def sweep(name: str) -> None:
        found[name] = run_sweep(plan, bench.out, jobs=1)

    threads = [threading.Thread(target=sweep, args=(name,)) for name in ("one", "other")]
    for thread in threads:
        thread.start()
    until(lambda: len(in_progress(bench.out)) == 2)  # each waits in a run of its own
    bench.gate.touch()
    for thread in threads:
        thread.join(PATIENCE)
    assert set(states(plan, bench.out).values()) == {"done"}
    assert found["one"].done + found["other"].done == 4  # none was done twice
    assert found["one"].left == found["other"].left == 0
    assert leftovers(bench.out) == []


@pytest.mark.slow
def test_corrupt_results_are_done_again(bench):
    plan = plan_for(["zero-shot"], seeds=[1, 2])
    run_sweep(plan, bench.out, jobs=1)
    before = {run.digest: (bench.out / run.place / "result.json").read_bytes() for run in plan.runs}
    (bench.out / plan.runs[0].place / "result.json").write_bytes(before[plan.runs[0].digest][:200])
    assert list(states(plan, bench.out).values()) == ["damaged", "done"]
    summary = run_sweep(plan, bench.out, jobs=1)
    assert (summary.done, summary.before) == (1, 1)
    assert set(states(plan, bench.out).values()) == {"done"}
    assert (bench.out / plan.runs[1].place / "result.json").read_bytes() == before[plan.runs[1].digest]


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of half a megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True, timeout=30).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True, timeout=30)


@pytest.mark.slow
def test_a_full_disk_stops_the_sweep_and_loses_nothing(bench, small_disk):
    plan = plan_for(["large", "zero-shot", "tip-adapter"])  # "large" learns four megabytes
    out = small_disk / "out"
    summary = run_sweep(plan, out, jobs=1)
    assert "the disk is full" in summary.stopped
    assert "run it again" in summary.stopped
    assert (summary.done, summary.failed, summary.left) == (0, [], 3)  # it is no fault of the run
    assert leftovers(out) == []
    rest = plan_for(["zero-shot", "tip-adapter"])
    assert run_sweep(rest, out, jobs=1).done == 2  # there is room for these
    assert by_method(plan, out) == {"large": "missing", "zero-shot": "done", "tip-adapter": "done"}


# --- other executors --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_any_backend_of_joblib_works(bench):
    from joblib import parallel_config

    plan = plan_for(["zero-shot", "tip-adapter", "broken"])
    with parallel_config(backend="loky"):
        summary = run_sweep(plan, bench.out, executor="joblib", jobs=2)
    assert (summary.done, len(summary.failed), summary.left) == (2, 1, 0)


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes(bench):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        plan = plan_for(["zero-shot", "tip-adapter", "dying-once", "dying"], seeds=[1, 2])
        summary = run_sweep(plan, bench.out, executor="ray", address=cluster.address, jobs=2)
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
        assert (summary.done, summary.left, summary.stopped) == (6, 0, "")
        assert sorted(failure.run.split()[0] for failure in summary.failed) == ["dying"] * 2
        assert leftovers(bench.out) == []
    finally:
        ray.shutdown()
        cluster.shutdown()
