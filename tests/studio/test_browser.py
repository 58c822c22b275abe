"""The page in a real browser: clicks, keys and drops, a phone's width, light and dark, and no request elsewhere."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="uvicorn isn't installed (the studio extra brings it)")

import uvicorn

from adaptkit.commands.studio import listen
from adaptkit.studio import engine
from adaptkit.studio.app import make_app
from adaptkit.studio.project import Project
from adaptkit.studio.workshop import Workshop
from tests.studio.conftest import COLOURS, png, write_folder

pytestmark = [pytest.mark.browser, pytest.mark.slow]  # with clocks of the page's own: not for every run

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_WIDE, _PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
_CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed (the dev extra brings it)")
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip(f"no Chromium was found (looked for {', '.join(_NAMES)}): apt-get install chromium")
    with api.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program, args=["--no-sandbox", *_CAMERA])
        yield running
        running.close()


class Served:
    """A studio on a port of its own, in a thread."""

    def __init__(self, folder, mini) -> None:
        self.project = Project(folder)
        socket = listen(0)
        self.base = f"http://127.0.0.1:{socket.getsockname()[1]}"
        app = make_app(Workshop(self.project, mini), "token", socket.getsockname()[1])
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [socket]}, daemon=True)
        self.thread.start()

    def end(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.project.close()


@pytest.fixture
def studio(tmp_path, mini) -> Iterator[Served]:
    served = Served(tmp_path / "work", mini)
    yield served
    served.end()


@pytest.fixture
def opened(browser, studio) -> Iterator[Any]:
    """Open the page at a size; fails on any message, error, or request to another address."""
    heard: list[str] = []
    contexts = []

    def open_at(size: dict[str, int] = _WIDE, scheme: str = "light") -> Any:
        context = browser.new_context(viewport=size, color_scheme=scheme, permissions=["clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("request", lambda asked: asked.url.startswith((studio.base, "blob:")) or heard.append(asked.url))
        page.goto(f"{studio.base}/?token=token")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert [text for text in heard if "responded with a status of 4" not in text] == []  # Chromium's own


def until(condition, seconds: float = 60) -> None:
    """Wait for something in Python; the page's own policy forbids waiting by JavaScript texts."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it didn't happen in time"
        time.sleep(0.03)


def pictures(*colours: str, count: int = 3, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"name": f"{colour}-{n}.png", "mimeType": "image/png", "buffer": png(colour, first + n)}
        for colour in colours
        for n in range(count)
    ]


def add_classes(page: Any, text: str) -> None:
    page.get_by_label("Name of a new class").fill(text)
    page.get_by_role("button", name="Add", exact=True).click()
    page.locator("#classes li").nth(len(text.split(",")) - 1).wait_for()


def drop(page: Any, target: str, files: list[dict[str, Any]]) -> None:
    """Drop files on an element, as a person's mouse would."""
    given = [[one["name"], base64.b64encode(one["buffer"]).decode()] for one in files]
    transfer = page.evaluate_handle(
        """(given) => { const transfer = new DataTransfer();
        for (const [name, text] of given) {
          const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
          transfer.items.add(new File([bytes], name, { type: "image/png" }));
        } return transfer; }""",
        given,
    )
    page.dispatch_event(target, "dragover", {"dataTransfer": transfer})
    page.dispatch_event(target, "drop", {"dataTransfer": transfer})


def labels(studio: Served) -> dict[str, str | None]:
    """What each image is called and labelled, as it lies on disk."""
    content = json.loads((studio.project.folder / "project.json").read_text())
    return {
        image["name"]: image["label"] and content["classes"][image["label"]] for image in content["images"].values()
    }


def listed(page: Any, **counts: int) -> None:
    """Wait until the page knows so many images of a kind: what is on disk comes to it a moment later."""
    for kind, count in counts.items():
        page.locator("#tabs button", has_text=re.compile(f"^{kind} +{count}$", re.IGNORECASE)).wait_for()


def guessed(page: Any, count: int) -> None:
    """Wait until so many images are shown with a guess."""
    until(lambda: page.locator("#grid .card .guess", has_text="%").count() == count)


