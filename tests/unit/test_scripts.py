"""Names that a shell could take for commands pass through the scripts of examples/ as they are."""

import os
import shutil
import subprocess

import pytest

from tests.helpers.paths import REPO
from tests.helpers.scripts import validate_only

HOSTILE = """it's $(touch executed) `touch executed`; touch executed & "quoted" *"""


@pytest.mark.parametrize(
    ("script", "others"),
    [
        ("train_stage1.sh", ("BACKBONE",)),
        ("train_stage2.sh", ("BACKBONE",)),
        ("train_stage3.sh", ("BACKBONE",)),
        ("train_lora.sh", ("BACKBONE",)),
        ("train_preferences.sh", ("BACKBONE",)),
        ("train_distil.sh", ("BACKBONE", "LOGITS")),
        ("make_teacher.sh", ("TOP_K",)),
    ],
)
def test_hostile_paths_arrive_as_they_are_and_run_nothing(script, others, tmp_path, stub):
    names = {name: f"{name} {HOSTILE}" for name in ("LOAD", "SAVE", "TOKENIZER", "DATA", "IMAGES", "CONFIG", *others)}
    settings = {"TOKENIZER": "data.tokenizer=", "LOGITS": "training.distillation.teacher_logits="}
    result, words = validate_only(script, tmp_path, stub, **names)
    assert result.returncode == 0, result.stderr
    assert any(word.endswith("make_teacher.py" if script == "make_teacher.sh" else "train.py") for word in words)
    for name, value in names.items():
        wanted = settings.get(name, "") + value
        assert wanted in words, name
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["NODES", "GPUS_PER_NODE"])
def test_counts_are_numbers_and_never_expressions(name, tmp_path, stub):
    result, words = validate_only("train_stage1.sh", tmp_path, stub, **{name: "x[$(touch executed)]"})
    assert result.returncode == 2 and not words
    assert "must be numbers" in result.stderr
    assert not (tmp_path / "executed").exists()


def test_gpus_may_carry_their_type(tmp_path, stub):
    result, words = validate_only("train_stage1.sh", tmp_path, stub, GPUS_PER_NODE="h100:8")
    assert result.returncode == 0 and words, result.stderr


def test_hostile_paths_pass_through_the_conversion(tmp_path, stub):
    environment = {"PATH": os.environ["PATH"], "REPO": str(REPO), "PYTHON": str(stub), "ASKED": str(tmp_path / "asked")}
    words = ["import", f"model {HOSTILE}", "--save", f"save {HOSTILE}"]
    command = [shutil.which("bash"), str(REPO / "examples/convert.sh"), *words]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "asked").read_text().split("\0")[1:-1] == words
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [((), "does not exist"), (("tokenizer.json",), "has no config.json"), (("config.json",), "holds no weights")],
)
def test_a_chain_without_its_models_is_not_submitted(files, message, tmp_path, stub):
    """`sbatch` is not even looked for."""
    for name in files:
        for model in ("phi-2", "clip-vit-large-patch14-336"):
            (tmp_path / model).mkdir(exist_ok=True)
            (tmp_path / model / name).write_text("{}")
    environment = {"PATH": os.environ["PATH"], "REPO": str(REPO), "MODELS": str(tmp_path), "PYTHON": str(stub)}
    command = [shutil.which("bash"), str(REPO / "examples/train_all.sh")]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, message in result.stderr) == (2, True), result.stderr
    assert "phi-2" in result.stderr


@pytest.mark.parametrize("script", ["train_stage1.sh", "convert.sh"])
@pytest.mark.parametrize("save", ["runs/first/stage1", "../elsewhere/first/stage1"])
def test_a_container_sees_only_folders_that_exist(script, save, tmp_path, stub):
    """Nothing has made $SAVE before the first run; the stub refuses such a mount as Apptainer does."""
    (tmp_path / "here").mkdir()
    apptainer = tmp_path / "bin" / "apptainer"
    apptainer.parent.mkdir()
    apptainer.write_text(
        '#!/bin/bash\nIFS=, read -ra mounts <<<"$3"\n'
        'for path in "${mounts[@]}"; do [[ "$path" == /* && -d "$path" ]] || { echo "no mount: $path" >&2; exit 255; }; done\n'
        'echo "$3" >> "$MOUNTED"; exec "${@:5}"\n'
    )
    apptainer.chmod(0o755)
    environment = {"PATH": f"{apptainer.parent}:{os.environ['PATH']}", "REPO": str(REPO), "PYTHON": str(stub)}
    environment |= {"ASKED": str(tmp_path / "asked"), "MOUNTED": str(tmp_path / "mounted"), "CONTAINER": "image.sif"}
    environment |= {"SAVE": save, "VALIDATE_ONLY": "1"}
    words = ["import", "model", "--save", save] if script == "convert.sh" else []
    command = [shutil.which("bash"), str(REPO / "examples" / script), *words]
    result = subprocess.run(command, env=environment, cwd=tmp_path / "here", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    above = os.path.realpath(tmp_path / "here" / save / "..")
    assert (tmp_path / "mounted").read_text().split() == [f"{REPO},{above}"] and os.path.isdir(above)


def test_control_the_stub_would_show_an_injection(tmp_path):
    """A script that does not quote is caught by what the tests above look at."""
    script = tmp_path / "bad.sh"
    script.write_text('eval "echo $SAVE"\n')
    subprocess.run(["bash", str(script)], env={"PATH": os.environ["PATH"], "SAVE": "; touch executed"}, cwd=tmp_path)
    assert (tmp_path / "executed").exists()
