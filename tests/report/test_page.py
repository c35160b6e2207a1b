"""The results page in a real browser: as a file without network, and live while a sweep goes on."""

import re
import threading
import time

import pytest
from browser import as_device, browser, complaints
from report_sweeps import scale_metric, write_made_up_sweep, write_trial

from rlhf_ray.report.gathering import Gatherer
from rlhf_ray.report.live import write_report
from rlhf_ray.report.serving import server_of
from rlhf_ray.storage import open_storage

HOSTILE = "<script>document.title='taken'</script>\"'&<b>日本語 שלום " + "x" * 200
LINK = '<a href="javascript:alert(1)">task</a>'


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path / "runs")


def open_file(page, storage, name="made-up", *, width=1440, dark=False):
    as_device(page, width, dark=dark)
    page.set_network_conditions(offline=True, latency=0, throughput=0)
    page.get(f"file://{storage.local_path()}/{name}/report.html")
    ready(page)


def ready(page):
    until(page, "document.documentElement.dataset.ready > 0")


def until(page, condition, seconds=60):
    end = time.monotonic() + seconds
    while not page.execute_script(f"return {condition}"):
        assert time.monotonic() < end, condition
        time.sleep(0.1)


def shown_trials(page):
    return page.execute_script(
        "return [...document.querySelectorAll('#table tbody tr:not([hidden])')]"
        ".map(row => row.cells[0].dataset.v)"
    )


def column(page, position):
    return page.execute_script(
        "return [...document.querySelectorAll('#table tbody tr:not([hidden])')]"
        f".map(row => row.cells[{position}].dataset.v)"
    )


def click_header(page, label):
    page.execute_script(
        "[...document.querySelectorAll('#table thead button')]"
        f".find(b => b.textContent === '{label}').click()"
    )


def write_text(page, text):
    field = page.find_element("id", "filter")
    field.send_keys("\ue009a\ue000\ue017", text)  # Ctrl-A, Delete
    until(page, f"document.getElementById('filter').value === '{text}'")


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (390, True)])
def test_it_opens_from_disk_without_network(page, storage, width, dark):
    write_made_up_sweep(storage)
    write_report(storage, "made-up")
    open_file(page, storage, width=width, dark=dark)
    assert page.title.startswith("made-up")
    drawn = "return document.querySelectorAll('.js-plotly-plot .main-svg').length"
    assert page.execute_script(drawn) >= 5
    assert page.execute_script("return document.documentElement.scrollWidth") == width
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    assert complaints(page) == []


def test_one_trial_is_readable(page, storage):
    write_made_up_sweep(storage, n_trials=1)
    storage.delete("made-up/baselines.json")
    write_report(storage, "made-up")
    open_file(page, storage)
    low, high = page.execute_script(
        "return document.getElementById('chart-front')._fullLayout.yaxis.range"
    )
    assert high - low < 0.2
    assert page.find_element("id", "shown").text == "1 trial"
    assert "best fifth" not in page.find_element("id", "chart-curves").text
    assert complaints(page) == []


@pytest.mark.parametrize(("factor", "end"), [(1e-7, "e-08, cost"), (1e9, "e+08, cost")])
def test_charts_tell_a_metric_of_any_size(page, storage, factor, end):
    write_made_up_sweep(storage)
    scale_metric(storage, factor)
    write_report(storage, "made-up")
    open_file(page, storage)
    marks = "return document.getElementById('chart-methods').data.flatMap(trace => trace.hovertext)"
    told = page.execute_script(marks)
    assert len(told) == 5  # of six methods two did the same
    assert all(re.search(r"<br>mse [\d.]+" + re.escape(end), text) for text in told)
    assert complaints(page) == []


def test_labels_of_marks_close_to_one_another_do_not_overlap(page, storage):
    write_made_up_sweep(storage)
    summary = storage.read_json("made-up/summary.json")
    for i, method in enumerate(("policy", "fixed", "full_best", "full")):
        summary["methods"][method] |= {"metric_mean": 0.9 + 0.001 * i, "cost_mean": 0.3 + 0.1 * i}
    storage.write_json("made-up/summary.json", summary)
    write_report(storage, "made-up")
    for width in (1440, 390):
        open_file(page, storage, width=width)
        boxes = page.execute_script(
            "return [...document.querySelectorAll('#chart-methods .textpoint text')]"
            ".map(t => t.getBoundingClientRect()).map(b => [b.left, b.right, b.top, b.bottom])"
        )
        assert len(boxes) >= (5 if width == 1440 else 3)
        assert not any(
            a[0] < b[1] - 1 and b[0] < a[1] - 1 and a[2] < b[3] - 3 and b[2] < a[3] - 3
            for i, a in enumerate(boxes) for b in boxes[:i]
        )  # fmt: skip
        assert all(box[0] >= 0 and box[1] <= width for box in boxes)


