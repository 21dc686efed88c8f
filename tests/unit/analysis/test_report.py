"""One HTML file that holds a whole report, shows what strangers wrote and runs nothing of it."""

import re

from PIL import Image

from megatron_moellava.analysis.report import POLICY, Section, write_html


def test_pictures_are_inside_and_nothing_is_fetched(tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "load.png")
    section = Section("Load", "a note", [tmp_path / "load.png"], [(["layer", "share"], [["0", "50%"]])])
    write_html(tmp_path / "report.html", "Routing", {"tokens": "9"}, [], [section])
    html = (tmp_path / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 1 and 'alt="load"' in html
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", html)
    assert POLICY in html and "<script" not in html
    assert "<td>50%</td>" in html and '<a href="#s0">Load</a>' in html and 'id="s0"' in html


def test_whatever_stands_in_a_name_is_text(tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    write_html(tmp_path / "report.html", evil, {evil: evil}, [evil], [Section(evil, evil, [], [([evil], [[evil]])])])
    html = (tmp_path / "report.html").read_text()
    assert evil not in html and "&lt;img src=x onerror=alert(1)&gt;" in html


def test_a_report_warns_or_says_that_all_is_well(tmp_path):
    for warnings, shown, hidden in (
        ([], 'class="good"', 'class="warning"'),
        (["dead"], 'class="warning"', 'class="good"'),
    ):
        write_html(tmp_path / "report.html", "x", {}, warnings, [])
        html = (tmp_path / "report.html").read_text()
        assert shown in html and hidden not in html
