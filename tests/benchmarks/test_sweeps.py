"""The benchmark of sweeps, at tiny sizes; counts are asserted, times are not."""

from __future__ import annotations

from benchmarks.sweeps.__main__ import PARTS, judged, measure
from benchmarks.sweeps.measure import QUICK


def test_every_view_is_encoded_once_and_all_parts_are_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTKIT_CACHE", str(tmp_path / "cache"))
    found = measure(QUICK, PARTS, tmp_path)
    sharing = found["sharing"]
    assert sharing["runs"] == 2 * 2 * 2
    assert sharing["encoded_by_sweep"] == sharing["image_views"] > 0
    assert sharing["own_seconds"] > 0
    assert found["overhead"]["runs"] == QUICK.runs
    assert found["overhead"]["memory_bytes"][0] > 0
    assert (found["reading"]["files"], found["reading"]["damaged"]) == (QUICK.files, 0)
    verdicts = judged(found)
    assert len(verdicts) == 5
    assert verdicts["each view encoded once"]


def test_what_is_missed_is_seen():
    times = {"wall": 20.0, "cpu": 5.0}
    found = {
        "sharing": {"encoded_by_sweep": 11, "image_views": 10, "ratio": 1.3},
        "overhead": {"overhead_ms": 51.0, "memory_growth_bytes": 2**30},
        "reading": {"files": 10_000, "seconds": times},
    }
    assert list(judged(found).values()) == [False] * 5
    assert judged({"reading": {"files": 20_000, "seconds": times}}) == {"10,000 files in 10 s": True}
