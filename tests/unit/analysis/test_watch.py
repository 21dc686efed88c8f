"""The live view of routing.jsonl."""

import json
import subprocess
import sys

import pytest

from megatron_moellava.analysis.watch import find_log, screen, watch
from megatron_moellava.config import DataError
from tests.helpers.paths import REPO

TOOL = REPO / "tools" / "watch_routing.py"


def record(iteration: int = 50, text=(10, 10, 10, 10), warnings=()) -> dict:
    groups = {
        "text": {"choices": list(text)},
        "image": {"choices": [40, 0, 0, 0]},
        "type:color": {"choices": [1, 9, 0, 0]},
    }
    layer = {
        "layer": 2,
        "choices": [50, 10, 10, 10],
        "dropped": [0, 0, 0, 20],
        "entropy": 0.5,
        "top1": 0.7,
        "top2": 0.2,
    }
    layer |= {"max_load": 2.5, "load_balancing_loss": 1.2, "groups": groups}
    return {"iteration": iteration, "num_experts": 4, "topk": 2, "layers": [layer], "warnings": list(warnings)}


def test_screen_shows_every_expert_by_modality():
    text = screen([record()], width=100, colour=False)
    assert "step 50" in text
    assert "dropped 20.0%" in text
    lines = [line for line in text.splitlines() if line.startswith("  expert")]
    assert len(lines) == 4
    assert "100%" in lines[0] and " 25%" in lines[0]
    assert "color              layer 2: expert 1 90%" in text
    assert "\x1b" not in text
    assert all(len(line) <= 100 for line in lines)


def test_bars_grow_with_the_load_and_colours_mark_extremes():
    even, skewed = (screen([record(text=t)], width=100, colour=False).count("█") for t in ((9,) * 4, (5, 5, 5, 0)))
    assert skewed < even
    assert "\x1b[31m" in screen([record()], width=100, colour=True)  # the image tokens' expert 0


def test_only_the_newest_warnings_are_shown():
    records = [record(step, warnings=[f"w{step}"]) for step in range(5)]
    text = screen(records, width=100, colour=False)
    assert "w4" in text and "w1" not in text


def test_a_line_that_is_being_written_is_left_for_later(tmp_path, capsys):
    (tmp_path / "routing.jsonl").write_text(json.dumps(record()) + "\n" + '{"iteration": 51, "lay')
    watch(tmp_path, follow=True, interval=0.01, colour=False, screens=1)
    assert "step 50" in capsys.readouterr().out


def test_missing_log_names_the_folders_that_have_one(tmp_path):
    (tmp_path / "stage3").mkdir()
    (tmp_path / "stage3" / "routing.jsonl").write_text("")
    with pytest.raises(DataError, match="stage3"):
        find_log(tmp_path)


def test_command_draws_once(tmp_path):
    (tmp_path / "routing.jsonl").write_text(json.dumps(record()) + "\n")
    result = subprocess.run([sys.executable, TOOL, tmp_path, "--once"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "expert 3" in result.stdout


def test_further_modalities_have_bars_of_their_own():
    shown = record()
    shown["layers"][0]["groups"]["depth"] = {"choices": [0, 0, 3, 0]}
    lines = [line for line in screen([shown], width=120, colour=True).splitlines() if "  expert" in line]
    assert all("depth" in line for line in lines) and "100%" in lines[2].partition("depth")[2]
