"""Images of many requests, answered together: one thread runs the model, a batch at a time."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptkit.errors import AdaptKitError

Answer = Callable[[Tensor, Sequence[tuple[str, ...]]], Sequence[Any]]
"""From pixels [batch, 3, size, size], and the adapters each image is for, to an answer per image."""

Watch = Callable[[int, float], None]
"""Told of each batch: its images, and its seconds."""


class BusyError(AdaptKitError, RuntimeError):
    """More images than may wait; some are answered soon."""


@dataclass(frozen=True)
class _Job:
    pixels: Tensor
    names: tuple[str, ...]
    done: Future[Any] = field(default_factory=Future)


class Batcher:
    """Gathers images and has them answered together, in the order in which they came.

    A batch is as large as what waits when the model gets free, and waits itself only for images that are on their way
    (between `room` and `submit`), so a lone request isn't held up.

    Args:
        answer: Runs the model; called in one thread only.
        batch: Images at once, at most.
        wait: Seconds that a batch waits for images on their way, at most.
        waiting: Images that may have room at once.
        watch: Told of each batch.
    """

    def __init__(
        self,
        answer: Answer,
        *,
        batch: int = 32,
        wait: float = 0.01,
        waiting: int = 256,
        watch: Watch = lambda images, seconds: None,
    ) -> None:
        self._answer, self._watch = answer, watch
        self._batch, self._wait, self._most = batch, wait, waiting
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._inside = 0  # images that have room
        self._coming = 0  # those of them that weren't submitted yet
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="adaptkit-encoder", daemon=True)
        self._thread.start()

    @property
    def inside(self) -> int:
        """Images that have room now: being decoded, waiting, or being answered."""
        return self._inside

    @contextmanager
    def room(self, images: int) -> Iterator[Callable[[Tensor, tuple[str, ...]], Future[Any]]]:
        """Room for some images; within it, each is handed in by the function that this gives.

        Raises:
            BusyError: Too many others have room, or the batcher was closed.
        """
        with self._lock:
            if self._closed or self._inside + images > self._most:
                raise BusyError("The server is busy: ask again in a moment.")
            self._inside += images
            self._coming += images
        left = images

        def submit(pixels: Tensor, names: tuple[str, ...]) -> Future[Any]:
            nonlocal left
            job = _Job(pixels, names)
            with self._lock:
                left -= 1
                self._coming -= 1
                self._jobs.put(job)
            return job.done

        try:
            yield submit
        finally:
            with self._lock:
                self._inside -= images
                self._coming -= left

    def close(self) -> None:
        """Answer what was submitted, then stop."""
        with self._lock:
            self._closed = True
            self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._jobs.get()) is not None:
            gathered, last = self._gather(first)
            # whoever doesn't wait any more has cancelled
            jobs = [job for job in gathered if job.done.set_running_or_notify_cancel()]
            if jobs:
                self._run(jobs)
            if last:
                return

    def _gather(self, first: _Job) -> tuple[list[_Job], bool]:
        """A batch, and whether it is the last one."""
        jobs, until = [first], time.monotonic() + self._wait
        while len(jobs) < self._batch:
            left = until - time.monotonic() if self._coming > 0 else 0.0
            try:
                job = self._jobs.get(timeout=left) if left > 0 else self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                return jobs, True
            jobs.append(job)
        return jobs, False

    def _run(self, jobs: list[_Job]) -> None:
        started = time.perf_counter()
        try:
            answers = self._answer(torch.stack([job.pixels for job in jobs]), [job.names for job in jobs])
            if len(answers) != len(jobs):
                raise ValueError(f"{len(jobs)} images got {len(answers)} answers")
            self._watch(len(jobs), time.perf_counter() - started)
        except BaseException as error:  # whatever it is belongs to those who wait, and this thread goes on
            for job in jobs:
                job.done.set_exception(error)
            return
        for job, answer in zip(jobs, answers, strict=True):
            job.done.set_result(answer)
