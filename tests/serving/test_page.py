"""The server's page in headless Chromium."""

import pytest

from jaxgpt.data.show import saved_example
from tests.browser import boxes, browser, fits, overlaps, sized  # noqa: F401
from tests.conftest import wait_until
from tests.serving.test_serve import start, workdir  # noqa: F401

pytestmark = pytest.mark.browser  # needs chromium, chromedriver and the extra [browser]


def test_type_a_prompt_and_watch_it_complete(browser, workdir):  # noqa: F811
    process, address = start(workdir)
    try:
        browser.get(address)
        wait_until(lambda: browser.find_element("id", "model").text == "run")
        box, note = browser.find_element("id", "prompt"), browser.find_element("id", "note")
        assert box.get_property("value") == saved_example(workdir / "tokenizer").prompt != ""
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
        for width in (1100, 390, 320):
            sized(browser, width)
            assert fits(browser, width)
            controls = boxes(browser, "h1, textarea, label, button")
            assert len(controls) == 10 and overlaps(controls) == []
            assert all(inner >= content for *_, content, inner in boxes(browser, "label, button"))
            tops = {top for _, _, top, *_ in boxes(browser, "label, button")}
            assert len(tops) <= (2 if width == 1100 else 3), "as few rows as there is room for"
        field = browser.find_element("id", "max_tokens")
        field.clear()
        field.send_keys("5000")
        browser.find_element("id", "go").click()
        wait_until(lambda: "ask for at most 117 new tokens" in note.text)
        assert "bad" in note.get_attribute("class")
    finally:
        process.terminate()
        process.wait()
