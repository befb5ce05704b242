"""The HTML page in a browser, as a person uses it. Needs playwright and a Chromium, and axe-core for one test."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from report.page import write_page
from report.page.load import load_runs
from tests.conftest import ROOT
from tests.test_page import fabricate

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six runs and their page."""
    folder = tmp_path_factory.mktemp("browser")
    for steps, psnr in ((1, 30.0), (5, 24.0), (20, 9.0)):
        fabricate(folder / "fed" / "sme" / f"{steps}", "sme", "fed", psnr, local_epochs=steps)
    for defense, psnr in (("none", 35.0), ("gauss(sigma=0.1)", 11.0)):
        fabricate(folder / "grad" / "dlg" / defense, "dlg", psnr=psnr, defense=defense)
    fabricate(folder / "grad" / "dlg" / "audit", "dlg", psnr=33.0, dataset="leaves", config={"audit": True})
    write_page([folder], folder / "page.html")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as engine:
        try:
            found = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium that starts: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, study: Path) -> Iterator[Any]:
    """The page from disk, without a network; the test fails for anything on the console and for any request."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened, complaints = context.new_page(), []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url))
    opened.goto((study / "page.html").as_uri())
    yield opened
    context.close()
    assert not complaints


def column(page: Any, name: str) -> list[str]:
    return page.locator(f'.runs tbody tr:visible td[data-label="{name}"]').evaluate_all(
        "cells => cells.map((cell) => cell.dataset.value)"
    )


def test_columns_sort_both_ways(page: Any) -> None:
    for name in ("PSNR (dB)", "recovered", "above null (dB)"):
        before = sorted(float(value) for value in column(page, name))
        button = page.get_by_role("button", name=name, exact=True)
        button.click()
        assert [float(value) for value in column(page, name)] == before[::-1]
        button.press("Enter")  # by keyboard
        assert [float(value) for value in column(page, name)] == before
        assert page.locator("th[aria-sort=ascending]").count() == 1
    page.get_by_role("button", name="attack", exact=True).click()
    assert column(page, "attack") == sorted(column(page, "attack"))


def test_filters_leave_the_runs_that_match_in_table_and_articles(page: Any) -> None:
    page.locator('[data-filter="mode"]').select_option("fed")
    page.locator('[data-filter="local steps"]').select_option("5")
    assert column(page, "attack") == ["sme"] and page.locator("article:visible").count() == 1
    assert page.locator("[data-count]").inner_text() == "1 of 6 runs"
    page.get_by_role("button", name="Show all").click()
    assert len(column(page, "attack")) == 6
    for name, value, count in (("attack", "dlg", 3), ("defence", "gauss(sigma=0.1)", 1), ("data", "leaves", 1)):
        page.locator(f'[data-filter="{name}"]').select_option(value)
        assert len(column(page, "attack")) == count
        page.get_by_role("button", name="Show all").click()
    page.get_by_label("any word").fill("gauss")
    assert column(page, "defence") == ["gauss(sigma=0.1)"]


def test_pictures_are_enlarged_crisply_and_stepped_through(page: Any) -> None:
    first = page.locator("article .enlarge").first
    first.focus()
    first.press("Enter")
    box = page.locator("#lightbox")
    assert box.is_visible() and box.locator("img").count() == 2
    assert box.locator("img").first.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert box.locator("img").first.bounding_box()["width"] > 300
    caption = page.locator("#lightbox-caption").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#lightbox-caption").inner_text() != caption
    page.keyboard.press("Escape")
    assert not box.is_visible()
    assert first.evaluate("button => document.activeElement === button")


def test_the_command_is_copied(page: Any) -> None:
    article = page.locator("article").first
    article.get_by_role("button", name="Copy the command").click()
    sync_api.expect(article.locator("[data-copy]")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == article.locator(".command code").inner_text()


def test_drawings_say_exact_values_by_pointer_and_by_keyboard(page: Any, study: Path) -> None:
    drawing = page.locator("#curves svg").first
    drawing.focus()
    page.keyboard.press("ArrowDown")
    run = next(run for run in load_runs([study])[0] if run.local_steps == 1)
    assert f"sme: local steps 1: {run.summary['psnr']['mean']:.6g} dB" in page.locator("#tip").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    frame = drawing.bounding_box()
    page.mouse.move(frame["x"] + frame["width"] * 0.55, frame["y"] + frame["height"] * 0.5)
    assert "dB" in page.locator("#tip").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(page: Any, scheme: str) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_label("sort by").select_option(label="PSNR (dB)")
    assert [float(v) for v in column(page, "PSNR (dB)")] == sorted(map(float, column(page, "PSNR (dB)")), reverse=True)


def test_the_pdf_holds_every_run(page: Any) -> None:
    page.emulate_media(media="print")
    assert page.locator("article:visible").count() == 6
    assert page.locator(".filters").is_hidden()
    assert page.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Any, scheme: str) -> None:
    places = [os.environ.get("AXE_CORE", ""), str(ROOT / "node_modules" / "axe-core" / "axe.min.js")]
    source = next((Path(place) for place in places if place and Path(place).is_file()), None)
    if source is None:
        pytest.skip("axe-core is not installed: `npm install axe-core`, or AXE_CORE=.../axe.min.js")
    page.emulate_media(color_scheme=scheme)
    page.add_style_tag(content="article.run { content-visibility: visible !important }")
    page.evaluate(source.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run().then((result) => result.violations)")
    serious = [
        (v["id"], [n["html"][:160] for n in v["nodes"][:3]]) for v in found if v["impact"] in ("serious", "critical")
    ]
    assert not serious, serious