def test_the_whole_way_by_keyboard_alone(opened, studio):
    """From an empty page to a saved classifier without touching a mouse."""
    page = opened()
    page.on("filechooser", lambda chooser: None)  # the driver catches choosers from now on, not first at the key
    until(lambda: "No images yet" in page.locator("#empty").inner_text())
    for _ in range(12):  # Tab leads to the field for names
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "class-name":
            break
    for name in ("red", "green"):
        page.keyboard.type(name)
        page.keyboard.press("Enter")
        until(lambda: page.locator("#class-name").input_value() == "")
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "files":
            break
    assert page.evaluate("document.activeElement.id") == "files"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(pictures("red", "green"))
    guessed(page, 6)
    page.keyboard.press("u")
    assert page.evaluate("document.activeElement.className").startswith("card")
    for number in range(6):
        name = page.evaluate("document.activeElement.getAttribute('aria-label')").split("-")[0]
        page.keyboard.press("1" if name == "red" else "2")
        until(lambda number=number: sum(label is not None for label in labels(studio).values()) == number + 1)
        listed(page, labelled=number + 1)
    assert labels(studio) == {f"{c}-{n}.png": c for c in ("red", "green") for n in range(3)}
    page.locator("#accuracy", has_text="100\u00a0%").wait_for()
    page.locator("#save").focus()
    page.keyboard.press("Enter")
    page.get_by_role("status").filter(has_text="Saved to").wait_for()
    assert (studio.project.folder / "adapter" / "adapter_config.json").exists()


def test_keys_correct_choose_undo_and_remove(opened, studio):
    page = opened()
    add_classes(page, "red, green, blue")
    page.locator("#files").set_input_files(pictures("red", "green"))
    guessed(page, 6)
    page.keyboard.press("u")
    page.keyboard.press("a")
    assert page.locator('.card[aria-selected="true"]').count() == 6
    page.keyboard.press("3")
    until(lambda: set(labels(studio).values()) == {"blue"})
    listed(page, labelled=6)
    page.keyboard.press("Control+z")
    until(lambda: set(labels(studio).values()) == {None})
    listed(page, labelled=0)
    page.keyboard.press("Control+y")
    until(lambda: set(labels(studio).values()) == {"blue"})
    listed(page, labelled=6)
    page.keyboard.press("l")
    until(lambda: page.locator("#grid .card").count() == 6)
    page.keyboard.press("Home")
    page.keyboard.press("c")
    page.keyboard.type("gr")
    page.keyboard.press("Enter")
    until(lambda: list(labels(studio).values()).count("green") == 1)
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Backspace")
    until(lambda: list(labels(studio).values()).count(None) == 3)
    listed(page, unlabelled=3)
    page.keyboard.press("u")
    until(lambda: page.locator("#grid .card").count() == 3)
    page.keyboard.press("Delete")
    until(lambda: len(labels(studio)) == 5)
    listed(page, unlabelled=2)
    page.keyboard.press("Control+z")
    until(lambda: len(labels(studio)) == 6)
    listed(page, unlabelled=3)
    guessed(page, 3)
    page.keyboard.press("u")
    shown = page.evaluate("document.activeElement.getAttribute('aria-label')")
    guess, name = shown.split(": ")[1].split("?")[0], shown.split(": ")[0]
    page.keyboard.press("Enter")
    until(lambda: labels(studio)[name] == guess)
    page.keyboard.press("?")
    assert page.get_by_role("dialog").get_by_text("the guess is right").is_visible()
    page.keyboard.press("Escape")


def test_all_that_keys_do_can_be_tapped(opened, studio):
    """On a phone: a guess accepted, a label taken away, an image removed and brought back."""
    page = opened(_PHONE)
    add_classes(page, "red, green")
    page.locator("#files").set_input_files(pictures("red", count=2))
    guessed(page, 2)
    page.locator(".card").first.click()
    guess = page.locator(".card .guess").first.inner_text().split("?")[0]
    page.get_by_role("button", name="The guess is right").click()
    until(lambda: list(labels(studio).values()).count(guess) == 1)
    listed(page, labelled=1, unlabelled=1)
    page.locator("#tabs button", has_text="Labelled").nth(1).click()
    page.locator(".card").click()
    page.get_by_role("button", name="Take the label away").click()
    until(lambda: set(labels(studio).values()) == {None})
    listed(page, unlabelled=2)
    page.locator("#tabs button", has_text="Unlabelled").click()
    page.locator(".card").first.click()
    page.get_by_role("button", name="Remove the image").click()
    until(lambda: len(labels(studio)) == 1)
    listed(page, unlabelled=1)
    page.get_by_role("button", name="Undo").click()
    until(lambda: len(labels(studio)) == 2)
    listed(page, unlabelled=2)


