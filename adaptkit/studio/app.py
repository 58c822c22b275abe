"""What the page talks to: a small JSON interface on localhost, one sentence for everything that goes wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from adaptkit import __version__
from adaptkit.errors import AdaptKitError, DataError, MissingPathError, StorageError, UnknownNameError
from adaptkit.studio.engine import OvertakenError
from adaptkit.studio.guard import Guard
from adaptkit.studio.pictures import thumbnail_path
from adaptkit.studio.workshop import Workshop

PAGE = Path(__file__).parent / "page"
_log = logging.getLogger("adaptkit.studio")
_STATUS: tuple[tuple[type[AdaptKitError], int], ...] = (
    (OvertakenError, 409),
    (UnknownNameError, 404),
    (MissingPathError, 404),
    (StorageError, 507),
)
_Text = Annotated[str, Field(max_length=4096)]
_Ids = Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=20_000)]


class _Names(BaseModel):
    names: Annotated[list[_Text], Field(min_length=1, max_length=1000)]


class _Name(BaseModel):
    name: _Text


class _Label(BaseModel):
    images: _Ids
    label: Annotated[str, Field(max_length=64)] | None


class _Images(BaseModel):
    images: _Ids


class _FolderOfImages(BaseModel):
    path: _Text
    labels: bool = True


class _Method(BaseModel):
    method: Annotated[str, Field(max_length=64)]


class _Export(BaseModel):
    format: Annotated[str, Field(max_length=16)]


def make_app(workshop: Workshop, token: str, port: int) -> Guard:
    """The studio as an ASGI application.

    Args:
        workshop: The project and all that works on it.
        token: What every request must carry.
        port: Where it will listen; requests that name another host or port are refused.
    """
    app = FastAPI(title="adaptkit studio", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    _errors(app)
    _reading(app, workshop)
    _changing(app, workshop)
    _images(app, workshop)
    _making(app, workshop)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return Guard(app, token, port)


def _reply(content: Any, status: int = 200) -> Response:
    """JSON, past FastAPI's own encoder, which takes its time over thousands of images."""
    text = json.dumps(content, separators=(",", ":"))
    return Response(text, status_code=status, media_type="application/json")


def _errors(app: FastAPI) -> None:
    @app.exception_handler(AdaptKitError)
    def _ours(request: Request, error: Exception) -> Response:
        status = next((code for kind, code in _STATUS if isinstance(error, kind)), 400)
        return _reply({"error": str(error)}, status)

    @app.exception_handler(RequestValidationError)
    def _invalid(request: Request, error: Exception) -> Response:
        first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
        where = ".".join(str(part) for part in first.get("loc", ())[1:]) or "the request"
        return _reply({"error": f"{where} isn't accepted: {first.get('msg', 'it is no JSON')}."}, 422)

    @app.exception_handler(HTTPException)
    def _http(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 500)
        said = {404: "There is nothing at this address.", 405: "This address doesn't take such requests."}
        return _reply({"error": said.get(status, str(getattr(error, "detail", "")) or "That didn't work.")}, status)

    @app.exception_handler(Exception)
    def _bug(request: Request, error: Exception) -> Response:
        _log.error("studio: %s %s failed", request.method, request.url.path, exc_info=error)
        sentence = "Something went wrong in the studio itself; your work is saved. The terminal has the details."
        return _reply({"error": sentence}, 500)


def _reading(app: FastAPI, workshop: Workshop) -> None:
    @app.get("/")
    def page() -> Response:
        return FileResponse(PAGE / "index.html")

    @app.get("/api/state")
    def state() -> Response:
        return _reply(workshop.state())

    @app.get("/api/progress")
    def progress() -> Response:
        return _reply(workshop.progress())

    @app.get("/api/answers")
    def answers() -> Response:
        return _reply(workshop.answers())

    @app.get("/api/estimate")
    def estimate(method: Annotated[str | None, Query(max_length=64)] = None) -> Response:
        return _reply(workshop.estimate(method))

    @app.get("/api/code")
    def code() -> Response:
        return _reply({"code": workshop.code()})

    @app.get("/image/{image}")
    def image(image: str) -> Response:
        path = workshop.project.image_path(image)
        if not path.is_file():
            raise MissingPathError("The file of this image is gone from the project's folder images/.")
        return FileResponse(path, headers={"cache-control": "private, max-age=86400", **_INERT})

    @app.get("/thumbnail/{image}")
    def thumbnail(image: str) -> Response:
        workshop.project.image_path(image)  # refuses other names
        path = thumbnail_path(workshop.project.folder, image)
        if not path.is_file():
            workshop.make_thumbnail(image)
        return FileResponse(path, media_type="image/jpeg", headers={"cache-control": "private, max-age=86400"})


_INERT = {"content-security-policy": "default-src 'none'; sandbox"}  # whatever lies in a file, it stays a picture


def _changing(app: FastAPI, workshop: Workshop) -> None:
    project = workshop.project

    def changed(change: Callable[[], Any]) -> Response:
        change()
        return _reply(workshop.state())

    @app.post("/api/classes")
    def add_classes(body: _Names) -> Response:
        return changed(lambda: workshop.add_classes(body.names))

    @app.patch("/api/classes/{class_id}")
    def rename_class(class_id: str, body: _Name) -> Response:
        return changed(lambda: workshop.rename_class(class_id, body.name))

    @app.delete("/api/classes/{class_id}")
    def remove_class(class_id: str) -> Response:
        return changed(lambda: project.remove_class(class_id))

    @app.post("/api/label")
    def label(body: _Label) -> Response:
        return changed(lambda: project.label(body.images, body.label))

    @app.post("/api/remove")
    def remove(body: _Images) -> Response:
        return changed(lambda: project.remove_images(body.images))

    @app.post("/api/method")
    def method(body: _Method) -> Response:
        return changed(lambda: workshop.set_method(body.method))

    @app.post("/api/undo")
    def undo() -> Response:
        return _reply({"done": f"Undone: {project.undo()}.", **workshop.state()})

    @app.post("/api/redo")
    def redo() -> Response:
        return _reply({"done": f"Done again: {project.redo()}.", **workshop.state()})


def _images(app: FastAPI, workshop: Workshop) -> None:
    @app.post("/api/images")
    def upload(
        files: Annotated[list[UploadFile], File()],
        label: Annotated[str | None, Form(max_length=64)] = None,
        group: Annotated[str, Form(max_length=64)] = "",
    ) -> Response:
        added, refused = workshop.take_in([(f.filename or "image", f.file.read) for f in files], label, group)
        if refused and len(refused) == len(files):
            more = f" ({len(refused) - 1} more like it.)" if len(refused) > 1 else ""
            raise DataError(refused[0]["why"] + more)
        return _reply({"added": added, "refused": refused, **workshop.state()})

    @app.post("/api/folder")
    def folder(body: _FolderOfImages) -> Response:
        found = workshop.take_folder(body.path, body.labels)
        return _reply({"found": found, **workshop.state()}, 202)

    @app.post("/api/try")
    def try_images(files: Annotated[list[UploadFile], File()]) -> Response:
        return _reply(workshop.try_images([(f.filename or "image", f.file.read) for f in files]))


def _making(app: FastAPI, workshop: Workshop) -> None:
    @app.post("/api/save")
    def save() -> Response:
        return _reply({"done": f"Saved to {workshop.save()}."})

    @app.post("/api/export")
    def export(body: _Export) -> Response:
        path, report = workshop.export(body.format)
        return _reply({"done": f"Exported to {path}; its README.md has the Python that runs it.", "report": report})