def test_the_table_sorts_and_filters(page, storage):
    write_made_up_sweep(storage, n_trials=12, n_failed=2, error="the disk is full")
    write_report(storage, "made-up")
    open_file(page, storage)
    click_header(page, "accuracy")
    figures = [float(value) for value in column(page, 6) if value]
    assert figures == sorted(figures, reverse=True)
    assert column(page, 6)[-2:] == ["", ""]
    click_header(page, "accuracy")
    assert [float(value) for value in column(page, 6) if value] == figures[::-1]
    header = page.find_element("css selector", "#table th[aria-sort]")
    assert header.get_attribute("aria-sort") == "ascending"
    write_text(page, "disk is full")
    assert column(page, 1) == ["failed", "failed"]
    assert page.find_element("id", "shown").text == "2 of 12 trials"
    write_text(page, "")
    page.execute_script(
        "const s = document.getElementById('status'); s.value = 'done';"
        "s.dispatchEvent(new Event('change'))"
    )
    assert len(shown_trials(page)) == 10
    assert complaints(page) == []


def test_hovering_a_mark_shows_its_configuration(page, storage):
    write_made_up_sweep(storage)
    write_report(storage, "made-up")
    open_file(page, storage)
    where = page.execute_script(
        "document.getElementById('front').scrollIntoView({behavior: 'instant'});"
        "const box = document.querySelector('#chart-front .trace .point').getBoundingClientRect();"
        "return [box.x + box.width / 2, box.y + box.height / 2]"
    )
    for type_, x in (("mouseMoved", where[0] - 30), ("mouseMoved", where[0])):
        event = {"type": type_, "x": x, "y": where[1]}
        page.execute_cdp_cmd("Input.dispatchMouseEvent", event)
    until(page, "document.querySelector('#chart-front .hovertext') !== null", 10)
    text = page.find_element("css selector", "#chart-front .hovertext").text
    assert "gamma 0.9" in text
    assert "tuning weight" in text
    assert "utility" in text


def test_hostile_names_appear_as_text(page, storage):
    write_made_up_sweep(storage, n_trials=6, n_failed=1, suite=HOSTILE, error=HOSTILE,
                        levels=("</script><img src=x onerror=\"document.title='taken'\">", "层级"),
                        tasks=(HOSTILE, LINK, "{{ 7*7 }}"))  # fmt: skip
    sweep = storage.read_json("made-up/sweep.json")
    sweep["metric"]["name"] = HOSTILE
    storage.write_json("made-up/sweep.json", sweep)
    write_report(storage, "made-up")
    open_file(page, storage, width=390)
    assert page.title.startswith("made-up")
    assert (
        page.execute_script("return document.querySelectorAll('img, #content b script').length")
        == 0
    )
    assert (
        page.execute_script("return document.querySelectorAll('a[href^=javascript]').length") == 0
    )
    text = page.find_element("id", "content").text
    assert LINK in text
    assert "<script>document.title" in text
    assert page.execute_script("return document.documentElement.scrollWidth") == 390
    assert complaints(page) == []


def test_a_live_page_follows_a_sweep_and_keeps_what_was_typed(page, storage):
    write_made_up_sweep(storage, n_trials=6, n_done=2, state="running")
    gatherer = Gatherer(storage, "made-up")
    server = server_of(gatherer, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        as_device(page, 1440)
        page.set_network_conditions(offline=False, latency=0, throughput=-1)
        page.get(f"http://127.0.0.1:{server.server_port}/")
        ready(page)
        assert "2 of 6 trials judged" in page.find_element("css selector", ".meta").text
        write_text(page, "done")
        planned = Gatherer(storage, "made-up").gather()["trials"][2]
        write_trial(storage, "made-up", {k: planned[k] for k in ("name", "values")}, 2)
        until(page, "document.querySelector('.meta').textContent.includes('3 of 6 trials judged')")
        assert page.find_element("id", "filter").get_attribute("value") == "done"
        assert len(shown_trials(page)) == 3
        for trial in Gatherer(storage, "made-up").gather()["trials"][3:]:
            write_trial(storage, "made-up", {k: trial[k] for k in ("name", "values")}, 5)
        write_made_up_sweep(storage, n_trials=6)
        until(page, "document.querySelector('.answer').textContent.startsWith('On the test tasks')")
        assert page.find_elements("id", "chart-methods")
        assert complaints(page) == []
    finally:
        page.get("about:blank")
        server.shutdown()
        server.server_close()
        thread.join()


def test_five_hundred_trials_are_quick_to_use(page, storage):
    write_made_up_sweep(storage, n_trials=500, n_failed=5, continuous=True)
    write_report(storage, "made-up")
    open_file(page, storage)
    assert len(shown_trials(page)) == 500
    click_header(page, "gamma")
    values = [float(value) for value in column(page, 2)]
    assert values == sorted(values, reverse=True)
    assert complaints(page) == []
