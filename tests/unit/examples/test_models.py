"""The quickstart's tower, pretrained for as many steps as --steps-scale leaves."""

import pytest
import torch

from megatron_moellava.towers import get_tower


@pytest.mark.parametrize("steps", [2, 3, 5, 7, 10, 11, 19, 20, 1000])
def test_the_learning_rate_rises_and_falls_whatever_the_number_of_steps(steps):
    from models import LEARNING_RATE, Pretraining

    words_NW = torch.eye(3)
    pretraining = Pretraining(torch.nn.Linear(2, 2), get_tower("clip-tiny"), words_NW, seed=1, steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(pretraining.schedule.get_last_lr()[0])
        pretraining.optimizer.step()
        pretraining.schedule.step()  # after the last one too, as in training
    assert rates[0] < LEARNING_RATE / 20 and rates[-1] < LEARNING_RATE / 1000
    assert steps < 5 or max(rates) > LEARNING_RATE / 2
