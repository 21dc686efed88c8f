"""What `moellava ablate` writes into the document, and what its runs inherit."""

import os

from megatron_moellava.commands.ablate import CLAIMS_HEAD, DOCS_HEAD, main
from megatron_moellava.machine import DEVICE, TRANSFORMER_IMPL
from tests.helpers.paths import REPO


def test_the_document_has_the_text_that_the_command_writes():
    text = (REPO / "docs/measurements/ablations.md").read_text()
    assert text.startswith(DOCS_HEAD) and CLAIMS_HEAD in text


def test_runs_inherit_device_and_modules(tmp_path, monkeypatch):
    for name, value in (("CUDA_VISIBLE_DEVICES", "0"), (DEVICE, "auto"), (TRANSFORMER_IMPL, "auto")):
        monkeypatch.setenv(name, value)
    assert main([str(tmp_path / "missing.yaml"), "--device", "cpu", "--transformer-impl", "local"]) == 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ[TRANSFORMER_IMPL] == "local"
