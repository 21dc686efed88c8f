"""SHA256SUMS: what we write coreutils can check, and what others wrote we check."""

import subprocess

import pytest

from megatron_moellava.checkpoint.integrity import DamagedCheckpoint
from megatron_moellava.checkpoint.sums import SUMS_FILE, verify_sums, write_sums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model/below").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "below/two words.txt"):
        (tmp_path / "model" / name).write_text(name)
    write_sums(tmp_path / "model", {})
    return tmp_path / "model"


def notes(path, **options) -> list[str]:
    said: list[str] = []
    verify_sums(path, say=said.append, **options)
    return said


def test_sha256sum_checks_what_we_write(folder):
    check = ["sha256sum", "--check", "--strict", SUMS_FILE]
    done = subprocess.run(check, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 3, done.stderr
    (folder / "config.json").write_text("other")
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 1


@pytest.mark.parametrize("options", [[], ["--binary"]])
def test_what_sha256sum_writes_is_checked(folder, options):
    (folder / SUMS_FILE).unlink()
    names = ["./config.json", "model.safetensors", "below/two words.txt"]
    done = subprocess.run(["sha256sum", *options, *names], cwd=folder, capture_output=True, text=True, check=True)
    (folder / SUMS_FILE).write_text(done.stdout)
    assert notes(folder) == []
    (folder / "below/two words.txt").write_text("other")
    with pytest.raises(DamagedCheckpoint, match=r"below/two words.txt \(differs"):
        notes(folder)


def test_nothing_is_said_where_there_is_no_list(folder, tmp_path):
    (folder / SUMS_FILE).unlink()
    assert notes(folder) == notes(tmp_path / "nothing") == notes(folder, verify=False) == []


def test_files_beyond_the_list_are_said_and_missing_ones_refused(folder):
    (folder / "extra.bin").write_text("new")
    (folder / ".gitattributes").write_text("")
    assert notes(folder) == [f"{folder / SUMS_FILE} leaves out, so these were not verified: extra.bin"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"model.safetensors \(is missing\).*download"):
        notes(folder)


def test_one_file_is_looked_up_in_the_list_beside_it(folder):
    (folder / "config.json").write_text("other")
    assert notes(folder / "model.safetensors") == []
    with pytest.raises(DamagedCheckpoint, match=r"config\.json"):
        notes(folder / "config.json")


def test_the_hurried_are_told(folder):
    (folder / "config.json").write_text("other")
    assert notes(folder, verify=False) == [
        f"{folder / SUMS_FILE} was not looked at (--no-verify): a damaged file would not be noticed"
    ]


@pytest.mark.parametrize(
    ("text", "says"), [("", "is empty"), ("abc  config.json\n", "line 1 is not"), ("<html>", "line 1")]
)
def test_a_list_that_is_none_is_damaged(folder, text, says):
    (folder / SUMS_FILE).write_text(text)
    with pytest.raises(DamagedCheckpoint, match=says):
        notes(folder)
