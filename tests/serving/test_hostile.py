"""Hostile images and bodies are refused in one sentence with the right status, and the server goes on."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
import zlib

import pytest
from PIL import Image
from starlette.testclient import TestClient

from adaptkit.serving.app import create_app
from adaptkit.serving.limits import Limits
from tests.serving.conftest import LIMITS
from tests.serving.made import encoded, files, picture, text

GOOD = encoded(picture("oak"))
JPEG = encoded(picture("oak", side=200), "JPEG")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes, *extra: bytes) -> bytes:
    """A PNG that claims a size, whatever its pixels are."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND", b"")
    )


def icon(image: bytes) -> bytes:
    """An icon of 16 × 16 pixels whose image says otherwise; Pillow decodes it while it opens it."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 24, len(image), 22) + image


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.png", GOOD)
    return out.getvalue()


def bomb_tiff() -> bytes:
    out = io.BytesIO()
    Image.new("1", (2000, 2000)).save(out, "TIFF", compression="group4")
    return out.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/etc/passwd) (r) file\n%%EOF"
IMAGES = {
    "nothing": b"",
    "text": b"no image at all",
    "svg": SVG,
    "eps": EPS,
    "pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj",
    "html": b"<html><img src='http://169.254.169.254/'></html>",
    "zip": zipped(),
    "gzip": gzip.compress(GOOD),
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x04evil\x94.",
    "cut png": GOOD[: len(GOOD) // 2],
    "cut jpeg": JPEG[: len(JPEG) // 3],
    "head of a png": GOOD[:33],
    "a png that claims 2^31 pixels": png(2**31 - 1, 1, b"\0"),
    "a png that claims 10^10 pixels": png(100_000, 100_000, b"\0" * 100_000),
    "a bomb of one colour": png(30_000, 30_000, b"\0" * 4_000_000),
    "more pixels than allowed": encoded(Image.new("L", (1001, 1000))),
    "a tiff of 4 megapixels in 300 bytes": bomb_tiff(),
    "no width": png(0, 10, b"\0"),
    "wrong checksum": GOOD[:40] + bytes([GOOD[40] ^ 255]) + GOOD[41:],
    "a text chunk that unpacks to 200 MB": png(
        8, 8, b"\0" * 200, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 200_000_000, 9))
    ),
    "a colour profile of noise": png(8, 8, b"\0" * 10, chunk(b"iCCP", b"x\0\0" + b"\xff" * 300)),
    "gif head": b"GIF89a\xff\xff\xff\xff\xff\xff\xff",
    "bmp with a negative size": b"BM"
    + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, -5, -5, 1, 24, 0, 0, 0, 0, 0, 0),
    "tiff that points to itself": b"II*\0\x08\0\0\0\x01\0"
    + struct.pack("<HHII", 0x111, 4, 1, 8)
    + struct.pack("<I", 8),
    "ico of nothing": b"\0\0\1\0\xff\xff",
    "an icon of 100 megapixels": icon(png(10_000, 10_000, b"\0" * 300_010_000)),
    "jpeg 2000 head": b"\0\0\0\x0cjP  \r\n\x87\n",
}


def refused(answer, *statuses: int) -> str:
    assert answer.status_code in statuses, answer.text
    assert list(answer.json()) == ["error"]
    sentence = answer.json()["error"]
    assert sentence[-1] in ".," or sentence.endswith("}"), sentence
    assert len(sentence) < 600
    assert "Traceback" not in sentence
    return str(sentence)


@pytest.fixture
def goes_on(client):
    yield
    assert client.post("/predict?adapter=probe", files=files(GOOD)).status_code == 200
    assert client.app.state.service.batcher.inside == 0


@pytest.mark.parametrize("name", list(IMAGES))
def test_hostile_images(client, goes_on, name):
    """Also beside a good one: the message says which it is."""
    image = IMAGES[name]
    for answer in (
        client.post("/predict?adapter=probe", files=files(GOOD, image)),
        client.post("/predict?adapter=probe", json={"images": [text(GOOD), text(image)]}),
    ):
        assert refused(answer, 422).startswith("Image 1 ")


def test_too_much(client, goes_on):
    many = client.post("/predict?adapter=probe", files=files(*[GOOD] * 5))
    assert "at most 4" in refused(many, 413)
    assert "at most 4" in refused(client.post("/predict?adapter=probe", json={"images": [text(GOOD)] * 5}), 413)
    assert "at most 4" in refused(client.post("/predict?adapter=probe", files=files(*[b""] * 2000)), 413)
    large = client.post("/predict?adapter=probe", files=files(b"\0" * (LIMITS.body_bytes + 1)))
    assert "1,048,576 bytes" in refused(large, 413)

    def unannounced():
        for _ in range(300):
            yield b"\0" * 4096

    headers = {"content-type": "application/json"}
    assert "too large" in refused(client.post("/predict?adapter=probe", content=unannounced(), headers=headers), 413)
    values = b'{"images": [' + b'"",' * 300_000 + b'""]}'  # 16 MB of such would take seconds and 300 MB to read
    headers = {"content-type": "application/json"}
    assert "at most 4" in refused(client.post("/predict?adapter=probe", content=values, headers=headers), 413)
    huge = {"content-type": "application/json", "content-length": "9" * 30}
    assert refused(client.post("/predict?adapter=probe", content=b"{}", headers=huge), 413, 422)
    refused(client.post("/predict?" + "&".join(["adapter=probe"] * 17), files=files(GOOD)), 422)


BODIES = {
    "empty": b"",
    "cut": b'{"images": ["',
    "deep": b'{"images": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "long number": b'{"images": ' + b"9" * 500_000 + b"}",
    "no object": b"[]",
    "null": b'{"images": null}',
    "none": b'{"images": []}',
    "numbers": b'{"images": [1, 2]}',
    "nested": b'{"images": [["x"]]}',
    "unknown key": b'{"images": ["x"], "path": "/etc/passwd"}',
    "not utf-8": b'{"images": ["\xff\xfe"]}',
    "lone surrogate": b'{"images": ["\\ud800"]}',
    "nan": b'{"images": NaN}',
    "bad base64": b'{"images": ["####"]}',
    "cut base64": b'{"images": ["abcde"]}',
    "url": b'{"images": ["http://169.254.169.254/latest"]}',
    "file url": b'{"images": ["file:///etc/passwd"]}',
    "a data url of text": b'{"images": ["data:text/html;base64,AAAA"]}',
    "other keys": json.dumps({f"k{i}": i for i in range(7)}).encode(),
    "letters beyond ascii": '{"images": ["äöü"]}'.encode(),
}


@pytest.mark.parametrize("name", list(BODIES))
def test_hostile_json(client, goes_on, name):
    headers = {"content-type": "application/json"}
    refused(client.post("/predict?adapter=probe", content=BODIES[name], headers=headers), 422)


PART = b'--b\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
FORMS = {
    "no boundary": (b"x", "multipart/form-data"),
    "no parts": (b"--b--\r\n", "multipart/form-data; boundary=b"),
    "another boundary": (PART + GOOD + b"\r\n--b--", "multipart/form-data; boundary=c"),
    "no end": (PART + GOOD, "multipart/form-data; boundary=b"),
    "no name": (
        b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
        "multipart/form-data; boundary=b",
    ),
    "a field, not a file": (
        b'--b\r\nContent-Disposition: form-data; name="images"\r\n\r\nx\r\n--b--\r\n',
        "multipart/form-data; boundary=b",
    ),
    "another field": (
        PART.replace(b'"images"', b'"path"') + GOOD + b"\r\n--b--\r\n",
        "multipart/form-data; boundary=b",
    ),
    "endless header": (b"--b\r\n" + b"X-A: " + b"a" * 300_000, "multipart/form-data; boundary=b"),
    "many headers": (b"--b\r\n" + b"X-A: a\r\n" * 30_000, "multipart/form-data; boundary=b"),
    "long boundary": (b"x" * 100, "multipart/form-data; boundary=" + "b" * 5_000),
}


@pytest.mark.parametrize("name", list(FORMS))
def test_hostile_forms(client, goes_on, name):
    body, kind = FORMS[name]
    refused(client.post("/predict?adapter=probe", content=body, headers={"content-type": kind}), 422)


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "text/plain",
        "image/png",
        "application/x-www-form-urlencoded",
        "application/octet-stream",
        "application/json; charset=utf-16",
        "multipart/form-data; boundary=b; charset=idna",
        "multipart/form-data; boundary=b; charset=unicode_escape",
        "multipart/mixed; boundary=b",
        "\xff",
    ],
)
def test_other_content_types(client, goes_on, kind):
    body = PART + GOOD + b"\r\n--b--\r\n"
    headers = {"content-type": kind.encode("latin-1")}
    refused(client.post("/predict?adapter=probe", content=body, headers=headers), 415)


LONG = "a" * 5000


@pytest.mark.parametrize("file", ["../../etc/passwd", "/etc/passwd", "a" * 1000, LONG, "\N{SNOWMAN}.png", "a\x00b", ""])
def test_file_names_are_only_words(client, goes_on, file):
    answer = client.post("/predict?adapter=probe", files=[("images", (file, GOOD, "text/html"))])
    if file in ("", LONG):  # without a name it is a field, not a file; headers are limited
        refused(answer, 422)
    else:
        assert len(answer.json()["predictions"][0]["file"]) <= 255


@pytest.mark.parametrize("name", ["..", "../probe", "%2e%2e%2fprobe", "/etc", "probe%00", "Probe", "a" * 9000])
def test_adapters_are_names_never_paths(client, goes_on, folders, name):
    for path in (f"/adapters/{name}", f"/predict?adapter={name}", f"/predict?adapter={folders['probe']}/{name}"):
        answer = client.post(path, files=files(GOOD)) if "?" in path else client.get(path)
        refused(answer, 404)


def test_many_requests_of_which_most_are_bad(shelf):
    """Together they leave nothing behind."""
    with TestClient(create_app(shelf, Limits(body_bytes=2**20, images=4))) as client:
        for round_ in range(30):
            bad = list(IMAGES.values())[round_ % len(IMAGES)]
            client.post("/predict?adapter=probe", files=files(GOOD, bad))
        assert client.app.state.service.batcher.inside == 0
        assert client.app.state.service._at_once == 0
        assert client.post("/predict?adapter=probe", files=files(GOOD)).status_code == 200
