"""The two pages in headless Chromium: typing a prompt, and looking at a report."""

import pytest

from jaxgpt import report
from tests.conftest import wait_until
from tests.serving.test_serve import start, workdir  # noqa: F401

pytestmark = pytest.mark.browser  # needs chromium, chromedriver and the extra [browser]


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


def complaints(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def sized(browser, width: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )


def fits(browser) -> bool:
    return browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_type_a_prompt_and_watch_it_complete(browser, workdir):  # noqa: F811
    process, address = start(workdir)
    try:
        browser.get(address)
        wait_until(lambda: browser.find_element("id", "model").text == "run")
        box, note = browser.find_element("id", "prompt"), browser.find_element("id", "note")
        box.clear()
        box.send_keys("The licence")
        for name, value in (("max_tokens", "60"), ("temperature", "0")):
            field = browser.find_element("id", name)
            field.clear()
            field.send_keys(value)
        browser.find_element("id", "go").click()
        wait_until(lambda: "60 tokens in" in note.text)
        text = browser.find_element("id", "out").get_property("textContent")
        assert text.startswith("The licence") and len(text) > 20
        sized(browser, 360)
        assert fits(browser)
        field = browser.find_element("id", "max_tokens")
        field.clear()
        field.send_keys("5000")
        browser.find_element("id", "go").click()
        wait_until(lambda: "ask for at most 117 new tokens" in note.text)
        assert "bad" in note.get_attribute("class")
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_report_draws_and_fits(browser, workdir, command, tmp_path, width, dark):  # noqa: F811
    out = tmp_path / "report.html"
    runs = [f"--workdir={workdir}"] * (2 if dark else 1)
    assert command(report.main, *runs, f"--out={out}")[0] == 0
    sized(browser, width)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get_log("browser")
    browser.get(f"file://{out}")
    charts = browser.find_elements("css selector", "figure svg path")
    assert len(charts) >= 4 and all(
        path.get_attribute("d").count("L") > 0 or "M" in path.get_attribute("d") for path in charts
    )
    assert fits(browser) and complaints(browser) == []
    assert "learning_rate" in browser.find_element("id", "config").text
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (not dark)
