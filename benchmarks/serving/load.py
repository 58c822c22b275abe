"""Requests at a server from many clients at once, and what came of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from io import BytesIO

import httpx
import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Outcome:
    """What came of a load.

    Args:
        seconds: From the first request to the last answer.
        statuses: Answers by status; "lost" counts requests without one, "wrong" answers that don't fit the question.
        latencies: Seconds of each request, sorted.
    """

    seconds: float
    statuses: dict[str, int]
    latencies: list[float]

    def percentile(self, share: float) -> float:
        """Seconds within which a share of the requests was answered."""
        return self.latencies[min(len(self.latencies) - 1, int(share * len(self.latencies)))]


def photographs(count: int, side: int) -> list[bytes]:
    """JPEG files of smooth noise, which compress about as photographs do."""
    numbers = np.random.default_rng(0)
    found = []
    for _ in range(count):
        small = Image.fromarray(numbers.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        out = BytesIO()
        small.resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        found.append(out.getvalue())
    return found


def press(url: str, names: list[str], photos: list[bytes], requests: int, clients: int) -> Outcome:
    """Ask about an image in each of `requests` requests, adapters in turn, `clients` at a time."""
    return asyncio.run(_press(url, names, photos, requests, clients))


async def _press(url: str, names: list[str], photos: list[bytes], requests: int, clients: int) -> Outcome:
    statuses: Counter[str] = Counter()
    latencies: list[float] = []
    left = iter(range(requests))

    async def client(session: httpx.AsyncClient) -> None:
        for place in left:  # shared by all clients: whoever is free takes the next
            started = time.perf_counter()
            name, photo = names[place % len(names)], photos[place % len(photos)]
            try:
                answer = await session.post(
                    f"{url}/predict", params={"adapter": name, "top": 1}, files={"images": ("a.jpg", photo)}
                )
            except httpx.HTTPError:
                statuses["lost"] += 1
                continue
            latencies.append(time.perf_counter() - started)
            fits = answer.status_code != 200 or [one["adapter"] for one in answer.json()["predictions"]] == [name]
            statuses[str(answer.status_code) if fits else "wrong"] += 1

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=120, limits=limits) as session:
        started = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        seconds = time.perf_counter() - started
    return Outcome(seconds, dict(statuses), sorted(latencies))