def test_drops_on_the_page_and_on_a_class(opened, studio):
    page = opened()
    add_classes(page, "red, green")
    drop(page, "#drop", pictures("red", count=2))
    drop(page, "#classes li:nth-child(2)", pictures("green", count=2))
    until(lambda: len(labels(studio)) == 4)
    assert labels(studio) == {"red-0.png": None, "red-1.png": None, "green-0.png": "green", "green-1.png": "green"}
    until(lambda: page.locator("#classes .count").all_inner_texts() == ["0", "2"])
    drop(page, "body", [{"name": "no.png", "mimeType": "image/png", "buffer": b"no"}, *pictures("red", first=5)[:1]])
    page.get_by_role("alert").filter(has_text="no.png isn't an image").wait_for()
    until(lambda: len(studio.project.state.images) == 5)


def test_a_folder_is_copied_in_and_judged(opened, studio, tmp_path):
    write_folder(tmp_path / "photos", 4)
    page = opened()
    page.get_by_label("or a folder of this computer").fill(str(tmp_path / "nowhere"))
    page.get_by_role("button", name="Copy in").click()
    page.get_by_role("alert").filter(has_text="There is no folder").wait_for()
    page.get_by_label("or a folder of this computer").fill(str(tmp_path / "photos"))
    page.get_by_role("button", name="Copy in").click()
    page.locator("#accuracy", has_text="100\u00a0%").wait_for()
    assert page.locator("#classes li").count() == len(COLOURS)
    assert "12 of 12 labelled images" in page.locator("#estimate").inner_text()
    page.keyboard.press("l")
    page.keyboard.press("Home")
    first = page.evaluate("document.activeElement.dataset.id")
    page.locator("#classes .class", has_text="red").click()
    page.locator("#confused figure").wait_for()
    assert page.locator("#confused figcaption").first.inner_text().startswith("red taken for blue 1×")
    page.keyboard.press("u")
    page.locator("#confused .picture").click()
    until(lambda: page.evaluate("document.activeElement.dataset.id") is not None)
    assert page.evaluate("document.activeElement.dataset.id") == first  # brought to where it can be corrected
    page.keyboard.press("w")
    until(lambda: page.locator("#grid .card").count() == 1)
    page.keyboard.press("1")  # blue again
    page.locator("#accuracy", has_text="100\u00a0%").wait_for()


def test_methods_are_compared_and_chosen(opened, studio, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "OFFERED", ("zero-shot", "tip-adapter", "gda", "linear-probe"))  # the fastest
    page = opened()
    page.get_by_label("or a folder of this computer").fill(str(write_folder(tmp_path / "photos", 2)))
    page.get_by_role("button", name="Copy in").click()
    page.locator("#accuracy").wait_for()
    page.get_by_role("button", name="Compare all on these images").click()
    until(lambda: page.locator("#compared tbody tr").count() == 4, 60)
    page.locator("#compared").get_by_role("button", name="gda", exact=True).click()
    until(lambda: studio.project.state.settings.method == "gda")
    page.get_by_text("The same in Python").click()
    page.locator("#code", has_text='FewShotClassifier("gda"').wait_for()
    page.get_by_label("answers with").select_option("linear-probe")
    page.locator("#code", has_text='FewShotClassifier("linear-probe"').wait_for()
    page.get_by_role("button", name="Copy", exact=True).click()
    page.get_by_role("status").filter(has_text="Copied.").wait_for()


