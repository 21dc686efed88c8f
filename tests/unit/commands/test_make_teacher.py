"""The options of `moellava make-teacher`; what its logits are is in tests/unit/training/test_teacher.py."""

import pytest

from megatron_moellava.commands.make_teacher import main, parse_args, teacher_run
from megatron_moellava.config import MoEConfig
from megatron_moellava.data.teacher_logits import missing, read_teacher
from tests.helpers import data_files
from tests.helpers.inference_models import TOKENIZER, tiny_checkpoint
from tests.unit.validation.test_problems import checkpoint

NEEDED = ["--load", "run", "--save", "logits"]


def test_settings_may_follow_the_rows():
    args = parse_args([*NEEDED, "--data", "a.json", "b.json", "data.seq_length=64", "--top-k", "4"])
    assert (args.data, args.overrides, args.top_k) == (["a.json", "b.json"], ["data.seq_length=64"], 4)
    assert (args.dtype, args.rows_per_shard) == ("float16", 512)


@pytest.mark.parametrize(("option", "value"), [("--top-k", "0"), ("--rows-per-shard", "0"), ("--dtype", "int8")])
def test_what_means_nothing_is_a_usage_error(option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*NEEDED, option, value])
    assert stop.value.code == 2 and f"argument {option}" in capsys.readouterr().err


def test_of_the_students_run_the_rows_and_the_layout_are_read(tmp_path):
    """Its model, its experts and its teacher are its own."""
    load = checkpoint(tmp_path / "load", "phi-2-tiny", moe=MoEConfig(num_moe_experts=2))
    config = tmp_path / "student.yaml"
    config.write_text(
        "model: {backbone: llama-tiny}\nmoe: {num_moe_experts: 8}\ntraining: {stage: 3, global_batch_size: 7,\n"
        "  distillation: {teacher_logits: logits}}\ndata: {template: v1, seq_length: 96, sampler: modality_length}\n"
        "parallel: {tensor_model_parallel_size: 2}\n"
    )
    args = parse_args(["--load", load, "--save", "logits", "--config", str(config), "--data", "a.json"])
    run = teacher_run(args)
    assert (run.model.backbone, run.moe.num_moe_experts, run.training.distillation) == ("phi-2-tiny", 2, None)
    assert (run.data.template, run.data.seq_length, run.data.sampler) == ("v1", 96, "shuffle")
    assert run.parallel.tensor_model_parallel_size == 2 and run.checkpoint.load == load
    assert [source.path for source in run.data.sources] == ["a.json"]
    wide = teacher_run(parse_args([*NEEDED[2:], "--load", load, "--data", "a.json", "training.micro_batch_size=4"]))
    assert wide.training.global_batch_size == 4


def test_the_logits_of_a_checkpoint_are_written(tmp_path, capsys):
    path = data_files.write_rows(data_files.write_images(tmp_path / "data"), [data_files.row(n) for n in range(3)])
    config = tmp_path / "student.yaml"
    config.write_text(f"data: {{tokenizer: '{TOKENIZER}', template: v1, seq_length: 512, num_workers: 0}}\n")
    words = ["--load", str(tiny_checkpoint(tmp_path / "load")), "--save", str(tmp_path / "logits"), "--top-k", "4"]
    words += [
        "--config",
        str(config),
        "--image-folder",
        str(path.parent),
        "--data",
        str(path),
        "training.precision=fp32",
    ]
    assert main([*words, "--validate-only"]) == 0
    assert "the run is valid" in capsys.readouterr().out and not (tmp_path / "logits").exists()
    assert main(words) == 0
    assert "the 4 likeliest tokens at every label of 3 rows" in capsys.readouterr().out
    description = read_teacher(tmp_path / "logits")
    assert (description.rows, description.dtype) == (3, "float16") and not missing(tmp_path / "logits", description)
    assert main([*words, "data.label_mode=original"]) == 2
    assert "with another computed, another labels; give the same command" in capsys.readouterr().err


def test_a_teacher_that_is_not_there_is_one_sentence(tmp_path, capsys):
    assert main(["--load", str(tmp_path / "nowhere"), "--save", str(tmp_path / "logits"), "--data", "a.json"]) == 2
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "logits").exists()
