"""What a server counts, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server.

    Args:
        inside: Images in the server now.
    """

    def __init__(self, inside: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        path = ["path"]
        self.requests = Counter("adaptkit_requests", "Requests answered.", [*path, "status"], registry=registry)
        self.seconds = Histogram("adaptkit_request_seconds", "Seconds to an answer.", path, registry=registry)
        self.images = Counter("adaptkit_images", "Images answered, by adapter.", ["adapter"], registry=registry)
        self.batches = Histogram(
            "adaptkit_batch_images", "Images encoded at once.", buckets=_BATCHES, registry=registry
        )
        self.batch_seconds = Histogram("adaptkit_batch_seconds", "Seconds of a batch.", registry=registry)
        Gauge("adaptkit_images_inside", "Images being worked on.", registry=registry).set_function(inside)

    def batch(self, images: int, seconds: float) -> None:
        """Count a batch."""
        self.batches.observe(images)
        self.batch_seconds.observe(seconds)

    def answered(self, names: Sequence[str], images: int) -> None:
        """Count images that were answered by each of some adapters."""
        for name in names:
            self.images.labels(name).inc(images)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


class Counting:
    """Counts requests by path and status around an app; paths that aren't the app's own are one."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - started)
