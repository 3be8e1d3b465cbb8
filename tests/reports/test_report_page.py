"""A report in headless Chromium: it fits, no label covers another, its switches work."""

import json

import pytest

from jaxgpt import report
from tests.browser import boxes, browser, complaints, fits, overlaps, sized  # noqa: F401
from tests.reports.test_gather import written

pytestmark = pytest.mark.browser  # needs chromium, chromedriver and the extra [browser]

LONG = "a-name-that-is-much-longer-than-its-place-in-a-legend-or-a-table" * 2


def run(folder, tokens_per_byte: float, **more):
    """A run of 1,000 steps that overfits after step 600, whose rows have `more`."""
    rows = []
    for step in range(10, 1001, 10):
        loss, passed = 1.5 + 8 / step + abs(step - 600) / 2000, 0.3 * step
        rows.append(
            dict(step=step, split="train", loss=loss - step / 5000, tokens=2048 * step)
            | dict(learning_rate=1e-2 / step, grad_norm=1 + 35 / step, tokens_per_second=41234.5)
            | dict(mfu=0.4, seconds=passed)
            | more
        )
        if step % 100 == 0:
            bits = loss * tokens_per_byte / 0.6931
            rows.append(dict(step=step, split="validation", loss=loss, bits_per_byte=bits))
            rows[-1] |= dict(perplexity=2.0, seconds=passed)
    samples = [{"step": step, "prompt": "class ", "text": "x" * 300} for step in (500, 1000)]
    written(folder, rows, samples)
    evaluated = [{"on": "validation", "split": "validation"}]
    evaluated += [{"on": f"hellaswag:{LONG}", "task": "hellaswag", "examples": 9, "accuracy": 0.3}]
    evaluated[0] |= dict(loss=1.5, perplexity=4.5, bits_per_byte=1.1, tokens=123456)
    (folder / "evaluations.jsonl").write_text(
        "".join(json.dumps({"step": 600} | row) + "\n" for row in evaluated)
    )
    meta = folder / "checkpoints/600/meta"
    meta.mkdir(parents=True)
    data = {f"{split} {unit}": 123456 for split in ("train", "validation") for unit in UNITS}
    data |= {"vocabulary": 4096, "dropped": {"too_short": 7}, "masked": {"email": 3}}
    data["sources"] = {LONG: {"weight": 0.7, "train documents": 5, "train tokens": 6}}
    environment = {"devices": "1 x cpu", "platform": LONG}
    (meta / "metadata").write_text(
        json.dumps({"tokens": 1, "data": data, "environment": environment})
    )
    return f"--workdir={folder}"


