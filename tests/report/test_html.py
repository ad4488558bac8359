"""The page in a real browser: filter, sort, zoom; no script errors, nothing from the network."""

import json
import re
import shutil
import time
from functools import partial

import pytest
from test_report import EXPERIMENT, diverged, plant, record

from conftest import ROOT
from depthlab.report import gather, load_experiment, read_records

pytest.importorskip("plotly")
pytest.importorskip("itables")
from depthlab.report import html

CLAIMS = """
  claims:
    - {id: T2, says: SGDR is better than SGD., plus: [{arch: plain11, sched: sgd}],
       minus: [{arch: plain11, sched: sgdr}], above: 0, paper: 1.39, note: A slip.}
    - {id: T10, says: ResNet-110 is better than Plain-11., plus: [{arch: plain11, sched: sgd}],
       minus: [{arch: resnet110, sched: sgd}], above: 0}
"""


def make(tmp_path, *records):
    """The page of a paper of two experiments, one of which has not been run."""
    (tmp_path / "table.yaml").write_text(EXPERIMENT + CLAIMS)
    other = EXPERIMENT.replace("plain11,resnet110", "plain20").replace("A table", "Nothing").split("  published")[0]
    (tmp_path / "other.yaml").write_text(other)
    found, problems = read_records([plant(tmp_path / "runs", *records)])
    views = []
    for name, runs in (("table", found), ("other", [])):
        page = gather(load_experiment(tmp_path / f"{name}.yaml", f"paper/{name}"), runs, problems)
        views.append(html.experiment(page))
    return html.write_page(views, found, problems, tmp_path / "out/index.html")


RUNS = [
    *(record(seed=s, error=30.0 + s / 10) for s in range(3)),
    *(record(sched="sgdr", seed=s, error=28.0 + s / 10) for s in range(3)),
    record(error=50.0, budget=0.1),
    diverged(arch="resnet110", seed=0),
]


def text_of(page) -> str:
    """What one reads of it, without scripts and styles."""
    bare = re.sub(r"<(script|style)\b.*?</\1>", " ", page.read_text(), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", bare).split())


def test_everything_has_its_place(tmp_path):
    (tmp_path / "runs/broken").mkdir(parents=True)
    (tmp_path / "runs/broken/result.json").write_text("{")
    page = make(tmp_path, *RUNS)
    text, source = text_of(page), page.read_text().split("<script>")[0]
    assert "8 finished runs (1 diverged)" in text
    assert re.search(
        r"SGDR is better than SGD. \d+ 1.39 2 ± 0.082 points \(claimed: above 0; n = 3\), p = \S+ budget 1", text
    )
    assert re.search(r"budget 1, 32-true supported T10 ResNet-110 is better .*? not run", text)
    assert "no finished run of ResNet-110 SGD" in text
    assert "- (0 of 3), 1 diverged" in text
    assert "budget 0.1 †, 32-true: 1 of 12 runs" in text
    assert "Nothing paper/other not run" in text
    assert "Left out: 1" in text
    assert "broken/result.json" in text
    assert source.count('<div class="curve"') == 2  # a chart for each length
    assert "<img" not in source  # the same curves as pictures
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', source)
    order = [source.index(f'"key"><a href="#paper-table">{id}<') for id in ("T2", "T10")]
    assert order == sorted(order)


def test_the_same_records_give_the_same_page(tmp_path):
    pages = [make(tmp_path / name, *RUNS).read_bytes() for name in "ab" if (tmp_path / name).mkdir() is None]
    assert pages[0].replace(str(tmp_path / "a").encode(), str(tmp_path / "b").encode()) == pages[1]


def test_charts_are_what_plotly_knows(tmp_path):
    from plotly import graph_objects

    charts = re.findall(r'data-for="curve-[^"]+">(.*?)</script>', make(tmp_path, *RUNS).read_text())
    assert len(charts) == 2
    for text in charts:
        graph_objects.Figure(json.loads(text))  # refuses a key that does not exist


def test_footnotes_of_a_header_and_long_tables_of_nothing(tmp_path):
    experiment = load_experiment(ROOT / "conf/experiment/li2018/initialisation.yaml", "li2018/initialisation")
    (table,) = html.experiment(gather(experiment, []))["sections"]
    assert table["folded"] == "96 cells, none of them run"
    assert html.cell("paper % [1]", "fig2")["html"] == 'paper %<sup><a href="#fig2-n1">1</a></sup>'
    page = gather(load_experiment(make(tmp_path, *RUNS).parents[1] / "table.yaml", "paper/table"), [])
    page.sections[0].header[0] += " [1]"
    short = html.experiment(page)["sections"][0]
    assert not short["folded"]
    assert "<sup>" in short["header"][0]


def test_nothing_in_a_record_becomes_markup(tmp_path):
    source = make(tmp_path, record(study="</script><b>x", hardware="<i>H200")).read_text()
    assert "</script><b>x" not in source
    assert "&lt;i&gt;H200" in source
    assert "<i>H200" not in source.split('id="runs-data"')[0]


SHOWN = {  # every table and figure of the papers that has a result in it
    "barz2018": "table1 fig2",
    "chang2018": "fig3 fig4 fig6 fig7 fig8 fig9 fig10 fig11 lesion table2 table3 table4 table5",
    "li2018": "fig5 fig6 fig9 gradients initialisation sharpness",
    "yu2019": "table1 table2 table3 table4 table5 fig2 fig3 fig6 fig7 fig9 fig10 fig11 fig12 fig12_full fig13 "
    "interlayer",
}


def without_runs(asked, folder):
    views = [html.experiment(gather(experiment, [])) for experiment in asked if experiment.runs]
    return html.write_page(views, [], [], folder / "index.html")


def test_no_section_of_verdicts_without_a_claim(tmp_path):
    conf = ROOT / "conf/experiment"
    for id, there in (("barz2018/table1", True), ("demo", False)):
        page = without_runs([load_experiment(conf / f"{id}.yaml", id)], tmp_path)
        assert ('id="verdicts"' in page.read_text()) is there
        assert ('href="#verdicts"' in page.read_text()) is there


def test_every_experiment_has_its_section(tmp_path):
    """Without any run: what computes apart, each says that it was not run and what tells the cost."""
    conf = ROOT / "conf/experiment"
    ids = sorted(path.relative_to(conf).with_suffix("").as_posix() for path in conf.rglob("*.yaml"))
    assert {f"{paper}/{name}" for paper, names in SHOWN.items() for name in names.split()} <= set(ids)
    asked = [load_experiment(conf / f"{id}.yaml", id) for id in ids]
    page = without_runs(asked, tmp_path)
    text, source = text_of(page), page.read_text()
    for experiment in asked:
        if experiment.runs:
            assert f'<section class="experiment" id="{experiment.id.replace("/", "-")}">' in source
            assert f"Not run. What it takes: python src/report.py --missing {experiment.id} " in text


# ---- in a browser

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]  # fmt: skip


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.chrome.service.Service(driver)
    found = webdriver.Chrome(options=options, service=service)
    yield found
    found.quit()


