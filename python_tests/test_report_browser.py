"""Reports in a real browser, at the width of a desk and of a phone, in light and in dark."""

import dataclasses
import http.server
import math
import pathlib
import shutil
import threading

import pytest
from synthetic import SyntheticTraining, killed_after

from evokernels import zoo
from evokernels.evolution import journal, pool
from evokernels.evolution.coevolution_settings import CoevolutionSettings
from evokernels.evolution.coevolving import coevolve
from evokernels.evolution.contest import Contest, compare
from evokernels.evolution.html_report import parts, running
from evokernels.evolution.html_report.page import REPORT
from evokernels.evolution.run import evolve
from evokernels.evolution.settings import RunSettings
from evokernels.evolution.trial import Conditions, Outcome
from evokernels.genome import Genome
from evokernels.search.coevolution import CoevolutionConfig
from evokernels.search.genetic import GeneticConfig
from evokernels.search.score import Status

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no chromium and chromedriver on the PATH; as root on Debian make browser installs them",
)

WIDTHS = {"desk": 1280, "phone": 390}
CONDITIONS = Conditions(
    steps=200, batch_size=32, train_samples=128, validation_samples=100, hurdle=True
)
COMMON = {
    "tasks": ("fashion_mnist_mini", "mnist"),
    "seeds": (0, 1),
    "conditions": CONDITIONS,
    "comparison_seeds": 2,
    "threads": 1,
}


def write_evolution(folder):
    search = GeneticConfig(population=12, generations=6, elites=2, seed=1)
    evolve(RunSettings(search=search, race=True, finalists=2, refine=12, **COMMON), folder)


def write_long_evolution(folder):
    search = GeneticConfig(population=4, generations=60, elites=1, tournament=2, seed=1)
    evolve(RunSettings(search=search, **COMMON), folder)


def write_coevolution(folder):
    search = CoevolutionConfig(first=5, second=4, generations=3, elites=1, tournament=2)
    coevolve(CoevolutionSettings(search=search, max_parameters=20_000, **COMMON), folder)


def write_comparison(folder):
    mine = Genome(term_types=["MOMENTUM", "SIGN_GRAD"], alphas=[1.0, 0.5])
    given = {**zoo.GENOMES, f"a/long/path/{'without-an-end' * 8}.json": mine}
    conditions = dataclasses.replace(CONDITIONS, hurdle=False)
    compare(Contest(given, COMMON["tasks"], (0, 1), conditions, 1, trials=2), folder)


def write_running(folder):
    """A co-evolution that was killed in its third generation."""
    search = CoevolutionConfig(first=5, second=4, generations=3, elites=1, tournament=2)
    settings = CoevolutionSettings(search=search, max_parameters=20_000, **COMMON)
    training = SyntheticTraining()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pool, "evaluate", training)
        monkeypatch.setattr(running, "SHARE", math.inf)
        with killed_after(training, 110):
            coevolve(settings, folder)


def write_failed(folder):
    """One generation of two genomes, one of a term of a long name, both of which failed."""
    search = GeneticConfig(population=2, generations=1, elites=0, tournament=1)
    names = {"A_TERM_WHOSE_NAME_SAYS_ALL_THAT_THERE_IS_TO_SAY_OF_IT": 0.5, "OTHER": 0.5}
    with pytest.MonkeyPatch.context() as monkeypatch:
        lost = Outcome(Status.DIVERGED, -1.0, None, None, 30, 0.1, "digest")
        monkeypatch.setattr(pool, "evaluate", lambda *args: lost)
        monkeypatch.setattr(parts, "term_shares", lambda genomes: names)
        evolve(RunSettings(search=search, **COMMON), folder)


REPORTS = {
    "evolution": write_evolution,
    "long-evolution": write_long_evolution,
    "coevolution": write_coevolution,
    "comparison": write_comparison,
    "running": write_running,
    "failed": write_failed,
}

# Elements that reach beyond the page, but for those in a box that scrolls; the widest first.
OVERFLOWING = """
const width = document.documentElement.clientWidth;
const scrolls = e => e.closest('.scroll') && !e.matches('.scroll');
return [...document.querySelectorAll('body *')]
    .filter(e => !scrolls(e) && e.getClientRects().length)
    .map(e => [e.getBoundingClientRect(), e])
    .filter(([box]) => box.right > width + 0.5 || box.left < -0.5)
    .map(([box, e]) => `${e.tagName} ${e.className.baseVal ?? e.className} `
        + `${box.left}..${box.right} ${e.textContent.slice(0, 40)}`)
    .concat(document.documentElement.scrollWidth > width ? ['the page scrolls sideways'] : []);
"""

# Boxes whose own content is wider than they are, though they do not scroll.
CLIPPED = """
const kinds = 'p, h1, h2, dd, dt, figcaption, summary, nav, figure, section';
return [...document.querySelectorAll(kinds)]
    .filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline')
    .map(e => `${e.tagName} ${e.textContent.slice(0, 60)}`);
"""

