"""What `moellava ablate` writes into the document, and what its runs inherit."""

import json
import os

import pytest

from megatron_moellava.commands.ablate import CLAIMS_HEAD, DOCS_HEAD, main
from megatron_moellava.machine import DEVICE, TRANSFORMER_IMPL
from tests.helpers.grids import GRID, made
from tests.helpers.paths import REPO


def test_the_document_has_the_text_that_the_command_writes():
    text = (REPO / "docs/measurements/ablations.md").read_text()
    assert text.startswith(DOCS_HEAD) and CLAIMS_HEAD in text


def test_runs_inherit_device_and_modules(tmp_path, monkeypatch):
    for name, value in (("CUDA_VISIBLE_DEVICES", "0"), (DEVICE, "auto"), (TRANSFORMER_IMPL, "auto")):
        monkeypatch.setenv(name, value)
    assert main([str(tmp_path / "missing.yaml"), "--device", "cpu", "--transformer-impl", "local"]) == 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ[TRANSFORMER_IMPL] == "local"


def test_a_document_is_made_of_kept_results_when_their_runs_are_gone(tmp_path, capsys):
    grid = made(tmp_path, GRID + "curves: true\n")
    runs, data = tmp_path / "runs", tmp_path / "data.jsonl"
    for seed, accuracy in ((1, 60.0), (2, 61.0)):
        node = grid.chain("four", seed)[-1]
        (runs / node.name).mkdir(parents=True)
        (runs / node.name / "done.json").write_text(json.dumps({"numbers": {"accuracy": accuracy}}))
    words = [str(tmp_path / "grid.yaml"), "--docs", str(tmp_path / "new/page.md"), "--data", str(data), "--runs"]
    assert main([*words, str(runs)]) == 0
    page = (tmp_path / "new/page.md").read_text()
    assert "| 2 | 60.50 ± 0.71 |" in page
    assert [row["accuracy"] for row in map(json.loads, data.open())] == [60.0, 61.0]
    assert main([*words, str(tmp_path / "none")]) == 0 and (tmp_path / "new/page.md").read_text() == page


@pytest.mark.parametrize(("words", "message"), [
    (["--report"], "needs --docs"),
    (["--docs", "page.md", "--steps-scale", "0.1"], "--steps-scale shortens them"),
])  # fmt: skip
def test_only_whole_results_of_a_document_are_kept(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    made(tmp_path)
    assert main([str(tmp_path / "grid.yaml"), "--data", str(tmp_path / "data.jsonl"), *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "data.jsonl").exists()
