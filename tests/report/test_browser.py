"""The report in a real browser: it works, asks nobody for anything, and complains of nothing. `make test-browser` runs this.

HANDFUL_BROWSER=1 runs it; HANDFUL_SCREENSHOTS=DIR keeps the pictures that it takes.
"""

from __future__ import annotations

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from support.reports import reported_run

pytestmark = pytest.mark.skipif(not os.environ.get("HANDFUL_BROWSER"), reason="make test-browser runs this")

LEAST_CONTRAST = """
const part = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = (text) => {
  const [r, g, b] = text.match(/[0-9.]+/g).map(Number).map(part);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (!colour.endsWith(', 0)')) return colour;
  }
  return 'rgb(255, 255, 255)';
};
const ratios = [...document.querySelectorAll('p, h1, h2, h3, td, th, a, code, button, span.who, caption')].map((e) => {
  const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
});
return Math.min(...ratios);
"""
WIDTHS = {"desktop": (1200, 1000), "phone": (390, 844)}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    from handful.report.html import report

    given = os.environ.get("HANDFUL_REPORT")
    return Path(given) if given else report([reported_run(tmp_path_factory.mktemp("run"))])


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    names = ("chromium", "chromium-browser", "google-chrome")
    options.binary_location = next(found for name in names if (found := shutil.which(name)))
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--force-device-scale-factor=1",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def opened(browser, page: Path, size: str = "desktop", scheme: str = "light") -> None:
    width, height = WIDTHS[size]
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.get(page.as_uri())


def keep(browser, name: str) -> None:
    if folder := os.environ.get("HANDFUL_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        assert browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def one(browser, selector: str):
    return browser.find_element("css selector", selector)


def many(browser, selector: str) -> list:
    return browser.find_elements("css selector", selector)


def test_it_makes_no_request_and_the_console_stays_empty(browser, page):
    opened(browser, page)
    many(browser, ".tile")[0].click()
    one(browser, "#close").click()
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert browser.get_log("browser") == []
    keep(browser, "report")


def test_the_class_filter_shows_one_class_and_all_again(browser, page):
    opened(browser, page)
    every = len(many(browser, "#gallery h3"))
    assert every == len(many(browser, "#class-filter option")) - 1
    choices = many(browser, "#class-filter option")
    choices[2].click()
    assert [title.text for title in many(browser, "#gallery h3")] == [choices[2].text]
    assert one(browser, "#filter-status").text == f"1 of {every} classes"
    choices[0].click()
    assert len(many(browser, "#gallery h3")) == every


def test_an_image_opens_by_keyboard_with_its_nearest_exemplar_and_gives_the_focus_back(browser, page):
    from selenium.webdriver.common.keys import Keys

    opened(browser, page)
    tile = many(browser, ".tile")[0]
    tile.send_keys(Keys.ENTER)
    assert one(browser, "#details").is_displayed()
    facts = one(browser, "#details-facts").text
    assert "nearest exemplar" in facts
    assert "distance" in facts
    assert one(browser, "#details-exemplar").get_attribute("src").startswith("data:image/")
    title = one(browser, "#details-title").text
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert one(browser, "#details-title").text != title
    keep(browser, "report-details")
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not one(browser, "#details").is_displayed()
    assert browser.switch_to.active_element == tile


def test_the_copy_gallery_is_sorted_by_distance_and_opens(browser, page):
    opened(browser, page)
    pairs = many(browser, ".pair")
    distances = [float(pair.text.rpartition(": ")[2]) for pair in pairs]
    assert distances == sorted(distances)
    assert all(len(pair.find_elements("css selector", "img")) == 2 for pair in pairs)
    browser.execute_script("arguments[0].scrollIntoView()", one(browser, "#copies"))
    keep(browser, "report-copies")
    pairs[0].click()
    assert one(browser, "#details").is_displayed()


def test_every_control_has_a_name_and_every_picture_a_text(browser, page):
    """What a screen reader says; and headings leave no level out."""
    opened(browser, page)
    assert [
        each.get_attribute("id")
        for each in many(browser, "button, select, a")
        if each.is_displayed() and not each.accessible_name
    ] == []
    textless = "[...document.querySelectorAll('main img')].filter(i => !i.alt && !i.closest('button[aria-label]'))"
    assert browser.execute_script(f"return {textless}.length") == 0
    levels = browser.execute_script("return [...document.querySelectorAll('h1, main h2, main h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    for landmark in ("header", "nav", "main", "footer"):
        assert len(many(browser, f"body > {landmark}")) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(browser, page, scheme):
    """WCAG's contrast of 4.5 between every text and the paper behind it."""
    opened(browser, page, scheme=scheme)
    worst = browser.execute_script(LEAST_CONTRAST)
    assert worst >= 4.5
    if scheme == "dark":
        browser.execute_script("arguments[0].scrollIntoView()", one(browser, "#metrics"))
        keep(browser, "report-dark")


def test_on_a_phone_nothing_is_wider_than_the_screen(browser, page):
    opened(browser, page, "phone")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= WIDTHS["phone"][0]
    keep(browser, "report-phone")


def test_the_recipe_is_copied(browser, page):
    opened(browser, page)
    one(browser, "#copy-recipe").click()
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 5).until(lambda _: one(browser, "#copy-status").text)
    assert one(browser, "#copy-status").text == "Copied."