# Text of pictures beyond its picture, pictures without a size, and text too small to be read.
PICTURES = """
const wrong = [];
for (const svg of document.querySelectorAll('svg')) {
    const box = svg.getBoundingClientRect();
    if (box.width < 200 || box.height < 20)
        wrong.push(`${svg.classList} ${box.width} x ${box.height}`);
    for (const text of svg.querySelectorAll('text')) {
        const inner = text.getBoundingClientRect();
        if (inner.left < box.left - 1 || inner.right > box.right + 1
            || inner.top < box.top - 1 || inner.bottom > box.bottom + 1)
            wrong.push(`outside: ${text.textContent} in ${svg.classList}`);
        if (inner.height < 8.5) wrong.push(`small: ${text.textContent} ${inner.height}`);
    }
}
if (!document.querySelector('svg')) wrong.push('no pictures');
return wrong;
"""

# Texts whose colour is too near to that of the page behind them (WCAG 2.2, 1.4.3: 4.5 to 1).
PALE = """
const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = css => {
    const [r, g, b] = css.match(/[\\d.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
};
const behind = e => {
    for (; e; e = e.parentElement) {
        const colour = getComputedStyle(e).backgroundColor;
        if (!colour.endsWith(', 0)')) return colour;
    }
    return 'rgb(255, 255, 255)';
};
return [...document.querySelectorAll('p, td, th, h1, h2, dt, dd, a, summary, figcaption, svg text')]
    .map(e => {
        const style = getComputedStyle(e);
        const pair = [light(e.closest('svg') ? style.fill : style.color), light(behind(e))];
        return [(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), e.textContent];
    })
    .filter(([contrast]) => contrast < 4.5)
    .map(([contrast, text]) => `${contrast.toFixed(2)} ${text.slice(0, 40)}`);
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The report of each kind of run."""
    folder = tmp_path_factory.mktemp("reports")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pool, "evaluate", SyntheticTraining())
        monkeypatch.setattr(pool, "_data", lambda *args: None)
        monkeypatch.setattr(journal, "SYNCHRONOUS", "OFF")
        for name, write in REPORTS.items():
            write(folder / name)
    return {name: folder / name / REPORT for name in REPORTS}


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


def show(browser, path, width, scheme):
    """Open a page, with everything in it that can be opened."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what was said before
    browser.get(path.as_uri())


def requests(browser):
    """Addresses that the page asked for."""
    import json

    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("name", REPORTS)
def test_a_report_looks_right(pages, browser, name, width, scheme):
    show(browser, pages[name], width, scheme)
    assert browser.execute_script("return innerWidth") == width
    for opened in (False, True):
        if opened:
            browser.execute_script(
                "document.querySelectorAll('details').forEach(details => details.open = true)"
            )
        assert browser.execute_script(OVERFLOWING) == []
        assert browser.execute_script(CLIPPED) == []
    assert browser.execute_script(PICTURES) == []
    assert browser.execute_script(PALE) == []
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(dark[4:].split(",")[0]) < 60) == (scheme == "dark")
    assert browser.get_log("browser") == []
    assert {url for url in requests(browser) if not url.startswith("data:")} == {
        pages[name].as_uri()
    }


PLANTED = {
    "wide": ("<div style='width:3000px'>x</div>", OVERFLOWING),
    "clipped": ("<p style='width:50px;overflow-wrap:normal'>unbreakableunbreakable</p>", CLIPPED),
    "flat": ("<svg class='chart' style='height:0'></svg>", PICTURES),
    "outside": ("<svg viewBox='0 0 9 9'><text x='99' y='4'>x</text></svg>", PICTURES),
    "pale": ("<p style='color:#ddd;background:#fff'>x</p>", PALE),
}


@pytest.mark.parametrize("plant", PLANTED)
def test_what_looks_wrong_is_found(pages, browser, tmp_path, plant):
    markup, look = PLANTED[plant]
    page = pages["evolution"].read_text(encoding="utf-8").replace("<main>", f"<main>{markup}", 1)
    (tmp_path / "planted.html").write_text(page, encoding="utf-8")
    show(browser, tmp_path / "planted.html", WIDTHS["phone"], "light")
    assert len(browser.execute_script(look)) >= 1


def test_a_failing_script_and_a_request_are_found(pages, browser, tmp_path):
    served = []

    class Notes(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            served.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Notes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/picture.png"
        planted = f"<main><script>throw new Error('planted')</script><img src='{url}'>"
        page = pages["evolution"].read_text(encoding="utf-8").replace("<main>", planted, 1)
        path = pathlib.Path(tmp_path / "planted.html")
        path.write_text(page, encoding="utf-8")
        show(browser, path, WIDTHS["desk"], "light")
        said = "".join(entry["message"] for entry in browser.get_log("browser"))
        assert "planted" in said
        assert url in requests(browser)
        server.shutdown()
    assert served == ["/picture.png"]
