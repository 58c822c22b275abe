"""The page in a real browser: sorted, filtered, looked at on a phone's width."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adaptkit.sweeps.report.aggregate import gather
from adaptkit.sweeps.report.writing import write_report
from adaptkit.sweeps.results import BadRun
from tests.sweeps.report.build import seeds

pytestmark = pytest.mark.browser

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_WIDE, _PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed (the dev extra brings it)")
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip(f"no Chromium was found (looked for {', '.join(_NAMES)}): apt-get install chromium")
    with api.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = []
    long = "a_dataset_with_quite_a_long_name_" * 3
    for dataset in ("digits", long):
        for shots in (1, 16):
            facts = {"dataset": dataset, "shots": shots, "names": [f"class {'x' * 60} {n}" for n in range(4)]}
            runs += seeds(folder, "zero-shot", [0.4] * 2, **facts)
            runs += seeds(folder, "coop", [0.8, 0.85], **facts)
            runs += seeds(folder, "maple", [0.6, 0.7], **facts)
    path = folder / "page.html"
    write_report(gather(runs, [BadRun(f"/{'long/' * 40}", "it is torn.")]), {"html": path})
    return path


@pytest.fixture
def opened(browser, page_file) -> Iterator[Any]:
    """Open the page at a size; fails on any message, error or request."""
    heard: list[str] = []
    contexts = []

    def open_at(size: dict[str, int], scheme: str = "light", anchor: str = "") -> Any:
        context = browser.new_context(viewport=size, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("request", lambda request: request.url[:5] in ("file:", "data:") or heard.append(request.url))
        page.goto(page_file.as_uri() + anchor)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert heard == []


def results(page: Any) -> Any:
    return page.locator("figure.sheet").filter(has=page.get_by_role("heading", name="Results", exact=True))


def column(sheet: Any, number: int) -> list[str]:
    """Texts of a column's visible cells."""
    return sheet.locator(f"tbody tr:not([hidden]) > :nth-child({number})").all_inner_texts()


def test_a_click_sorts_and_another_turns_it_round(opened):
    sheet = results(opened(_WIDE))
    place = sheet.locator("thead th").all_inner_texts()
    number = next(index for index, text in enumerate(place, 1) if text.strip() == "accuracy")
    head = sheet.locator("thead th").nth(number - 1)
    before = column(sheet, number)
    assert head.get_attribute("aria-sort") == "none"
    opened_button(sheet, "accuracy").click()
    assert head.get_attribute("aria-sort") == "descending"
    falling = [float(text.split()[0]) for text in column(sheet, number)]
    assert falling == sorted(falling, reverse=True)
    assert column(sheet, number) != before
    opened_button(sheet, "accuracy").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(text.split()[0]) for text in column(sheet, number)] == falling[::-1]
    assert sheet.locator('th[aria-sort="none"]').count() == len(place) - 1


def opened_button(sheet: Any, name: str) -> Any:
    return sheet.get_by_role("button", name=name, exact=True)


def test_the_keyboard_sorts_too(opened):
    page = opened(_WIDE)
    sheet = results(page)
    opened_button(sheet, "method").focus()
    page.keyboard.press("Enter")
    names = column(sheet, 1)
    assert names == sorted(names)
    page.keyboard.press("Space")
    assert column(sheet, 1) == names[::-1]


def test_filters_by_text_and_choice(opened):
    sheet = results(opened(_WIDE))
    assert len(column(sheet, 1)) == 12
    sheet.get_by_role("searchbox").fill("COOP digits")
    assert set(column(sheet, 1)) == {"coop"}
    assert sheet.locator("output").inner_text() == "2 of 12 rows"
    sheet.get_by_role("searchbox").fill("")
    sheet.get_by_label("shots").select_option("16")
    sheet.get_by_label("method").select_option("maple")
    assert len(column(sheet, 1)) == 2
    opened_button(sheet, "accuracy").click()
    assert len(column(sheet, 1)) == 2
    sheet.get_by_role("searchbox").fill("nothing like this")
    assert column(sheet, 1) == []
    assert sheet.locator("output").inner_text() == "0 of 12 rows"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [_WIDE, _PHONE], ids=["desktop", "phone"])
def test_nothing_is_wider_than_the_screen(opened, size, scheme):
    page = opened(size, scheme)
    page.evaluate("for (const item of document.querySelectorAll('details')) item.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    beyond = page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter((item) => !item.closest(".scroll, pre, svg") &&
             item.getBoundingClientRect().right > innerWidth + 1).map((item) => item.outerHTML.slice(0, 120))"""
    )
    assert beyond == []
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (brightness(ink) > brightness(paper)) == (scheme == "dark")
    assert abs(brightness(ink) - brightness(paper)) > 150


def brightness(colour: str) -> float:
    red, green, blue = (int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(", ")[:3])
    return 0.3 * red + 0.6 * green + 0.1 * blue


def test_a_number_leads_to_its_runs_and_the_command(opened):
    page = opened(_WIDE)
    link = results(page).locator("tbody td a").first
    target = link.get_attribute("href")
    link.click()
    runs = page.locator(f"details{target}")
    page.wait_for_function("target => document.querySelector(target).open", arg=target)
    assert "adaptkit run --method" in runs.inner_text()
    again = opened(_WIDE, anchor=target)
    assert again.locator(f"details{target}").get_attribute("open") is not None


def test_printing_opens_what_is_folded_and_closes_it_again(opened):
    page = opened(_WIDE)
    folded = "document.querySelectorAll('.group:not([open])').length"
    before = page.evaluate(folded)
    assert before > 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(folded) == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(folded) == before
