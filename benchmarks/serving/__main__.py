"""`python -m benchmarks.serving`: a server under load on loopback, against the bare batched encoder.

Two parts. Throughput: with a large backbone, images per second through the server and through the encoder alone on
ready pixels in batches of the same size, in turns. Endurance: with `mini`, ten thousand requests, of which none may be
lost, while the server's memory stays where it was.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import click
import torch

from adaptkit.backbones.base import Backbone
from adaptkit.backbones.load import load_backbone
from adaptkit.methods.adapter import save_adapter
from adaptkit.storage import write_json
from benchmarks.adapter_set.__main__ import KINDS, make_adapter
from benchmarks.serving.load import photographs, press
from benchmarks.serving.processes import served
from benchmarks.speed.measure import machine_facts

RESULT = Path(__file__).parent / "result.json"
WANTED = 0.85
GROWTH = 0.05
CLASSES = 100


def save_adapters(backbone: Backbone, folder: Path) -> list[str]:
    """An adapter of each kind; their names."""
    names = tuple(f"class {index}" for index in range(CLASSES))
    for seed, kind in enumerate(KINDS):
        save_adapter(folder / kind, make_adapter(backbone, kind, names, seed))
    return sorted(KINDS)


@torch.inference_mode()
def bare(backbone: Backbone, batch: int, batches: int) -> tuple[float, float]:
    """Images per second of the encoder alone, by the clock and by this process's own time."""
    side = backbone.spec.preprocessing.image_size
    pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    started, used = time.perf_counter(), time.process_time()
    for _ in range(batches):
        backbone.encode_image(pixels)
    images = batch * batches
    return images / (time.perf_counter() - started), images / (time.process_time() - used)


def throughput(name: str, batch: int, images: int, rounds: int) -> dict[str, Any]:
    """Images per second through the server and through the encoder alone, in turns.

    By the clock, and by the processor time of the process that encodes: where neighbours share the processor, the clock
    favours the server, which with its clients is two processes.
    """
    backbone = load_backbone(name)
    photos = photographs(32, backbone.spec.preprocessing.image_size)
    ours, plain, cpu_ratios, latencies, statuses = [], [], [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        names = save_adapters(backbone, Path(folder))
        with served(folder, "--batch-size", batch, "--timeout", 120, OMP_NUM_THREADS=str(torch.get_num_threads())) as (
            process,
            facts,
        ):
            press(facts["url"], names, photos, 2 * batch, 2 * batch)
            bare(backbone, batch, 1)
            for _ in range(rounds):
                by_clock, by_processor = bare(backbone, batch, max(1, images // batch))
                used = cpu_seconds(process.pid)
                outcome = press(facts["url"], names, photos, images, 2 * batch)
                cpu_ratios.append(images / (cpu_seconds(process.pid) - used) / by_processor)
                plain.append(by_clock)
                ours.append(images / outcome.seconds)
                latencies.append(outcome.percentile(0.5))
                statuses = outcome.statuses
                click.echo(f"{ours[-1]:.2f} images/s served, {plain[-1]:.2f} bare", err=True)
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    return {
        "backbone": name,
        "batch": batch,
        "clients": 2 * batch,
        "images": images,
        "images_per_second": statistics.median(ours),
        "bare_images_per_second": statistics.median(plain),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "cpu_ratio": statistics.median(cpu_ratios),
        "cpu_ratios": cpu_ratios,
        "median_latency": statistics.median(latencies),
        "statuses": statuses,
    }


def endurance(requests: int, clients: int) -> dict[str, Any]:
    """Answers by status, and the server's resident memory between parts of the load."""
    parts = 10
    memory, statuses, seconds = [], {}, 0.0
    photos = photographs(32, 224)
    with tempfile.TemporaryDirectory() as folder:
        names = save_adapters(load_backbone("mini"), Path(folder))
        with served(folder, OMP_NUM_THREADS=str(torch.get_num_threads())) as (process, facts):
            press(facts["url"], names, photos, max(clients, requests // parts), clients)  # buffers get their size
            for _ in range(parts):
                memory.append(resident(process.pid))
                outcome = press(facts["url"], names, photos, requests // parts, clients)
                seconds += outcome.seconds
                for status, count in outcome.statuses.items():
                    statuses[status] = statuses.get(status, 0) + count
            memory.append(resident(process.pid))
    return {
        "backbone": "mini",
        "requests": requests // parts * parts,
        "clients": clients,
        "requests_per_second": requests // parts * parts / seconds,
        "statuses": statuses,
        "memory_bytes": memory,
        "memory_growth": memory[-1] / memory[0] - 1,
    }


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@click.command()
@click.option("--backbone", default="ViT-B-16/random", show_default=True, help="Of the throughput.")
@click.option("--batch", default=16, show_default=True)
@click.option("--images", default=192, show_default=True, help="Of a round.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--requests", default=10_000, show_default=True, help="Of the endurance.")
@click.option("--clients", default=16, show_default=True, help="Of the endurance.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULT, show_default=True)
def main(backbone: str, batch: int, images: int, rounds: int, requests: int, clients: int, out: Path) -> None:
    """Exits 1 where throughput is below 85 % of the bare encoder's, a request is lost, or memory grows by 5 %."""
    facts = machine_facts()
    lasting = endurance(requests, clients)
    through = throughput(backbone, batch, images, rounds)
    write_json(out, {"schema": 1, "machine": facts, "throughput": through, "endurance": lasting})
    click.echo(
        f"{through['images_per_second']:.2f} images/s served, {through['bare_images_per_second']:.2f} bare:"
        f" {through['ratio']:.3f} of it, {through['cpu_ratio']:.3f} by processor time (at least {WANTED} wanted)\n"
        f"{lasting['requests']} requests: {lasting['statuses']}, memory grew by {100 * lasting['memory_growth']:.1f} %"
    )
    complete = lasting["statuses"] == {"200": lasting["requests"]} and through["statuses"] == {"200": images}
    if min(through["ratio"], through["cpu_ratio"]) < WANTED or not complete or lasting["memory_growth"] > GROWTH:
        raise SystemExit(1)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # that weights are random is meant
    logging.disable(logging.WARNING)
    main()
