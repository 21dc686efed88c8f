"""Exports carry a SHA256SUMS of all their files, imports look at one where it lies, and torn downloads are one sentence."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.integrity import DamagedCheckpoint, file_digests, files_below
from megatron_moellava.checkpoint.sums import SUMS_FILE, write_sums
from megatron_moellava.config import MoELlavaError
from megatron_moellava.conversion import writers
from megatron_moellava.conversion.exports import EXPORT_LAYOUTS, export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.inspection import diff, inspect
from tests.helpers.conversion_models import TOWER, original_config, original_state, write_folder
from tests.helpers.damage import empty, flip, half_of, overwrite

STATE, CONFIG = original_state("llama", "dense"), original_config("llama", "dense")


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    import_checkpoint(write_folder(folder / "source", STATE, CONFIG), save=folder / "run", tower=str(TOWER))
    return folder / "run"


@pytest.fixture
def exported(imported, tmp_path) -> Path:
    export_checkpoint(imported, save=tmp_path / "out", layout="original")
    return tmp_path / "out"


def check(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(["sha256sum", "-c", SUMS_FILE], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("layout", [layout for layout in EXPORT_LAYOUTS if layout != "gguf"])  # test_gguf_export.py
def test_every_layout_lists_all_its_files(layout, imported, tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "SHARD_BYTES", 200_000)
    export_checkpoint(imported, save=tmp_path / "out", layout=layout)
    done = check(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert {line.removesuffix(": OK") for line in done.stdout.splitlines()} == set(files_below(tmp_path / "out")) - {
        SUMS_FILE
    }
    if layout not in ("projector", "tower"):  # the rest exceeds one shard
        assert "model.safetensors.index.json: OK" in done.stdout


def test_what_is_imported_has_the_digests_of_its_files(imported, monkeypatch, tmp_path):
    """Computed from what passes, over several data files."""
    monkeypatch.setattr(writers, "SHARD_BYTES", 100_000)
    source = write_folder(tmp_path / "source", STATE, CONFIG)
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    folder = tmp_path / "run/iter_0000000"
    expected = read_description(folder).sha256
    assert len(list(folder.glob("*.distcp"))) > 3
    assert expected == file_digests(folder, [name for name in files_below(folder) if name != "run.json"])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_export_is_not_taken_back(name, exported, tmp_path, capsys):
    flip(exported / name, (exported / name).stat().st_size - 5)
    for use in (
        lambda: import_checkpoint(exported, save=tmp_path / "again", tower=str(TOWER)),
        lambda: inspect(exported),
        lambda: diff(TOWER, exported),
    ):
        with pytest.raises(DamagedCheckpoint, match=rf"{name} \(differs.*--no-verify"):
            use()
    assert not (tmp_path / "again").exists()
    if name == "model.safetensors":
        import_checkpoint(exported, save=tmp_path / "again", tower=str(TOWER), verify=False)
        assert "was not looked at (--no-verify)" in capsys.readouterr().err


def test_export_import_and_export_again_agree(exported, tmp_path, capsys):
    (exported / "notes.txt").write_text("mine")
    import_checkpoint(exported, save=tmp_path / "again", tower=str(TOWER))
    assert "leaves out, so these were not verified: notes.txt" in capsys.readouterr().err
    export_checkpoint(tmp_path / "again", save=tmp_path / "out again", layout="original")
    first, second = ((folder / SUMS_FILE).read_text().splitlines() for folder in (exported, tmp_path / "out again"))
    own = ("config.json", "README.md")  # the card says where the weights came from, and that is another folder now
    assert {line for line in second if not line.endswith(own)} <= set(first)


def test_towers_and_projectors_are_looked_at_too(imported, tmp_path):
    tower = Path(shutil.copytree(TOWER, tmp_path / "tower"))
    write_sums(tower, {})
    export_checkpoint(imported, save=tmp_path / "projector", layout="projector")
    export_checkpoint(imported, save=tmp_path / "language", layout="language-model")
    file = tmp_path / "projector/mm_projector.bin"
    parts = {"tower": str(tower), "projector": file}
    import_checkpoint(tmp_path / "language", save=tmp_path / "whole", **parts)
    flip(file, file.stat().st_size // 2)
    with pytest.raises(DamagedCheckpoint, match=r"mm_projector.bin \(differs"):
        import_checkpoint(tmp_path / "language", save=tmp_path / "again", **parts)
    flip(tower / "model.safetensors", 5000)
    with pytest.raises(DamagedCheckpoint, match=r"model.safetensors \(differs"):
        import_checkpoint(tmp_path / "language", save=tmp_path / "again", tower=str(tower))
    with pytest.raises(DamagedCheckpoint, match=r"model.safetensors \(differs"):
        export_checkpoint(imported, save=tmp_path / "out", layout="original", tower=tower)


TORN: dict[str, Callable[[Path], object]] = {
    "emptied weights": lambda folder: empty(folder / "model.safetensors"),
    "weights without data": lambda folder: overwrite(folder / "model.safetensors", "12345678"),
    "another header": lambda folder: (folder / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"{x}}"),
    "emptied index": lambda folder: overwrite(folder / "model.safetensors.index.json", ""),
    "another index": lambda folder: overwrite(folder / "model.safetensors.index.json", "[]"),
    "half of config.json": lambda folder: half_of(folder / "config.json"),
}


@pytest.mark.parametrize("damage", TORN.values(), ids=TORN)
def test_a_torn_download_is_one_sentence(damage, tmp_path):
    source = write_folder(tmp_path / "source", {"lm_head.weight": STATE["lm_head.weight"]}, CONFIG)
    damage(source)
    with pytest.raises(MoELlavaError, match=r"\.json|safetensors"):
        import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    assert not (tmp_path / "run").exists()
