"""The HTTP interface answers as the classifier does, and says what there is."""

from __future__ import annotations

import json
import time

import pytest
from starlette.testclient import TestClient

from adaptkit import __version__
from adaptkit.estimator import load
from adaptkit.serving.app import create_app
from adaptkit.serving.batching import Batcher
from adaptkit.serving.limits import Limits
from tests.serving.made import COLOURS, encoded, files, picture, text

TOKEN = "a-token-of-some-length"


def predictions(answer) -> list[dict]:
    assert answer.status_code == 200, answer.text
    return answer.json()["predictions"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_answers_are_the_classifier_s(client, folders, tmp_path, kind):
    images = [encoded(picture(label, 50, side=57), kind) for label in COLOURS]
    paths = [tmp_path / f"{place}.png" for place in range(3)]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(image)
    found = predictions(client.post("/predict?adapter=probe&adapter=cache&adapter=sure", files=files(*images)))
    assert [(one["image"], one["file"], one["adapter"]) for one in found] == [
        (place, f"{place}.png", name) for place in range(3) for name in ("probe", "cache", "sure")
    ]
    for name in ("probe", "cache", "sure"):
        classifier = load(folders[name])
        odds = classifier.predict_proba(paths)
        for one, row in zip([one for one in found if one["adapter"] == name], odds, strict=True):
            given = {item["label"]: item["probability"] for item in one["classes"]}
            assert given == pytest.approx(dict(zip(classifier.classes_.tolist(), row.tolist(), strict=True)), abs=1e-5)
            assert list(given.values()) == sorted(given.values(), reverse=True)


def test_base64_is_the_same(client):
    image = encoded(picture("oak"))
    uploaded = predictions(client.post("/predict?adapter=cache&top=1", files=files(image)))
    for word in (text(image), "data:image/png;base64," + text(image)):
        (sent,) = predictions(client.post("/predict?adapter=cache&top=1", json={"images": [word]}))
        assert sent["file"] is None
        assert len(sent["classes"]) == 1
        assert sent["classes"][0]["label"] == uploaded[0]["classes"][0]["label"]
        assert sent["classes"][0]["probability"] == pytest.approx(uploaded[0]["classes"][0]["probability"], abs=1e-6)


def test_abstaining_and_sets(client):
    blank = encoded(picture("oak").resize((1, 1)).resize((40, 40)))
    (one,) = predictions(client.post("/predict?adapter=sure&abstain_below=0.999999&coverage=0.9", files=files(blank)))
    assert one["abstains"] is True
    assert one["labels"] == [item["label"] for item in one["classes"]][: len(one["labels"])]
    (one,) = predictions(client.post("/predict?adapter=sure&abstain_below=0.01", files=files(blank)))
    assert (one["abstains"], one["labels"]) == (False, None)
    (warning,) = client.post("/predict?adapter=sure&coverage=0.99", files=files(blank)).json()["warnings"]
    assert warning.startswith("sure: 36 held-out images can't promise a coverage of 0.99")
    assert client.post("/predict?adapter=sure", files=files(blank)).json()["warnings"] == []
    refused = client.post("/predict?adapter=sure&adapter=probe&coverage=0.9", files=files(blank))
    assert refused.status_code == 422
    assert "'probe' wasn't calibrated" in refused.json()["error"]


def test_what_there_is(client, folders):
    assert client.get("/health").json() == {"status": "ok", "adaptkit_version": __version__, "adapters": 3}
    listed = client.get("/adapters").json()["adapters"]
    assert [(one["name"], one["method"], one["classes"], one["calibrated"]) for one in listed] == [
        ("cache", "tip-adapter", 3, False),
        ("probe", "linear-probe", 3, False),
        ("sure", "linear-probe", 3, True),
    ]
    card = client.get("/adapters/cache").json()
    assert card["labels"] == [0, 1, 2]
    assert card["card"] == (folders["cache"] / "README.md").read_text()
    assert card["backbone"] == "mini"
    assert str(folders["cache"]) not in json.dumps(card)  # where it lies is nobody's matter


def test_metrics(shelf):
    with TestClient(create_app(shelf)) as client:
        for _ in range(3):
            client.post("/predict?adapter=probe&adapter=cache", files=files(*[encoded(picture("oak"))] * 2))
        client.post("/predict?adapter=nope")
        for made_up in ("/a", "/b", "/adapters/x", "/adapters/y"):
            client.get(made_up)
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if line[0] != "#")
    assert lines['adaptkit_images_total{adapter="cache"}'] == "6.0"
    assert lines["adaptkit_batch_images_sum"] == "6.0"
    assert lines["adaptkit_images_inside"] == "0.0"
    assert lines['adaptkit_requests_total{path="/predict",status="200"}'] == "3.0"
    assert lines['adaptkit_requests_total{path="/predict",status="404"}'] == "1.0"
    assert lines['adaptkit_requests_total{path="other",status="404"}'] == "2.0"  # names from outside make no series
    assert lines['adaptkit_requests_total{path="/adapters/{name}",status="404"}'] == "2.0"


def test_the_token(shelf):
    image = files(encoded(picture("oak")))
    with TestClient(create_app(shelf, token=TOKEN)) as client:
        assert client.get("/health").status_code == 200
        tried = 0
        for given in (None, "", "Bearer", "Bearer x", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer \xff\xfe", TOKEN):
            headers = {} if given is None else {"Authorization": given.encode("latin-1")}
            for answer in (
                client.get("/adapters", headers=headers),
                client.get("/adapters/probe", headers=headers),
                client.get("/metrics", headers=headers),
                client.post("/predict?adapter=probe", files=image, headers=headers),
            ):
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert "bearer token is needed" in answer.json()["error"]
                tried += 1
        good = {"Authorization": f"Bearer {TOKEN}"}
        assert client.get("/adapters", headers=good).status_code == 200
        assert client.post("/predict?adapter=probe", files=image, headers=good).status_code == 200
        assert TOKEN not in client.get("/openapi.json").text
    assert tried == 32


def test_busy_and_slow(shelf, monkeypatch):
    image = files(encoded(picture("oak")))
    with TestClient(create_app(shelf, Limits(seconds=0.2))) as client:
        service = client.app.state.service
        service.batcher.close()  # nobody answers any more
        service.batcher = Batcher(lambda pixels, names: time.sleep(0.6) or names, waiting=16)
        answer = client.post("/predict?adapter=probe", files=image)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "no answer within 0.2 seconds" in answer.json()["error"]
        with service.batcher.room(16):
            answer = client.post("/predict?adapter=probe", files=image)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert service.batcher.inside == 0
        monkeypatch.setattr(service, "_at_once", service.limits.requests)
        assert client.post("/predict?adapter=probe", files=image).status_code == 503
        assert client.get("/health").status_code == 200


def test_a_failure_of_ours_is_500_and_the_next_request_is_answered(shelf, monkeypatch):
    image = files(encoded(picture("oak")))
    with TestClient(create_app(shelf), raise_server_exceptions=False) as client:
        route = shelf.adapters.route
        monkeypatch.setattr(shelf.adapters, "route", lambda *given: 1 / 0)
        answer = client.post("/predict?adapter=probe", files=image)
        assert (answer.status_code, answer.json()) == (500, {"error": answer.json()["error"]})
        assert "division" not in answer.text
        monkeypatch.setattr(shelf.adapters, "route", route)
        assert client.post("/predict?adapter=probe", files=image).status_code == 200
