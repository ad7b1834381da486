"""The report, and the page of a server, in a real browser, headless: what they ask for, show and do.

Skipped where there is no Chromium; with STILLROOM_BROWSER=required, as in the gate, that is a failure.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_run import HOSTILE, make_comparison, make_pretraining, make_run

from serving import SECONDS, serving
from stillroom.deploy.predictor import Predictor
from stillroom.report.page import write
from tiny import make_teacher

webdriver = pytest.importorskip("selenium.webdriver")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
expected_conditions = pytest.importorskip("selenium.webdriver.support.expected_conditions")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-quic --disable-dev-shm-usage"
).split()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None or DRIVER is None:
        message = "no chromium and chromedriver here: apt-get install chromium chromium-driver"
        if os.environ.get("STILLROOM_BROWSER") == "required":
            pytest.fail(message)
        pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "run <script>window.hacked = 4<" / "b")
    return write(run)


@pytest.fixture
def page(browser: Any, report: Path) -> Any:
    """The browser with the page opened anew, on a screen for a desk."""
    screen(browser, 1200)
    media(browser, "light")
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(report.as_uri())
    return browser


def screen(browser: Any, width: int) -> None:
    values = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", values)


def media(browser: Any, scheme: str) -> None:
    values = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", values)


def asked(browser: Any) -> list[str]:
    """Return the addresses that the browser has asked for since its log was last read."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


def test_nothing_is_fetched_and_the_console_is_silent(page: Any, report: Path) -> None:
    assert asked(page) == [report.as_uri()]
    assert page.get_log("browser") == []


def test_a_servers_page_asks_its_own_server_alone(browser: Any, tmp_path: Path) -> None:
    make_teacher().save(tmp_path / "model")
    with serving(Predictor.load(tmp_path / "model")) as port:
        home = f"http://127.0.0.1:{port}"
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get(f"{home}/docs")
        operations = expected_conditions.presence_of_element_located(("css selector", ".opblock"))
        WebDriverWait(browser, SECONDS).until(operations)
        assert "/predict" in browser.find_element("css selector", "#swagger-ui").text
        found = asked(browser)
        assert f"{home}/openapi.json" in found
        assert all(url.startswith((f"{home}/", "data:")) for url in found), found
        assert browser.get_log("browser") == []


def test_the_policy_forbids_requests_even_if_a_script_tried(page: Any) -> None:
    found = page.execute_async_script(
        "const done = arguments[0];"
        "fetch('http://127.0.0.1:9/').then(() => done('went out'), (error) => done('refused'));"
        "document.addEventListener('securitypolicyviolation', (e) => done(e.violatedDirective));"
    )
    assert found in ("connect-src", "refused")
    assert any("Content Security Policy" in entry["message"] for entry in page.get_log("browser"))


def test_scripts_in_texts_labels_and_names_stay_text(page: Any) -> None:
    assert page.execute_script("return window.hacked") is None
    assert page.execute_script("return document.scripts.length") == 1
    assert page.execute_script("return document.images.length") == 0
    text = page.find_element("tag name", "body").text
    assert HOSTILE in text and "<script>window.hacked = 3</script>" in text


def column(page: Any, number: int) -> list[str]:
    return page.execute_script(
        "return [...document.querySelectorAll('#disagreements table[data-sortable] tbody tr')]"
        f".map((row) => row.cells[{number}].textContent)"
    )


def header(page: Any, name: str) -> Any:
    (found,) = [
        head
        for head in page.find_elements("css selector", "#disagreements table[data-sortable] th")
        if head.text.removesuffix("↕").strip() == name
    ]
    return found


