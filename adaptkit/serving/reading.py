"""Images out of a request: uploaded files or base64 in JSON, within limits, whatever is sent.

Every refusal is an `HTTPException` with one sentence for whoever sent the request.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

import anyio
from pydantic import BaseModel, ConfigDict, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from torch import Tensor

from adaptkit.backbones.base import Preprocessing
from adaptkit.data.images import load_rgb
from adaptkit.data.transforms import to_pixels
from adaptkit.errors import DataError
from adaptkit.serving.limits import Limits

FIELD = "images"
_ACCEPTED = f"Send image files in the field {FIELD!r} of multipart/form-data, or application/json."
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,")


class Base64Images(BaseModel):
    """A request's body as JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)

    images: list[str]


@dataclass(frozen=True)
class Sent:
    """An image as it was sent.

    Args:
        content: The file's bytes, or base64 of them.
        file: Its name, where it had one.
    """

    content: bytes | str
    file: str | None = None

    def pixels(self, place: int, limits: Limits, preprocessing: Preprocessing) -> Tensor:
        """Preprocessed pixels [3, size, size].

        Raises:
            DataError: Not an image, a damaged one, or one that is too large; `place` says which.
        """
        name = f"Image {place}"
        content = self.content
        if isinstance(content, str):
            start = _DATA_URL.match(content)
            try:
                content = base64.b64decode(content[start.end() if start else 0 :], validate=True)
            except (binascii.Error, ValueError) as error:
                raise DataError(f"{name} isn't base64 of an image file.") from error
        return to_pixels(load_rgb(content, max_pixels=limits.pixels, name=name), preprocessing)


async def read_images(request: Request, limits: Limits) -> list[Sent]:
    """The images of a request.

    Raises:
        HTTPException: 408 for a body that takes too long, 413 for too much, 415 for another content type, 422 for what
            isn't as described.
    """
    media, options = parse_options_header(request.headers.get("content-type", ""))
    if media not in (b"multipart/form-data", b"application/json"):
        raise HTTPException(415, f"This content type isn't accepted. {_ACCEPTED}")
    if options.get(b"charset", b"utf-8").lower() != b"utf-8":
        raise HTTPException(415, "Only UTF-8 is accepted as charset.")
    try:
        with anyio.fail_after(limits.seconds):
            body = await _body(request, limits.body_bytes)
    except TimeoutError as error:
        raise HTTPException(408, f"The body didn't arrive within {limits.seconds:g} seconds.") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "The connection was closed before the body was whole.") from error
    sent = _from_json(body, limits) if media == b"application/json" else await _from_form(body, request.headers, limits)
    if not sent:
        raise HTTPException(422, f"There are no images. {_ACCEPTED}")
    if len(sent) > limits.images:
        raise _too_many(limits)
    return sent


def _too_many(limits: Limits) -> HTTPException:
    return HTTPException(413, f"There are too many images: at most {limits.images} are accepted in a request.")


async def _body(request: Request, most: int) -> bytes:
    too_large = HTTPException(413, f"The body is too large: at most {most:,} bytes are accepted.")
    claimed = request.headers.get("content-length", "")
    if claimed.isdecimal() and len(claimed) < 20 and int(claimed) > most:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise too_large
    return bytes(body)


def _from_json(body: bytes, limits: Limits) -> list[Sent]:
    # an image needs one comma, and one more as data URL; millions of values would take seconds and much memory to read
    if body.count(b",") > 2 * limits.images:
        raise _too_many(limits)
    try:
        return [Sent(text) for text in Base64Images.model_validate_json(body).images]
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"])
        what = f"{where}: {first['msg']}" if where else first["msg"]
        raise HTTPException(
            422, f'The JSON can\'t be used ({what[:200]}); {{"images": [base64, …]}} is accepted.'
        ) from error


async def _from_form(body: bytes, headers: Headers, limits: Limits) -> list[Sent]:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 2**16):
            yield body[start : start + 2**16]

    parser = MultiPartParser(headers, chunks(), max_files=limits.images, max_fields=0)  # type: ignore[arg-type]
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise _too_many(limits) from error
        raise HTTPException(422, f"The form can't be read ({error.message.rstrip('.')[:100]}). {_ACCEPTED}") from error
    except (FormParserError, UnicodeError, ValueError) as error:
        raise HTTPException(422, f"The form can't be read. {_ACCEPTED}") from error
    sent = []
    try:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):  # the parser lets none through
                continue
            if name != FIELD:
                raise HTTPException(422, f"The field {name[:40]!r} isn't known. {_ACCEPTED}")
            sent.append(Sent(await value.read(), (value.filename or "")[:255] or None))
    finally:
        await form.close()
    return sent
