"""The HTTP interface of a shelf of adapters, as an ASGI app."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import anyio
import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Query
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from numpy.typing import NDArray
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response

from adaptkit import __version__
from adaptkit.errors import ConfigError, DataError, UnknownNameError
from adaptkit.evaluation.calibration import warning_about
from adaptkit.serving.batching import Batcher, BusyError
from adaptkit.serving.hosts import LocalOnly
from adaptkit.serving.limits import Limits
from adaptkit.serving.metrics import Counting, Metrics
from adaptkit.serving.reading import FIELD, Sent, read_images
from adaptkit.serving.shelf import Listed, Shelf

MOST_ADAPTERS = 16
"""Adapters that one request may ask."""

Label = str | int | bool


class Problem(BaseModel):
    """Why a request was refused, in a sentence."""

    error: str


class Health(BaseModel):
    """That the server answers."""

    status: str
    adaptkit_version: str
    adapters: int


class Summary(BaseModel):
    """An adapter."""

    name: str
    method: str
    classes: int
    calibrated: bool


class Card(Summary):
    """An adapter with all that its folder says."""

    labels: list[Label]
    templates: list[str]
    backbone: str
    digest: str
    facts: dict[str, Any]
    card: str


class Adapters(BaseModel):
    """All adapters."""

    adapters: list[Summary]


class Odds(BaseModel):
    """A class with its probability."""

    label: Label
    probability: float


class Prediction(BaseModel):
    """What an adapter says about an image: its place in the request, and its likeliest classes first."""

    image: int
    file: str | None
    adapter: str
    classes: list[Odds]
    abstains: bool
    labels: list[Label] | None


class Predictions(BaseModel):
    """A prediction per image and adapter, and what to know about the coverage that was asked for."""

    predictions: list[Prediction]
    warnings: list[str]


_Responses = dict[int | str, dict[str, Any]]
_REFUSALS: _Responses = {
    408: {"model": Problem, "description": "The body didn't arrive in time"},
    413: {"model": Problem, "description": "Too many bytes or images"},
    415: {"model": Problem, "description": "Another content type"},
    422: {"model": Problem, "description": "Something that can't be used"},
    404: {"model": Problem, "description": "No such adapter"},
    400: {"model": Problem, "description": "Not a request"},
    503: {"model": Problem, "description": "Busy; ask again"},
}


def create_app(
    shelf: Shelf, limits: Limits | None = None, *, token: str | None = None, hosts: Collection[str] | None = None
) -> FastAPI:
    """An app that answers with the adapters of a shelf.

    Args:
        shelf: The adapters.
        limits: What is accepted.
        token: What requests must bring as bearer token (`/health` needs none); None lets everyone in.
        hosts: Names that the server answers to, for one that only this machine can reach; None for any.
    """
    service = _Service(shelf, limits or Limits())
    app = FastAPI(
        title="adaptkit",
        version=__version__,
        description="Class names with probabilities for images, by few-shot adapters of a vision-language model.",
        docs_url=None,  # the pages FastAPI offers load their scripts from elsewhere
        redoc_url=None,
        lifespan=service.lifespan,
        separate_input_output_schemas=False,
    )
    app.state.service = service
    app.add_middleware(Counting, metrics=service.metrics)
    if hosts is not None:
        app.add_middleware(LocalOnly, hosts=hosts)  # type: ignore[arg-type,unused-ignore]
    guarded: list[Any] = [] if token is None else [Depends(_Guard(token))]
    refused: _Responses = {} if token is None else {401: {"model": Problem, "description": "No token, or a wrong one"}}
    shared: dict[str, Any] = {"dependencies": guarded, "methods": ["GET"]}
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route(
        "/metrics",
        service.show_metrics,
        **shared,
        responses={**refused, 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        response_class=Response,
    )
    app.add_api_route("/adapters", service.list_adapters, **shared, responses=refused)
    missing: _Responses = {key: _REFUSALS[key] for key in (404, 422)}
    app.add_api_route("/adapters/{name}", service.show_adapter, **shared, responses={**refused, **missing})
    app.add_api_route(
        "/predict",
        service.predict,
        methods=["POST"],
        dependencies=guarded,
        responses={**_REFUSALS, **refused},
        openapi_extra={"requestBody": _request_body(service.limits)},
    )
    _add_handlers(app)
    return app


def _request_body(limits: Limits) -> dict[str, Any]:
    """The description of what `/predict` takes, in both content types."""

    def schema(item: dict[str, Any]) -> dict[str, Any]:
        images = {"type": "array", "items": item, "minItems": 1, "maxItems": limits.images}
        return {"type": "object", "properties": {FIELD: images}, "required": [FIELD], "additionalProperties": False}

    return {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": schema({"type": "string", "format": "binary"})},
            "application/json": {"schema": schema({"type": "string", "contentEncoding": "base64"})},
        },
    }


class _Guard(HTTPBearer):
    """Lets requests with the token pass."""

    def __init__(self, token: str) -> None:
        super().__init__(auto_error=False)
        self._token = token.encode()

    async def __call__(self, request: HTTPConnection) -> HTTPAuthorizationCredentials | None:
        given = await super().__call__(request)  # type: ignore[arg-type,unused-ignore]  # of older FastAPI
        # compared in the same time whatever was sent, so that the token can't be guessed letter by letter
        if given is None or not secrets.compare_digest(given.credentials.encode(), self._token):
            raise HTTPException(
                401, "A bearer token is needed: send Authorization: Bearer TOKEN.", {"WWW-Authenticate": "Bearer"}
            )
        return given


class _Service:
    """What the routes do, and what they share."""

    def __init__(self, shelf: Shelf, limits: Limits) -> None:
        self.shelf, self.limits = shelf, limits
        self.metrics = Metrics(lambda: self.batcher.inside)
        self.batcher = Batcher(
            shelf.answer, batch=limits.batch, wait=limits.wait, waiting=limits.waiting, watch=self.metrics.batch
        )
        self._decoders = anyio.CapacityLimiter(max(1, min(4, os.cpu_count() or 1)))
        self._at_once = 0

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Answer what is there before the end."""
        yield
        await run_in_threadpool(self.batcher.close)

    async def health(self) -> Health:
        """Say that the server answers."""
        return Health(status="ok", adaptkit_version=__version__, adapters=len(self.shelf.listed))

    async def show_metrics(self) -> Response:
        """Counters for Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def list_adapters(self) -> Adapters:
        """All adapters."""
        return Adapters(adapters=[_summary(name, listed) for name, listed in sorted(self.shelf.listed.items())])

    async def show_adapter(self, name: str) -> Card:
        """An adapter with its labels and its card."""
        listed = self.shelf[name]
        config = listed.config
        return Card(
            **_summary(name, listed).model_dump(),
            labels=list(listed.labels),
            templates=list(config.templates),
            backbone=config.backbone["name"],
            digest=config.backbone["digest"],
            facts={key: value for key, value in config.facts.items() if isinstance(value, (str, int, float, bool))},
            card=listed.card,
        )

    async def predict(
        self,
        request: Request,
        adapter: Annotated[
            list[str],
            Query(max_length=MOST_ADAPTERS, description="Which adapters to ask; needed where there are several."),
        ] = [],  # noqa: B006  # FastAPI copies it
        top: Annotated[int, Query(ge=1, le=1000, description="Classes shown, the likeliest first.")] = 5,
        abstain_below: Annotated[
            float | None, Query(gt=0, lt=1, description="Abstain where the likeliest class is less probable.")
        ] = None,
        coverage: Annotated[
            float | None,
            Query(gt=0, lt=1, description="Name the labels among which the true one is, this often (if calibrated)."),
        ] = None,
    ) -> Predictions:
        """Class names with probabilities for uploaded images."""
        names, wish = self.shelf.choose(adapter), _Wish(top, abstain_below, coverage)
        warnings = [] if coverage is None else self._warnings(names, coverage)
        with self._admitted():
            sent = await read_images(request, self.limits)
            logits = await self._logits(sent, names)
        self.metrics.answered(names, len(sent))
        return Predictions(
            predictions=[
                _prediction(self.shelf[name], found[name], wish, image=place, file=image.file, adapter=name)
                for place, (image, found) in enumerate(zip(sent, logits, strict=True))
                for name in names
            ],
            warnings=warnings,
        )

    def _warnings(self, names: tuple[str, ...], coverage: float) -> list[str]:
        """Where an adapter's held-out images are too few for the coverage.

        Raises:
            ConfigError: One has none.
        """
        warnings = []
        for name in names:
            calibration = self.shelf[name].calibration
            if calibration is None:
                raise ConfigError(
                    f"The adapter {name!r} wasn't calibrated on held-out images, so it promises no coverage: leave"
                    " coverage out."
                )
            warning = warning_about(len(calibration.scores), coverage)
            warnings += [f"{name}: {warning}"] if warning else []
        return warnings

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """One of the predictions worked on at once.

        Raises:
            BusyError: There are too many.
        """
        if self._at_once >= self.limits.requests:
            raise BusyError("The server is busy: ask again in a moment.")
        self._at_once += 1
        try:
            yield
        finally:
            self._at_once -= 1

    async def _logits(self, sent: list[Sent], names: tuple[str, ...]) -> list[dict[str, Any]]:
        """For each image logits by adapter.

        Raises:
            DataError: An image can't be read.
            HTTPException: 503 where it takes too long.
        """
        preprocessing = self.shelf.backbone.spec.preprocessing
        try:
            with self.batcher.room(len(sent)) as submit, anyio.fail_after(self.limits.seconds):
                pixels = await _all(
                    anyio.to_thread.run_sync(image.pixels, place, self.limits, preprocessing, limiter=self._decoders)
                    for place, image in enumerate(sent)
                )
                return await _all(asyncio.wrap_future(submit(one, names)) for one in pixels)
        except TimeoutError as error:
            raise HTTPException(
                503, f"There was no answer within {self.limits.seconds:g} seconds: ask again.", {"Retry-After": "1"}
            ) from error


async def _all(tasks: Any) -> list[Any]:
    """All results; where some fail, the first failure, after all have ended."""
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _summary(name: str, listed: Listed) -> Summary:
    return Summary(
        name=name,
        method=listed.config.method,
        classes=len(listed.labels),
        calibrated=listed.calibration is not None,
    )


@dataclass(frozen=True)
class _Wish:
    """What a request wants to know: how many classes, when to abstain, and how sure a set of labels shall be."""

    top: int
    abstain_below: float | None
    coverage: float | None


def _prediction(listed: Listed, logits: NDArray[np.float64], wish: _Wish, **where: Any) -> Prediction:
    """What an adapter says, of its logits [classes] for an image."""
    odds = listed.probabilities(logits[None])
    order = np.argsort(-odds[0], kind="stable")
    labels = None
    if wish.coverage is not None and listed.calibration is not None:
        inside = listed.calibration.sets(odds, wish.coverage)[0]
        labels = [listed.labels[i] for i in order if inside[i]]
    return Prediction(
        classes=[Odds(label=listed.labels[i], probability=float(odds[0, i])) for i in order[: wish.top]],
        abstains=wish.abstain_below is not None and bool(odds.max() < wish.abstain_below),
        labels=labels,
        **where,
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


def _add_handlers(app: FastAPI) -> None:
    """Every refusal is a status and a sentence."""
    statuses = {UnknownNameError: 404, BusyError: 503, DataError: 422, ConfigError: 422}
    for kind, status in statuses.items():
        app.add_exception_handler(kind, _saying(status))
    app.add_exception_handler(StarletteHTTPException, _refuse)
    app.add_exception_handler(RequestValidationError, _explain)
    app.add_exception_handler(Exception, _fail)


def _saying(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, status, {"Retry-After": "1"} if status == 503 else None)

    return answer


async def _refuse(request: Request, error: Exception) -> Response:
    detail, status = getattr(error, "detail", ""), getattr(error, "status_code", 500)
    if status == 404 and detail == "Not Found":
        detail = "There is nothing here: /predict, /adapters, /health, /metrics and /openapi.json are."
    if status == 405:
        detail = f"{request.method} isn't accepted here."
    return JSONResponse({"error": detail}, status, getattr(error, "headers", None))


async def _explain(request: Request, error: Exception) -> Response:
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {"loc": (), "msg": "it is wrong"}
    where = ".".join(str(part)[:40] for part in first["loc"][1:])
    return JSONResponse({"error": f"{where} can't be used: {first['msg'][:200]}."}, 422)


async def _fail(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "The server failed at this request; its log says why."}, 500)