def test_a_click_sorts_and_another_turns_round(page: Any) -> None:
    head = header(page, "row")
    assert head.get_attribute("aria-sort") == "none"
    before = column(page, 0)
    head.find_element("tag name", "button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    numbers = [int(text) for text in column(page, 0)]
    # As numbers: 9 comes before 10.
    assert numbers == sorted(int(text) for text in before) and len(numbers) > 10
    head.find_element("tag name", "button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert [int(text) for text in column(page, 0)] == numbers[::-1]
    assert page.find_element("id", "status").get_attribute("textContent") == "Sorted by row, descending."


def test_the_keyboard_sorts(page: Any) -> None:
    """Tab reaches the button, Enter and Space press it; only one column says that it is sorted."""
    first, second = header(page, "row"), header(page, "student")
    page.execute_script("arguments[0].focus()", first.find_element("tag name", "button"))
    page.switch_to.active_element.send_keys("\ue007")
    assert first.get_attribute("aria-sort") == "ascending"
    while page.switch_to.active_element.text != "student":
        page.switch_to.active_element.send_keys("\ue004")
    page.switch_to.active_element.send_keys(" ")
    assert second.get_attribute("aria-sort") == "ascending"
    assert first.get_attribute("aria-sort") == "none"
    place = page.execute_script("return arguments[0].cellIndex", second)
    said = column(page, place)
    # Compared as the browser compares words: case and punctuation count little.
    assert said == page.execute_script("return arguments[0].sort((a, b) => a.localeCompare(b))", list(said))
    assert len(set(said)) > 1


def test_every_picture_has_a_text_alternative(page: Any) -> None:
    pictures = page.find_elements("css selector", "svg")
    assert len(pictures) >= 8
    for picture in pictures:
        assert picture.get_attribute("role") == "img"
        assert len(picture.get_attribute("aria-label")) > 20


def test_tables_and_landmarks_are_named(page: Any) -> None:
    assert page.execute_script(
        "return [...document.querySelectorAll('table')].every((t) => t.caption && "
        "[...t.querySelectorAll('th')].every((h) => ['row', 'col'].includes(h.scope)))"
    )
    for name in ("header", "nav[aria-label]", "main", "footer", "h1"):
        assert len(page.find_elements("css selector", name)) == 1
    ids = page.execute_script("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    links = page.execute_script("return [...document.querySelectorAll('a')].map((a) => a.hash.slice(1))")
    assert set(links) <= set(ids)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1200])
def test_the_page_never_scrolls_sideways(page: Any, scheme: str, width: int) -> None:
    media(page, scheme)
    screen(page, width)
    page.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    assert page.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [360, 390])
def test_a_phone_shows_what_is_kept_and_the_speed_without_a_scroll(page: Any, width: int) -> None:
    """Of four models, the exported one with the longest name."""
    screen(page, width)
    right, shown = page.execute_script(
        "const table = document.querySelector('#costs table');"
        "const edge = table.parentElement.getBoundingClientRect().right;"
        "return [edge, [...table.tHead.rows[0].cells].map("
        "(cell) => [cell.textContent, cell.getBoundingClientRect().right])]"
    )
    names = [name for name, end in shown if end <= right]
    assert names[:4] == ["model", "accuracy kept", "speed", "MB on disk"]


@pytest.mark.parametrize("width", [360, 1200])
def test_a_comparison_fits_the_screen_in_silence(browser: Any, tmp_path: Path, width: int) -> None:
    screen(browser, width)
    browser.get_log("browser")
    browser.get(write(make_comparison(tmp_path / "compared")).as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return window.hacked") is None and browser.get_log("browser") == []
    pictures = browser.find_elements("css selector", "svg")
    assert len(pictures) == 7 and all(picture.get_attribute("aria-label") for picture in pictures)


@pytest.mark.parametrize("width", [320, 1200])
def test_a_pretraining_fits_the_screen_in_silence(browser: Any, tmp_path: Path, width: int) -> None:
    page = write(make_pretraining(tmp_path / "pretrained <script>window.hacked = 4<"))
    screen(browser, width)
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return window.hacked") is None
    assert asked(browser) == [page.as_uri()] and browser.get_log("browser") == []
    pictures = browser.find_elements("css selector", "svg")
    assert len(pictures) == 5 and all(len(each.get_attribute("aria-label")) > 20 for each in pictures)


def test_paper_shows_what_can_be_unfolded(page: Any) -> None:
    folded = "return document.querySelectorAll('details:not([open])').length"
    page.execute_script("document.querySelector('details').open = true")
    before = page.execute_script(folded)
    assert before > 0
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert page.execute_script(folded) == 0
    page.execute_script("dispatchEvent(new Event('afterprint'))")
    # What was open before stays open.
    assert page.execute_script(folded) == before
    assert page.execute_script("return document.querySelector('details').open")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_scheme_with_contrast(page: Any, scheme: str) -> None:
    """WCAG 2: 4.5 for text, by (lighter + .05) / (darker + .05)."""
    media(page, scheme)
    style = "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim()"
    paper = luminance(page.execute_script(style, "--paper"))
    assert (paper < 0.2) == (scheme == "dark")
    for role in ("ink", "soft", "teacher", "control", "student", "export"):
        ink = luminance(page.execute_script(style, f"--{role}"))
        ratio = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
        assert ratio >= 4.5, (role, ratio)
    # The pictures use the same variables.
    fill = "return getComputedStyle(document.querySelector('#costs svg text')).fill"
    light = page.execute_script(fill)
    media(page, "dark" if scheme == "light" else "light")
    assert page.execute_script(fill) != light