UNITS = ("documents", "tokens", "bytes")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The address of a page with one run, and of one with two of different tokenizers."""
    folder = tmp_path_factory.mktemp("reports")
    experts = {f"expert_share/{i}": i / 15 for i in range(6)}
    experts |= dict(router_entropy=1.2, dropped_share=0.05, expert_load=2.0)
    one, two = run(folder / "one", 0.3), run(folder / LONG, 1.0, **experts)
    report.main(["report", one, f"--out={folder}/one.html"])
    report.main(["report", one, two, f"--out={folder}/two.html"])
    return {count: f"file://{folder}/{count}.html" for count in ("one", "two")}


def _holds(outer: tuple, inner: tuple) -> bool:
    _, left, top, right, bottom, *_ = inner
    return outer[1] <= left and outer[2] <= top and right <= outer[3] and bottom <= outer[4]


def choose(browser, value: str):  # noqa: F811
    browser.execute_script("document.querySelector(`[value=${arguments[0]}]`).click()", value)


@pytest.mark.parametrize("count", ["one", "two"])
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (390, True), (320, False)])
def test_it_fits_and_no_label_covers_another(browser, pages, count, width, dark):  # noqa: F811
    sized(browser, width, dark)
    browser.get(pages[count])
    assert complaints(browser) == []
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (not dark)
    for x in ("step", "tokens", "seconds"):
        for log in ("linear", "log"):
            choose(browser, x)
            choose(browser, log)
            assert fits(browser, width), "nothing sticks out"
            labels = boxes(browser, "figure svg text, figcaption, .units span")
            assert len(labels) > 30 and overlaps(labels) == [], (x, log)
            drawings = boxes(browser, "figure > svg")
            inside = [any(_holds(drawing, label) for drawing in drawings) for label in labels]
            assert sum(inside) == len(boxes(browser, "figure svg text")), "none is cut at the edge"
    assert overlaps(boxes(browser, ".legend > span, #controls label, .bar h2")) == []
    cut = [box[0] for box in boxes(browser, ".tiles b, .tiles span, figcaption") if box[5] > box[6]]
    assert cut == []
    assert complaints(browser) == []


def test_the_best_step_is_marked_where_it_is(browser, pages):  # noqa: F811
    sized(browser, 1100)
    browser.get(pages["one"])
    (ring,) = browser.find_elements("css selector", "circle.best")
    assert ring.get_attribute("data-step") == "600"
    ticks = {
        text: (left + right) / 2
        for text, left, _, right, *_ in boxes(browser, "figure.wide .tick.x")
    }
    (_, left, _, right, *_), *_ = boxes(browser, "circle.best")
    assert (left + right) / 2 == pytest.approx(ticks["600"], abs=1)
    assert "best: 1.513 at step 600" in {box[0] for box in boxes(browser, "text.best")}
    browser.get(pages["two"])
    rings = browser.find_elements("css selector", "circle.best")
    assert [ring.get_attribute("data-step") for ring in rings] == ["600"] * 4, (
        "two charts, two runs"
    )


def test_the_switches_redraw(browser, pages):  # noqa: F811
    sized(browser, 1100)
    browser.get(pages["one"])

    def drawn():
        titles = {box[0] for box in boxes(browser, "text.axis")}
        ticks = [box[0] for box in boxes(browser, "figure.wide .tick.x")]
        paths = browser.find_elements("css selector", "figure svg path")
        return titles, ticks, [path.get_attribute("d") for path in paths]

    titles, ticks, before = drawn()
    assert titles == {"step"} and "600" in ticks
    choose(browser, "tokens")
    titles, ticks, by_tokens = drawn()
    assert titles == {"tokens seen"} and "1M" in ticks and by_tokens == before, "proportional here"
    choose(browser, "seconds")
    titles, ticks, _ = drawn()
    assert titles == {"training time"} and {"30s", "4m", "5m"} & set(ticks)
    choose(browser, "step")
    choose(browser, "log")
    _, _, by_log = drawn()
    same = [a == b for a, b in zip(before, by_log, strict=True)]
    assert same == [False, False, True, False, True, True], "loss twice and the gradient norm"


def test_axes_are_honest(browser, pages):  # noqa: F811
    """All points are inside, throughput starts at zero, and between tokenizers the comparable unit
    comes first."""
    sized(browser, 1100)
    browser.get(pages["one"])
    figures = browser.find_elements("css selector", "figure")
    names = [figure.find_element("tag name", "figcaption").text for figure in figures]
    assert names[1:] == ["Learning rate", "Gradient norm", "Throughput", "Model FLOPs utilisation"]
    for number, name in enumerate(names, start=1):
        at = f"figure:nth-of-type({number}) svg"
        ticks = {box[0]: (box[2] + box[4]) / 2 for box in boxes(browser, f"{at} .tick:not(.x)")}
        highest, lowest = min(ticks.values()), boxes(browser, f"{at} line")[0][4]
        if name != "Loss":
            assert "0" in ticks or "0%" in ticks, name
        for _, _, top, _, bottom, *_ in boxes(browser, f"{at} path"):
            assert highest - 2 <= top and bottom <= lowest + 2, name
    units = [box[0] for box in boxes(browser, "figure.wide .units span")]
    assert units == ["nats per token", "bits per byte"]
    browser.get(pages["two"])
    assert [box[0] for box in boxes(browser, "figure.wide .units span")] == units[::-1]
    figures = browser.find_elements("css selector", "figure")[-4:]
    lines = [len(figure.find_elements("css selector", "svg path")) for figure in figures]
    names = [figure.find_element("tag name", "figcaption").text for figure in figures]
    assert names == ["Tokens per expert", "Fullest expert", "Router entropy", "Dropped choices"]
    assert lines == [6, 1, 1, 1], "of the run with experts alone"


def test_a_pointer_reads_the_numbers(browser, pages):  # noqa: F811
    from selenium.webdriver import ActionChains

    for width in (1100, 390):
        sized(browser, width)
        browser.get(pages["one"])
        svg = browser.find_element("css selector", "figure.wide svg")
        for share in (-0.45, 0.0, 0.45):
            ActionChains(browser).move_to_element_with_offset(
                svg, int(share * svg.size["width"]), 0
            ).perform()
            (tip,) = boxes(browser, ".tip:not([hidden])")
            assert "step" in tip[0] and "tokens" in tip[0] and "validation" in tip[0]
            assert 0 <= tip[1] and tip[3] <= width and fits(browser, width)
