"""A checkpoint that is damaged is never used, whoever reads it: every kind of damage, every command."""

import importlib.util
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_moellava import parallel
from megatron_moellava.checkpoint.folders import RUN_FILE
from tests.helpers import data_files
from tests.helpers.conversion_models import TOWER
from tests.helpers.damage import DAMAGE, TORN, WEIGHT, flip_in_tensor, forget_digests, trained_checkpoint
from tests.helpers.inference_models import TOKENIZER
from tests.helpers.paths import REPO

LAYOUT = ("--layout", "projector")
SEALED_ALONE = ("emptied run.json", "half of run.json", "run.json of another kind", "edited run.json")
# What each command is given, after the checkpoint C and a folder F that does not exist.
COMMANDS: dict[str, Callable[[Path, Path], tuple]] = {
    "export": lambda c, f: ("convert", "export", c, "--save", f, *LAYOUT),
    "upcycle": lambda c, f: ("convert", "upcycle", c, "--save", f, "--num-experts", 8),
    "inspect": lambda c, f: ("convert", "inspect", c),
    "diff, first": lambda c, f: ("convert", "diff", c, TOWER),
    "diff, second": lambda c, f: ("convert", "diff", TOWER, c),
    "chat": lambda c, f: ("chat", "--load", c),
    "serve": lambda c, f: ("serve", "--load", c),
    "evaluate": lambda c, f: ("evaluate", "--load", c, "--benchmark", "pope", "--out", f),
    "analyze_routing": lambda c, f: ("analyze_routing", "--load", c, "--data", "x.json", "--out", f),
}
WITH_ALL_KINDS = ("export", "upcycle", "chat")  # one of each way to read; the others share these
WITH_THE_OTHERS = ("bit in the weights", "bit in the generators", "missing shard", "edited run.json")
TAKES_NO_VERIFY = ("export", "upcycle", "inspect")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run's folder with one checkpoint."""
    return trained_checkpoint(tmp_path_factory.mktemp("trained") / "run").parent


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs a tool in this process: (exit code, standard error)."""

    def run(name: str, *arguments: object) -> tuple[int, str]:
        spec = importlib.util.spec_from_file_location(name, REPO / f"tools/{name}.py")
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            code = tool.main()
        finally:
            parallel.shutdown()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return code, capsys.readouterr().err

    return run


def iteration(run: Path) -> Path:
    return run / "iter_0000002"


def assert_refused(code: int, error: str, culprit: Path) -> None:
    assert code == 2, error
    assert culprit.name in error, error
    assert "Traceback" not in error and "anew" in error, "says what to do"


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in COMMANDS for kind in (DAMAGE if name in WITH_ALL_KINDS else WITH_THE_OTHERS)],
)
def test_damage_is_refused_and_named(name, kind, copy, command, tmp_path):
    culprit = DAMAGE[kind](iteration(copy))
    code, error = command(*COMMANDS[name](copy, tmp_path / "out"))
    assert_refused(code, error, culprit)
    assert not (tmp_path / "out").exists(), "nothing may be made of a damaged checkpoint"


@pytest.mark.parametrize("damage", TORN.values(), ids=TORN)
@pytest.mark.parametrize("name", ["export", "inspect", "chat"])
def test_torn_checkpoints_without_digests_are_one_sentence(name, damage, copy, command, tmp_path):
    """Nothing vouches for an older version's checkpoint; what cannot be read at all is still no traceback."""
    forget_digests(iteration(copy))
    damage(iteration(copy))
    code, error = command(*COMMANDS[name](copy, tmp_path / "out"))
    assert code == 2 and "Traceback" not in error, error
    assert any(word in error for word in ("cannot be read", "damaged", "missing", "truncated", "no .metadata")), error


@pytest.mark.parametrize("kind", ["bit in the weights", "bit in the optimizer", "edited run.json"])
def test_damaged_start_of_a_training_is_refused(kind, copy, command, tmp_path):
    culprit = DAMAGE[kind](iteration(copy))
    rows = data_files.make_set(tmp_path / "rows", 8)
    arguments = ("--data", rows, "--image-folder", rows.parent, "--save", tmp_path / "save", "--load", copy)
    settings = (f"data.tokenizer={TOKENIZER}", "data.num_workers=0", "training.precision=fp32", "training.device=cpu")
    code, error = command(
        "train", "--stage", 3, *arguments, "training.global_batch_size=2", "training.train_steps=2", *settings
    )
    assert_refused(code, error, culprit)


