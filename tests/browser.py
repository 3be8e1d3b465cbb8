"""Headless Chromium for the tests of pages (marker `browser`)."""

import pytest

BOXES = """
return [...document.querySelectorAll(arguments[0])].map(node => {
  const { left, top, right, bottom } = node.getBoundingClientRect();
  return [node.textContent, left, top, right, bottom, node.scrollWidth, node.clientWidth];
}).filter(box => box[3] > box[1]);
"""  # of what is shown


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
    """What the page wrote to the console as an error."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def sized(browser, width: int, dark: bool = False) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def fits(browser, width: int) -> bool:
    """Whether the page needs no scrolling sideways; `innerWidth` grows with it on a phone."""
    return browser.execute_script("return document.documentElement.scrollWidth") <= width


def boxes(browser, selector: str) -> list[tuple]:
    """(text, left, top, right, bottom, width of the content, width inside) of what is shown."""
    return [tuple(box) for box in browser.execute_script(BOXES, selector)]


def overlaps(found: list[tuple]) -> list[tuple[str, str]]:
    """The texts of each two boxes that share more than a pixel."""
    return [
        (a[0], b[0])
        for i, a in enumerate(found)
        for b in found[:i]
        if min(a[3], b[3]) - max(a[1], b[1]) > 1 and min(a[4], b[4]) - max(a[2], b[2]) > 1
    ]
