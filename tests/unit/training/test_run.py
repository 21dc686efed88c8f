"""From a run to its steps: what a short run is told; test_small_runs.py trains them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_moellava.config import ConfigError, OptimizerConfig
from megatron_moellava.training.run import build_loader, train_steps
from tests.helpers.data_files import ASSETS, config, make_set
from tests.helpers.inference_models import tiny_run


def run_of(train_steps: int = 0, batch: int = 4, warmup: float = 0.0):
    run = tiny_run()
    training = replace(run.training, train_steps=train_steps, global_batch_size=batch)
    return replace(run, training=training, optimizer=OptimizerConfig(lr_warmup_fraction=warmup))


def rows(count: int):
    return SimpleNamespace(rows_per_epoch=lambda: count)


def test_an_epoch_has_as_many_steps_as_its_rows_fill(world):
    assert train_steps(run_of(batch=4), rows(12)) == 3 and train_steps(run_of(batch=4), rows(13)) == 4
    assert train_steps(run_of(train_steps=7), rows(13)) == 7


def test_fewer_rows_than_a_batch_are_refused_or_told(world, capsys):
    with pytest.raises(ConfigError, match=r"fills 3 rows, fewer than one step of training\.global_batch_size=4"):
        train_steps(run_of(), rows(3))
    assert train_steps(run_of(train_steps=2), rows(3)) == 2
    assert "takes each of the 3 rows 1.3 times; 2 steps are 2.7 epochs" in capsys.readouterr().out


def test_a_single_step_of_warm_up_trains_nothing_and_warm_up_alone_is_told(world, capsys):
    with pytest.raises(ConfigError, match=r"set optimizer\.lr_warmup_fraction=0, or train for more steps"):
        train_steps(run_of(train_steps=1, warmup=0.5), rows(9))
    assert train_steps(run_of(train_steps=4, warmup=1.0), rows(99)) == 4
    assert "all 4 steps are warm-up" in capsys.readouterr().out


def test_a_tokenizer_with_more_tokens_than_the_model_has_is_refused(world, tmp_path):
    run = replace(tiny_run(), data=config(make_set(tmp_path, 4), tokenizer=str(ASSETS / "tok_bpe"), template="phi"))
    assert build_loader(run).rows_per_epoch() > 0
    from tests.helpers.made_tokenizer import write_tokenizer

    big = write_tokenizer(tmp_path / "big", size=100_000)
    with pytest.raises(ConfigError, match=r"has 100000 tokens, more than the vocab_size="):
        build_loader(replace(run, data=replace(run.data, tokenizer=str(big))))
