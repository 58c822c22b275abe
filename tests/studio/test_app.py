"""The studio's interface: who is let in, what is refused, and that nothing is lost."""

from __future__ import annotations

import json
import os
import time
from io import BytesIO

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi isn't installed (the studio extra brings it)")
from starlette.testclient import TestClient

import adaptkit
from adaptkit.errors import DataError, StorageError
from adaptkit.studio import guard
from adaptkit.studio import project as project_module
from adaptkit.studio.app import make_app
from adaptkit.studio.pictures import read_file
from adaptkit.studio.project import Project
from adaptkit.studio.workshop import Workshop
from tests.studio.conftest import png, write_folder

TOKEN, PORT = "secret-token", 8765
HOST = f"http://127.0.0.1:{PORT}"


@pytest.fixture
def workshop(project, mini):
    return Workshop(project, mini)


@pytest.fixture
def bare(workshop):
    """A client without the token."""
    with TestClient(make_app(workshop, TOKEN, PORT), base_url=HOST, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def page(bare):
    """A client with it, as the page is."""
    bare.headers["x-studio-token"] = TOKEN
    return bare


def settled(page, seconds: float = 20) -> dict:
    """Answers once nothing goes on in the background."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        answers = page.get("/api/answers").json()
        if not answers["waiting"] and not page.get("/api/progress").json()["progress"]:
            return page.get("/api/answers").json()
        time.sleep(0.05)
    raise AssertionError("the studio didn't settle")


def refused(answer, status: int, *words: str) -> str:
    assert answer.status_code == status, answer.text
    content = answer.json()
    assert set(content) == {"error"}
    sentence = content["error"]
    assert sentence.endswith((".", ")"))
    assert "\n" not in sentence
    for word in words:
        assert word in sentence
    return sentence


def send(page, *files: tuple[str, bytes], **data):
    return page.post("/api/images", files=[("files", (name, content)) for name, content in files], data=data)


# --- who is let in ----------------------------------------------------------------------------------------------------


def test_only_the_page_with_its_token_is_let_in(bare):
    assert bare.get("/", params={"token": TOKEN}).status_code == 200
    for path in ("/", "/api/state", "/api/code", "/image/" + "0" * 32, "/nothing"):
        refused(bare.get(path), 403, "token")
        refused(bare.get(path, params={"token": "other"}), 403, "token")
        refused(bare.get(path, headers={"x-studio-token": ""}), 403, "token")
    refused(bare.post("/api/undo", params={"token": TOKEN}), 403, "token")  # a form on another page could do that
    assert bare.get("/page/style.css").status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example:8765"}, 421),  # DNS rebinding
        ({"host": "127.0.0.1"}, 421),
        ({"host": "127.0.0.1:80"}, 421),
        ({"host": ""}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "https://127.0.0.1:8765"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_foreign_requests_are_refused_even_with_the_token(page, headers, status):
    refused(page.get("/api/state", headers=headers), status)
    refused(page.post("/api/classes", json={"names": ["x"]}, headers=headers), status)
    assert page.get("/api/state").json()["classes"] == []


def test_own_names_of_this_machine_are_accepted(page):
    for host in ("127.0.0.1:8765", "localhost:8765", "LOCALHOST:8765", "[::1]:8765"):
        assert page.get("/api/state", headers={"host": host, "origin": f"http://{host}"}).status_code == 200


def test_every_answer_forbids_other_addresses(page):
    for answer in (
        page.get("/", params={"token": TOKEN}),
        page.get("/api/state"),
        page.get("/page/main.js"),
        page.get("/nothing"),
    ):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "http" not in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in answer.headers
        assert "set-cookie" not in answer.headers


def test_bodies_without_or_with_too_great_a_length_are_refused(page, monkeypatch):
    refused(page.post("/api/label", content=iter([b"{}"])), 411, "how long")
    monkeypatch.setattr(guard, "MAX_BODY", 100)
    refused(send(page, ("a.png", png("red", 0))), 413, "smaller parts")
    assert page.get("/api/state").json()["images"] == []


# --- the way through --------------------------------------------------------------------------------------------------


def test_from_names_to_a_saved_classifier(page, project):
    state = page.post("/api/classes", json={"names": ["red", "blue"]}).json()
    red, blue = (one["id"] for one in state["classes"])
    files = [(f"{colour}-{n}.png", png(colour, n)) for colour in ("red", "blue") for n in range(4)]
    added = send(page, *files, group="g").json()
    assert len(added["added"]) == 8
    assert added["refused"] == []
    answers = settled(page)
    assert answers["by"] == "zero-shot"
    assert sorted(answers["next"]) == sorted(added["added"])
    assert all(len(guess) == 2 for guess in answers["images"].values())
    for place, key in enumerate(added["added"]):
        page.post("/api/label", json={"images": [key], "label": red if place < 4 else blue})
    assert page.post("/api/method", json={"method": "gda"}).json()["method"] == "gda"
    assert settled(page)["by"] == "gda"
    estimate = page.get("/api/estimate").json()
    assert (estimate["correct"], estimate["total"]) == (8, 8)
    tried = page.post("/api/try", files=[("files", ("new.png", png("blue", 50)))]).json()["answers"]
    assert tried[0]["classes"][0][0] == blue
    assert len(page.get("/api/state").json()["images"]) == 8  # what is tried isn't kept
    assert str(project.folder) in page.post("/api/save").json()["done"]
    saved = adaptkit.load(project.folder / "adapter")
    assert saved.predict([project.image_path(key) for key in added["added"]]).tolist() == ["red"] * 4 + ["blue"] * 4
    assert page.post("/api/save").status_code == 200  # again


def test_the_python_lines_make_the_same_classifier(page, project, tmp_path, monkeypatch, capsys):
    state = page.post("/api/classes", json={"names": ["red", "blue"]}).json()
    assert page.get("/api/code").json()["code"].startswith("# Before this, label an image of every class.\nimport")
    for one in state["classes"]:
        send(page, *((f"{n}.png", png(one["name"], n)) for n in range(3)), label=one["id"])
    settled(page)
    page.post("/api/save")
    monkeypatch.chdir(tmp_path)
    code = page.get("/api/code").json()["code"]
    assert code.startswith("import json")
    exec(compile(code, "copied.py", "exec"), {})
    assert capsys.readouterr().out == "red\n"
    ours, theirs = adaptkit.load(project.folder / "adapter"), adaptkit.load(tmp_path / "my_adapter")
    images = [project.image_path(key) for key in project.state.images]
    assert abs(ours.predict_proba(images) - theirs.predict_proba(images)).max() < 1e-6


def test_a_folder_is_copied_in_with_its_classes_and_undone_at_once(page, tmp_path):
    folder = write_folder(tmp_path / "photos")
    (folder / "red" / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("x")
    answer = page.post("/api/folder", json={"path": str(folder)})
    assert answer.status_code == 202
    assert answer.json()["found"] == 10
    settled(page)
    state = page.get("/api/state").json()
    assert [one["name"] for one in state["classes"]] == ["blue", "green", "red"]
    assert len(state["images"]) == 9
    assert all(image["label"] for image in state["images"])
    assert "broken.png isn't an image" in state["problems"][0]
    assert "3 classes" not in state["undo"]
    undone = page.post("/api/undo").json()
    assert undone["classes"] == undone["images"] == []
    redone = page.post("/api/redo").json()
    assert len(redone["images"]) == 9
    page.post("/api/folder", json={"path": str(folder), "labels": False})
    settled(page)
    assert len(page.get("/api/state").json()["images"]) == 9  # they are there already


def test_the_same_picture_twice_is_one(page):
    first = send(page, ("a.png", png("red", 1)), ("b.png", png("red", 1))).json()
    assert len(first["added"]) == 1
    assert send(page, ("c.jpg", png("red", 1))).json()["added"] == []


def test_a_workshop_opened_again_stands_where_it_was(page, project, mini):
    page.post("/api/classes", json={"names": ["red", "blue"]})
    send(page, ("a.png", png("red", 1)))
    before = page.get("/api/state").json()
    project.close()
    again = Project(project.folder)
    state = Workshop(again, mini).state()
    assert {k: state[k] for k in ("version", "classes", "images", "undo")} == {
        k: before[k] for k in ("version", "classes", "images", "undo")
    }
    again.close()


def test_thumbnails_are_made_again(page, project):
    (key,) = send(page, ("a.png", png("red", 1))).json()["added"]
    (project.folder / "thumbnails" / f"{key}.jpg").unlink()
    answer = page.get(f"/thumbnail/{key}")
    assert Image.open(BytesIO(answer.content)).format == "JPEG"
    assert page.get(f"/image/{key}").content == png("red", 1)
    assert "sandbox" in page.get(f"/image/{key}").headers["content-security-policy"]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_bad_requests_get_one_sentence_and_change_nothing(page, project, tmp_path):
    page.post("/api/classes", json={"names": ["red"]})
    (key,) = send(page, ("a.png", png("red", 1))).json()["added"]
    before = project.state
    (tmp_path / "empty").mkdir()
    cases = [
        (page.post("/api/classes", json={"names": ["RED"]}), 400),
        (page.post("/api/classes", json={"names": ["new", " "]}), 400),
        (page.post("/api/classes", json={"names": []}), 422),
        (page.post("/api/classes", json={"names": "red"}), 422),
        (page.post("/api/classes", content=b"{", headers={"content-type": "application/json"}), 422),
        (page.post("/api/classes", content=b"\xff\xfe", headers={"content-type": "application/json"}), 422),
        (page.post("/api/classes", json={"names": ["x" * 5000]}), 422),
        (page.patch("/api/classes/c9", json={"name": "x"}), 404),
        (page.delete("/api/classes/c9"), 404),
        (page.post("/api/label", json={"images": [key], "label": "c9"}), 404),
        (page.post("/api/label", json={"images": ["../../x"], "label": "c1"}), 404),
        (page.post("/api/label", json={"images": key, "label": "c1"}), 422),
        (page.post("/api/label", json={}), 422),
        (page.post("/api/remove", json={"images": ["0" * 32]}), 404),
        (page.post("/api/method", json={"method": "nothing"}), 404),
        (page.post("/api/method", json={"method": "coop"}), 400),
        (page.post("/api/folder", json={"path": str(tmp_path / "nowhere")}), 404),
        (page.post("/api/folder", json={"path": ""}), 400),
        (page.post("/api/folder", json={"path": "a\0b"}), 400),
        (page.post("/api/folder", json={"path": str(tmp_path / "empty")}), 400),
        (page.post("/api/redo"), 400),
        (page.post("/api/save"), 400),
        (page.post("/api/export", json={"format": "onnx"}), 400),
        (page.post("/api/export", json={"format": "exe"}), 400),
        (page.get("/api/estimate"), 400),
        (page.get("/api/estimate", params={"method": "nothing"}), 404),
        (page.post("/api/try", files=[("files", ("a.png", png("red", 1)))]), 400),
        (page.post("/api/try"), 422),
        (page.get("/image/" + "0" * 32), 404),
        (page.get("/image/..%2f..%2fproject.json"), 404),
        (page.get("/thumbnail/x"), 404),
        (page.get("/page/../app.py"), 404),
        (page.get("/api/nothing"), 404),
        (page.put("/api/label"), 405),
    ]
    for answer, status in cases:
        refused(answer, status)
    assert len(cases) == 34
    assert project.state is before


def bomb() -> bytes:
    file = BytesIO()
    Image.new("1", (20000, 20000)).save(file, "PNG")
    return file.getvalue()


def test_files_that_are_no_images_are_refused_one_by_one(page, project):
    bad = [
        ("text.png", b"hello"),
        ("empty.jpg", b""),
        ("cut.png", png("red", 1)[:200]),
        ("page.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"),
        ("bomb.png", bomb()),
    ]
    answer = send(page, *bad, ("good.png", png("red", 2))).json()
    assert [one["name"] for one in answer["refused"]] == [name for name, _ in bad]
    assert all(one["name"] in one["why"] for one in answer["refused"])
    assert len(answer["added"]) == 1
    refused(send(page, *bad), 400, "text.png", "4 more")
    refused(send(page, ("a.png", png("red", 3)), label="c77"), 404)
    assert len(project.state.images) == 1
    assert len(list((project.folder / "images").iterdir())) == 1  # nothing of the refused ones


@pytest.mark.parametrize(
    "name", ["../../evil.png", "..\\evil.png", "/etc/evil.png", "a" * 300 + ".png", ".png", "x.php"]
)
def test_file_names_from_outside_name_nothing_on_disk(page, project, name):
    (key,) = send(page, (name, png("red", 1))).json()["added"]
    file = project.image_path(key)
    assert file.parent == project.folder / "images"
    assert file.suffix == ".png"
    assert [path.name for path in (project.folder / "images").iterdir()] == [file.name]


def test_a_full_disk_is_said_and_nothing_is_lost(page, project, monkeypatch):
    page.post("/api/classes", json={"names": ["red"]})
    state = project.state

    def full(path):
        raise StorageError("project.json can't be written: the disk is full.")

    with monkeypatch.context() as patched:
        patched.setattr(project_module, "atomic_path", full)
        refused(page.post("/api/classes", json={"names": ["blue"]}), 507, "disk is full")
    assert project.state is state
    assert json.loads((project.folder / "project.json").read_text())["classes"] == {"c1": "red"}


def test_a_bug_of_ours_is_one_sentence_too(page, workshop, monkeypatch):
    monkeypatch.setattr(workshop, "state", lambda: 1 / 0)
    sentence = refused(page.get("/api/state"), 500)
    assert "division" not in sentence


@pytest.mark.slow
def test_exports(page, project):
    pytest.importorskip("onnxruntime", reason="onnxruntime isn't installed")
    state = page.post("/api/classes", json={"names": ["red", "blue"]}).json()
    for one in state["classes"]:
        send(page, *((f"{n}.png", png(one["name"], n)) for n in range(2)), label=one["id"])
    settled(page)
    answer = page.post("/api/export", json={"format": "onnx"})
    assert answer.status_code == 200, answer.text
    assert json.loads((project.folder / "exported-onnx" / "labels.json").read_text())


# --- folders and links ------------------------------------------------------------------------------------------------


def test_folders_that_cannot_name_a_class_and_names_that_differ_in_case(page, tmp_path):
    folder = tmp_path / "photos"
    names = (b"red_fox", b"Red Fox", b"caf\xe9", b"a\x1bb", b"x" * 100, "größe".encode())
    for number, name in enumerate(names):
        inner = os.path.join(os.fsencode(folder), name)
        os.makedirs(inner)
        with open(os.path.join(inner, b"\xff.png"), "wb") as file:
            file.write(png("red", number))
    assert page.post("/api/folder", json={"path": str(folder)}).status_code == 202
    settled(page)
    state = page.get("/api/state").json()
    names = {one["id"]: one["name"] for one in state["classes"]}
    assert sorted(names.values()) == ["Red Fox", "größe"]
    assert len(state["images"]) == 6
    assert sorted(names.get(image["label"], "") for image in state["images"]) == [
        "",
        "",
        "",
        "Red Fox",
        "Red Fox",
        "größe",
    ]
    assert len(state["problems"]) == 3
    assert all("come in without a class" in problem for problem in state["problems"])


def test_pipes_devices_and_the_project_itself_are_no_sources(page, project, tmp_path):
    folder = write_folder(tmp_path / "photos", 1)
    os.mkfifo(folder / "pipe.png")
    (folder / "endless.png").symlink_to("/dev/zero")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "more").symlink_to(folder / "red")
    (folder / "link.png").symlink_to(folder / "red/0.png")
    (folder / "mine").symlink_to(project.folder)
    assert page.post("/api/folder", json={"path": str(folder)}).json()["found"] == 4
    settled(page)
    assert len(page.get("/api/state").json()["images"]) == 3
    for own in (project.folder, project.folder / "images", folder / "mine"):
        refused(page.post("/api/folder", json={"path": str(own)}), 400, "belongs to this project")
    above = page.post("/api/folder", json={"path": str(tmp_path)}).json()  # the project's own copies are left out
    settled(page)
    assert above["found"] == 4
    with pytest.raises(DataError, match="no file"):
        read_file(folder / "pipe.png")
    with pytest.raises(DataError, match="no file"):
        read_file(folder / "endless.png")


def test_what_the_studio_did_not_write_is_not_replaced(page, project, tmp_path):
    page.post("/api/classes", json={"names": ["red", "green"]})
    for place, colour in enumerate(("red", "green"), 1):
        send(page, (f"{colour}.png", png(colour, 0)), label=f"c{place}")
    settled(page)
    kept = tmp_path / "documents"
    kept.mkdir()
    (kept / "letter.txt").write_text("dear")
    for name, post, body in (("adapter", "/api/save", None), ("exported-onnx", "/api/export", {"format": "onnx"})):
        place = project.folder / name
        place.symlink_to(kept)
        refused(page.post(post, json=body), 507, "isn't replaced")
        place.unlink()
        place.mkdir()
        (place / "notes.txt").write_text("mine")
        refused(page.post(post, json=body), 507, "isn't replaced")
        assert (place / "notes.txt").read_text() == "mine"
    assert (kept / "letter.txt").read_text() == "dear"
    (project.folder / "adapter/notes.txt").unlink()
    assert page.post("/api/save").status_code == 200
    assert page.post("/api/save").status_code == 200