def test_new_images_and_the_camera_are_answered_and_not_kept(opened, studio):
    page = opened()
    add_classes(page, "red, green")
    page.locator("#try-files").set_input_files(pictures("red", count=1))
    page.locator("#tried li li").first.wait_for()
    assert labels(studio) == {}
    page.get_by_role("button", name="Camera").click()
    until(lambda: "%" in page.locator("#camera-answer").inner_text())
    page.get_by_role("button", name="Keep this picture").click()
    until(lambda: len(labels(studio)) == 1)
    page.get_by_role("button", name="Stop").click()
    assert page.locator("#video").is_hidden()
    page.get_by_role("button", name="Keep it, to label").click()
    until(lambda: "red-0.png" in labels(studio))


def test_classes_are_renamed_and_removed(opened, studio):
    page = opened()
    add_classes(page, "red, green")
    page.get_by_role("button", name="Rename or remove red").click()
    page.get_by_role("dialog").get_by_label("Name").fill("green")
    page.get_by_role("button", name="Rename", exact=True).click()
    page.get_by_role("alert").filter(has_text="There is a class 'green' already").wait_for()
    page.get_by_role("button", name="Rename or remove red").click()
    page.get_by_role("dialog").get_by_label("Name").fill("<b>crimson</b>")
    page.keyboard.press("Enter")
    page.locator("#classes .name", has_text="<b>crimson</b>").wait_for()
    page.get_by_role("button", name="Rename or remove green").click()
    page.get_by_role("button", name="Remove the class").click()
    until(lambda: page.locator("#classes li").count() == 1)
    page.get_by_role("button", name="Undo").click()
    until(lambda: page.locator("#classes li").count() == 2)


def test_a_page_opened_again_stands_where_it_was(opened, studio):
    page = opened()
    add_classes(page, "red, green")
    page.locator("#files").set_input_files(pictures("red"))
    guessed(page, 3)
    page.reload()
    guessed(page, 3)
    assert page.locator("#classes .name").all_inner_texts() == ["red", "green"]
    assert page.get_by_role("button", name="Undo").is_enabled()


def test_a_studio_that_has_ended_is_said_so(browser, studio):
    page = browser.new_page()
    page.goto(f"{studio.base}/?token=token")
    add_classes(page, "red")
    studio.end()
    page.get_by_label("Name of a new class").fill("green")
    page.get_by_role("button", name="Add", exact=True).click()
    page.get_by_role("alert").filter(has_text="is it still running").wait_for()
    assert page.get_by_label("Name of a new class").input_value() == "green"  # what was written is still there
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [_WIDE, _PHONE], ids=["desktop", "phone"])
def test_nothing_is_wider_than_the_screen(opened, studio, size, scheme):
    page = opened(size, scheme)
    add_classes(page, f"{'long' * 18}, red, green")
    page.locator("#files").set_input_files(pictures("red", "green", "blue"))
    guessed(page, 9)
    page.locator(".card").first.click()
    page.get_by_text("The same in Python").click()
    page.locator("#code", has_text="FewShotClassifier").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    beyond = page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter((item) => !item.closest("pre, .hidden, .skip, dialog")
             && item.getBoundingClientRect().right > innerWidth + 1).map((item) => item.outerHTML.slice(0, 120))"""
    )
    assert beyond == []
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, .button, select")].filter((item) => item.offsetParent)
             .map((item) => item.getBoundingClientRect()).filter((box) => box.height < 24 || box.width < 24).length"""
    )
    assert small == 0
    for one in ("body", ".card .guess", "#note", "#tabs button[aria-selected=true]", ".class .name", ".quiet"):
        assert contrast(page, one) >= 4.5, one


def contrast(page: Any, selector: str) -> float:
    """WCAG's contrast of an element's text with what lies behind it."""
    ink, paper = page.evaluate(
        """(selector) => { let item = document.querySelector(selector); const ink = getComputedStyle(item).color;
        while (item) { const colour = getComputedStyle(item).backgroundColor;
          if (colour !== "rgba(0, 0, 0, 0)") return [ink, colour]; item = item.parentElement; }
        return [ink, "rgb(255, 255, 255)"]; }""",
        selector,
    )
    first, second = sorted((luminance(ink), luminance(paper)), reverse=True)
    return (first + 0.05) / (second + 0.05)


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(", ")[:3]]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