def wait(condition, seconds=60):
    until = time.time() + seconds
    while not (found := condition()):
        assert time.time() < until, "waited in vain"
        time.sleep(0.1)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("width", [1400, 390])
def test_in_a_browser(browser, tmp_path, width):
    page = make(tmp_path, *RUNS)
    see = browser.execute_script
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500})  # fmt: skip
    browser.get(page.as_uri())
    wait(lambda: see("return document.documentElement.dataset.ready") == "true")
    assert see("return document.documentElement.scrollWidth") <= width  # nothing sticks out of a phone

    cells = partial(see, "return [...document.querySelectorAll('#all-runs tbody tr')].map(r => r.cells[9].innerText)")
    assert len(cells()) == 8
    see("document.querySelector('thead [data-dt-column=\"9\"] .dtcc-button_order').click()")
    wait(lambda: cells()[0] == "28")
    assert cells() == ["28", "28.1", "28.2", "30", "30.1", "30.2", "50", ""]  # a diverged run has no error
    box = browser.find_element("css selector", "#runs input[type=search]")
    see("arguments[0].scrollIntoView()", box)
    box.send_keys("sgdr")
    wait(lambda: len(cells()) == 3)
    box.clear()
    box.send_keys(" ")
    wait(lambda: len(cells()) == 8)
    see("document.querySelector('thead [data-dt-column=\"14\"] .dtcc-button_dropdown').click()")  # how it ended
    wait(lambda: see("return document.querySelectorAll('.dtcc-list-buttons button').length") == 2)
    see("[...document.querySelectorAll('.dtcc-list-buttons button')].find(b => /diverged/.test(b.innerText)).click()")
    wait(lambda: cells() == [""])
    links = see("return [...document.querySelectorAll('#all-runs tbody a')].map(a => a.getAttribute('href'))")
    assert all((page.parent / link / "result.json").is_file() for link in links)

    chart = browser.find_element("css selector", ".curve")
    see("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", chart)
    wait(lambda: see("return arguments[0].querySelectorAll('.scatterlayer .trace').length", chart))
    span = partial(see, "const r = arguments[0]._fullLayout.xaxis.range; return r[1] - r[0]", chart)
    before = span()
    drag = see("return arguments[0].querySelector('.nsewdrag')", chart)
    from selenium.webdriver import ActionChains

    ActionChains(browser).move_to_element(drag).click_and_hold().move_by_offset(60, 5).release().perform()
    wait(lambda: span() < before / 2)

    errors = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "ERROR")]
    assert errors == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in urls
    assert [url for url in urls if url.startswith(("http:", "https:", "ws:", "wss:"))] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_every_experiment_fits_a_phone(browser, tmp_path):
    conf = ROOT / "conf/experiment"
    ids = sorted(path.relative_to(conf).with_suffix("").as_posix() for path in conf.rglob("*.yaml"))
    page = without_runs([load_experiment(conf / f"{id}.yaml", id) for id in ids], tmp_path)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True})  # fmt: skip
    browser.get(page.as_uri())
    wait(lambda: browser.execute_script("return document.documentElement.dataset.ready") == "true")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