@pytest.mark.parametrize("kind", SEALED_ALONE)
def test_planning_for_a_checkpoints_model_asks_for_the_seal(kind, copy, command):
    culprit = DAMAGE[kind](iteration(copy))
    code, error = command("plan", "--backbone", copy, "--stage", 2, "--gpus", 8)
    assert_refused(code, error, culprit)


def test_damaged_origin_of_experts_is_refused(trained, copy, tmp_path):
    from megatron_moellava.analysis.similarity import expert_similarity
    from megatron_moellava.checkpoint.integrity import DamagedCheckpoint

    assert expert_similarity(trained, copy).layers == (0, 2)
    culprit = DAMAGE["bit in the weights"](iteration(copy))
    with pytest.raises(DamagedCheckpoint, match=culprit.name):
        expert_similarity(trained, copy)


@pytest.mark.parametrize("name", TAKES_NO_VERIFY)
def test_the_hurried_are_told_that_nothing_was_verified(name, copy, command, tmp_path):
    flip_in_tensor(iteration(copy), WEIGHT)
    code, error = command(*COMMANDS[name](copy, tmp_path / "out"), "--no-verify")
    assert code == 0, error
    assert f"nothing of {iteration(copy)} was verified (--no-verify)" in error


def test_damaged_checkpoints_can_be_compared_without_verifying(trained, copy, command):
    """Which tensor is it?"""
    flip_in_tensor(iteration(copy), WEIGHT)
    code, error = command("convert", "diff", trained, copy, "--no-verify")
    assert code == 1 and error.count("was verified (--no-verify)") == 2, error


def test_a_checkpoint_made_without_verifying_keeps_a_note_of_it(copy, command, tmp_path):
    from megatron_moellava.checkpoint.description import read_description

    assert command(*COMMANDS["upcycle"](copy, tmp_path / "out"), "--no-verify")[0] == 0
    assert read_description(tmp_path / "out/iter_0000000").provenance["source_verified"] is False


def test_unknown_files_are_named_and_do_not_matter(copy, command, tmp_path):
    shutil.copy(iteration(copy) / "__0_0.distcp", iteration(copy) / "__9_0.distcp")
    code, error = command(*COMMANDS["export"](copy, tmp_path / "out"))
    assert code == 0 and "no run wrote there" in error and "__9_0.distcp" in error


def test_a_checkpoint_of_an_older_version_is_read_with_a_note(copy, command, tmp_path):
    forget_digests(iteration(copy))
    code, error = command(*COMMANDS["export"](copy, tmp_path / "out"))
    assert code == 0 and error.count("older version") == 1 and "convert seal" in error


def test_conversions_vouch_for_what_they_write(copy, command, tmp_path):
    """A bit that flips in an upcycled checkpoint was taken for a weight before."""
    assert command(*COMMANDS["upcycle"](copy, tmp_path / "out"))[0] == 0
    culprit = flip_in_tensor(tmp_path / "out/iter_0000000", WEIGHT)
    assert_refused(*command("convert", "inspect", tmp_path / "out"), culprit)


def test_interrupted_copy_is_named(copy, command):
    (iteration(copy) / RUN_FILE).unlink()
    code, error = command("convert", "inspect", copy)
    assert code == 2 and "iter_0000002: the save or the copy was interrupted" in error


def test_a_process_of_its_own_ends_with_2(copy, tmp_path):
    culprit = flip_in_tensor(iteration(copy), WEIGHT)
    arguments = map(str, COMMANDS["export"](copy, tmp_path / "out")[1:])
    done = subprocess.run(
        [sys.executable, "tools/convert.py", *arguments], capture_output=True, text=True, cwd=REPO, check=False
    )
    assert_refused(done.returncode, done.stderr, culprit)
