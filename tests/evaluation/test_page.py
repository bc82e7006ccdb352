"""The page of an evaluation: whole in one file, and what its slider shows, in a real browser."""

import dataclasses
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers import CPU, TASK, assert_names, few_digits, refusal, tiny_run

from cifar10.resnet import ResNet
from early_exit.choosing.goals import FixedThresholds, MaxDrop
from early_exit.evaluation import page, pictures
from early_exit.evaluation.charts import charts
from early_exit.evaluation.evaluate import evaluate
from early_exit.evaluation.markdown import Section, sections
from early_exit.evaluation.report import Picture, Report
from early_exit.task import StaticNetwork, Task

SCRIPT = "<img src=x onerror='document.title=`run`'>"
# a class of that name, and a static network to compare with
STRANGE = Task(
    TASK.build_network,
    lambda settings: dataclasses.replace(
        few_digits(settings.split_seed), classes=(SCRIPT, *"123456789")
    ),
    static_networks=lambda config, num_classes: [
        StaticNetwork("resnet8", 0.75, "nobody", lambda: ResNet(1)),
        StaticNetwork("resnet14", 0.8, "nobody", lambda: ResNet(2)),  # twice as expensive
    ],
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two epochs with two early exits. Not to be changed."""
    return tiny_run(tmp_path_factory.mktemp("page") / "run", STRANGE)


@pytest.fixture(scope="module")
def evaluated(run) -> tuple[Report, Path]:
    """Its evaluation. Not to be changed."""
    return evaluate(run, STRANGE, MaxDrop(0.1), overrides=CPU, batch_sizes=(1, 8), timing_images=8)


@pytest.fixture(scope="module")
def written(evaluated) -> Path:
    """Its directory."""
    return evaluated[1]


@pytest.fixture(scope="module")
def browser():
    """A browser without a window, of a phone's width."""
    paths = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(paths):
        pytest.skip("no chromium and chromedriver here (Debian: chromium, chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(paths[1]))
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, written):
    """The page, opened anew."""
    browser.get((written / "report.html").as_uri())
    assert browser.execute_script("return document.body.dataset.ready") == "yes"
    return browser


def text(browser, name: str) -> str:
    """The text of an element."""
    return browser.find_element("id", name).text


def percent(share: float, digits: int) -> str:
    """A share as the page writes it."""
    return f"{100 * share:.{digits}f} %"


def move(browser, stop: int) -> None:
    """Moves the slider as a user does: the value changes, and the page gets the event."""
    browser.execute_script(
        "const s = document.getElementById('threshold'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input'))",
        stop,
    )


@pytest.mark.slow
class TestInABrowser:
    def test_nothing_is_fetched_and_there_are_no_errors(self, browser, written):
        for kind in ("browser", "performance"):
            browser.get_log(kind)
        browser.get((written / "report.html").as_uri())
        events = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
        requested = {
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        }
        assert {url for url in requested if not url.startswith("data:")} == {
            (written / "report.html").as_uri()
        }
        assert browser.get_log("browser") == []

    def test_it_starts_at_the_chosen_policy(self, opened, written):
        report = json.loads((written / "report.json").read_text())
        for split in ("val", "test"):
            assert text(opened, f"accuracy-{split}") == percent(report[split]["accuracy"], 2)
            assert text(opened, f"macs-{split}") == percent(report[split]["macs_share"], 1)
        for index, row in enumerate(report["exits"]):
            assert text(opened, f"share{index}-test") == percent(row["exited"], 1)

    @pytest.mark.parametrize("stop", [0, 3, -1])
    def test_its_numbers_are_the_reports(self, opened, written, stop):
        report = json.loads((written / "report.json").read_text())
        stop %= len(report["curve"])
        move(opened, stop)
        point = report["curve"][stop]
        for split in ("val", "test"):
            assert text(opened, f"accuracy-{split}") == percent(point[split]["accuracy"], 2)
            assert text(opened, f"macs-{split}") == percent(point[split]["macs_share"], 1)
            for index, share in enumerate(point[f"{split}_shares"]):
                assert text(opened, f"share{index}-{split}") == percent(share, 1)
            for row in report["curve_seconds"]:
                seconds = row[split][stop] * row["plain"] / row["batch_size"]
                shown = text(opened, f"ms{row['batch_size']}-{split}")
                assert float(shown.removesuffix(" ms")) == pytest.approx(1000 * seconds, rel=0.01)
        threshold = point["threshold"]
        shown = text(opened, "at")
        assert not re.search(r"\d", shown) if threshold is None else shown == f"{threshold:.4f}"
        # the circles in the figures, and the bars
        circle, bars = opened.execute_script(
            "return [document.getElementById('macs').data.find((t) => /slider.*val/.test(t.name)),"
            " document.getElementById('shares').data.map((t) => t.x)]"
        )
        assert circle["x"] == pytest.approx([100 * point["val"]["macs_share"]], abs=1e-3)
        assert circle["y"] == pytest.approx([100 * point["val"]["accuracy"]], abs=1e-3)
        assert bars[0] == pytest.approx([100 * x for x in point["val_shares"]], abs=1e-2)
        assert bars[1] == pytest.approx([100 * x for x in point["test_shares"]], abs=1e-2)

    def test_keys_move_the_slider_and_the_button_resets_it(self, opened):
        slider = opened.find_element("id", "threshold")
        first = slider.get_attribute("value")
        move(opened, 1)
        slider.send_keys("\ue014")  # arrow right
        assert slider.get_attribute("value") == "2"
        assert re.search(r"\d+\.\d+ ?%", slider.get_attribute("aria-valuetext"))
        opened.find_element("id", "back").click()
        assert slider.get_attribute("value") == first

    def test_one_batch_size_is_shown_at_a_time(self, opened):
        def shown() -> list[bool]:
            return [opened.find_element("id", f"ms{size}").is_displayed() for size in (1, 8)]

        assert shown() == [True, False]
        opened.find_element("css selector", "#batch option[value='8']").click()
        assert shown() == [False, True]

    def test_nothing_is_wider_than_a_phone(self, opened):
        assert opened.execute_script("return document.documentElement.scrollWidth") <= 390

    def test_a_name_that_looks_like_code_is_shown_and_not_run(self, opened):
        assert opened.title != "run"
        assert SCRIPT in opened.page_source.replace("&lt;", "<").replace("&gt;", ">")
        assert "onerror" in opened.find_element("css selector", "#classes").text

    def test_every_figure_is_drawn(self, opened):
        empty = opened.execute_script(
            "return [...document.querySelectorAll('.figure')]"
            ".filter((f) => !f.querySelector('.main-svg')).map((f) => f.id)"
        )
        assert empty == []

    def test_every_picture_has_a_description(self, opened):
        images = opened.find_elements("css selector", ".gallery img")
        assert len(images) > 5
        assert all(re.search("layer1|layer2|final", image.get_attribute("alt")) for image in images)
        assert all(image.get_property("naturalWidth") == 16 for image in images)


def shown(browser, report: Report, path: Path) -> None:
    """Opens the page of another report."""
    page.write(report, {}, path)
    browser.get(path.as_uri())
    assert browser.execute_script("return document.body.dataset.ready") == "yes"
    assert browser.get_log("browser") == []


@pytest.mark.slow
class TestOtherReports:
    def test_a_plain_network_has_no_slider(self, browser, evaluated, tmp_path):
        report = evaluated[0]
        last, (first, *_) = report.exits[-1], report.curve
        plain = dataclasses.replace(
            report,
            exits=(last,),
            curve=(dataclasses.replace(first, val_shares=(1.0,), test_shares=(1.0,)),),
            classes=tuple(dataclasses.replace(row, exited=(1.0,)) for row in report.classes),
            curve_seconds=tuple(
                dataclasses.replace(row, val=(1.0,), test=(1.0,), at_exit=(1.0,))
                for row in report.curve_seconds
            ),
        )
        shown(browser, plain, tmp_path / "report.html")
        assert browser.find_elements("id", "threshold") == []
        legend = browser.find_element("css selector", ".key").text
        assert "static" in legend and "slider" not in legend and "random" not in legend

    def test_without_timing_no_time_is_mentioned(self, browser, evaluated, tmp_path):
        report = dataclasses.replace(evaluated[0], curve_seconds=(), timing=())
        shown(browser, report, tmp_path / "report.html")
        legend = browser.find_element("css selector", ".key").text
        assert not re.search(r"measured|seconds|\bms\b", legend)
        move(browser, 0)
        assert text(browser, "share0-val") == "0.0 %"

    def test_with_a_disabled_exit_the_slider_starts_at_the_chosen_policy(
        self, browser, run, tmp_path
    ):
        copy = shutil.copytree(run, tmp_path / "run")
        report, _ = evaluate(
            copy, STRANGE, FixedThresholds((0.1234567,)), overrides=CPU, live=False, draw=False
        )
        rows = [
            dataclasses.replace(report.exits[0], enabled=False, threshold=0.9),
            *report.exits[1:],
        ]
        shown(browser, dataclasses.replace(report, exits=tuple(rows)), tmp_path / "report.html")
        assert text(browser, "at") == "0.1235"
        assert text(browser, "accuracy-test") == percent(report.test.accuracy, 2)
        assert text(browser, "macs-test") == percent(report.test.macs_share, 1)
        squares = browser.execute_script(
            "return document.getElementById('macs').data.find((t) => t.marker &&"
            " t.marker.symbol == 'square').text"
        )
        assert squares == ["layer2"]


class TestTheFile:
    def test_it_is_small_and_complete(self, written):
        page = (written / "report.html").read_text()
        assert len(page.encode()) < 6_000_000
        addresses = []

        class Finder(HTMLParser):
            def handle_starttag(self, tag, attributes):
                addresses.extend(v for k, v in attributes if k in ("src", "href", "srcset"))

        Finder().feed(page)
        assert len(addresses) > 5
        assert [address for address in addresses if not address.startswith("data:")] == []

    def test_it_has_what_made_it(self, written):
        page = (written / "report.html").read_text()
        report = json.loads((written / "report.json").read_text())
        assert report["environment"]["command"] in page.replace("&#x27;", "'")
        assert "batch_size: 8" in page
        assert f"torch {report['environment']['versions']['torch']}" in page

    def test_figures_do_not_depend_on_headings(self, evaluated, tmp_path, monkeypatch):
        def reworded(report: Report) -> list[Section]:
            return [
                dataclasses.replace(part, heading=f"heading {number}")
                for number, part in enumerate(sections(report))
            ]

        def figures(path: Path) -> set[str]:
            page.write(evaluated[0], {}, path)
            return set(re.findall(r'<div class="figure" id="(\w+)">', path.read_text()))

        before = figures(tmp_path / "before.html")
        monkeypatch.setattr(page, "sections", reworded)
        after = figures(tmp_path / "after.html")
        assert before == after == {chart.id for chart in charts(evaluated[0])}
        assert "<h2>heading 1</h2>" in (tmp_path / "after.html").read_text()

    def test_the_static_networks(self, written):
        report = json.loads((written / "report.json").read_text())
        (static,) = report["static_networks"]
        assert (static["name"], static["macs_share"]) == ("resnet8", 1.0)  # the same network
        assert all(row["static_networks"]["resnet8"] > 0 for row in report["curve_seconds"])
        assert "nobody" in (written / "report.html").read_text()

    def test_without_timing_there_is_no_figure_of_time(self, evaluated, tmp_path):
        report = dataclasses.replace(evaluated[0], curve_seconds=(), timing=())
        page.write(report, {}, tmp_path / "report.html")
        written = (tmp_path / "report.html").read_text()
        assert 'id="ms1"' not in written
        page.write(evaluated[0], {}, tmp_path / "timed.html")
        assert 'id="ms1"' in (tmp_path / "timed.html").read_text()

    def test_thresholds_of_each_exit_are_not_on_the_slider(self, evaluated, tmp_path):
        def paragraphs(first: float) -> int:
            rows = tuple(
                dataclasses.replace(row, threshold=threshold, enabled=True)
                for row, threshold in zip(evaluated[0].exits, (first, 0.75, None), strict=True)
            )
            page.write(dataclasses.replace(evaluated[0], exits=rows), {}, tmp_path / "report.html")
            return (tmp_path / "report.html").read_text().count("<p>")

        assert paragraphs(0.25) == paragraphs(0.75) + 1  # a note on it

    def test_many_large_pictures_are_made_small(self):
        rng = np.random.default_rng(0)
        row = [
            Picture(rng.integers(0, 256, (224, 224, 3), np.uint8), "a", True, "a")
            for _ in range(50)
        ]
        galleries = {"one": [("row", row)] * 4, "two": [("row", row)] * 4}
        assert (
            sum(
                len(address)
                for rows in pictures.embedded(galleries).values()
                for _, row in rows
                for _, address in row
            )
            < 1_100_000
        )

    @pytest.mark.parametrize("name", ["plotly", "markdown"])
    def test_a_missing_package_is_named(self, evaluated, tmp_path, monkeypatch, name):
        monkeypatch.setitem(sys.modules, "plotly.offline" if name == "plotly" else name, None)
        message = refusal(page.write, evaluated[0], {}, tmp_path / "report.html")
        assert_names(message, name)


@pytest.mark.parametrize(
    ("number", "text"), [(0.381234, "0.381"), (2.5, "2.5"), (999.7, "1000"), (1234.5, "1230")]
)
def test_times_have_short_number_and_no_exponent(number, text):
    assert page.short_number(number) == text
