"""A batch on its way from the process that reads it; tests/distributed has several processes."""

import dataclasses

import torch

from megatron_moellava.training.broadcast import broadcast_batch
from tests.helpers.batches import words


def test_a_batch_arrives_whole(world):
    sent = words()
    sent.sample_ids = ["a", "b"]
    received = broadcast_batch(sent)
    for field in dataclasses.fields(sent):
        value, other = getattr(sent, field.name), getattr(received, field.name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, field.name
