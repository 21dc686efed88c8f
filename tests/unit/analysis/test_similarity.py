"""How far experts have moved, read from checkpoints."""

import numpy as np
import pytest
import torch

from megatron_moellava.analysis.similarity import Similarity, expert_similarity
from megatron_moellava.config import CheckpointError, MoEConfig
from megatron_moellava.conversion.upcycle import upcycle_checkpoint
from tests.helpers.inference_models import tiny_checkpoint


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("dense"), "dense") / "iter_0000001"


def test_experts_that_were_only_copied_are_identical_and_have_not_moved(dense, tmp_path):
    upcycle_checkpoint(dense, save=tmp_path, moe=MoEConfig())
    found = expert_similarity(tmp_path / "iter_0000000", dense)
    assert found.identical and found.layers == (0, 2)
    assert not found.from_origin_LE.any() and found.from_origin_LE.shape == (2, 4)
    assert found.origin.endswith("/iter_0000001")


def test_experts_with_noise_have_moved_each_its_own_way(dense, tmp_path):
    upcycle_checkpoint(dense, save=tmp_path, moe=MoEConfig(), noise_std=0.1)
    found = expert_similarity(tmp_path / "iter_0000000", dense)
    assert not found.identical and found.from_origin_LE[:, 0] == pytest.approx(0.0), "the first one is the copy"
    assert found.from_origin_LE[:, 1:] == pytest.approx(0.1, rel=0.1)
    assert np.allclose(found.between_LEE, found.between_LEE.transpose(0, 2, 1))
    assert found.between_LEE[:, 1, 2] == pytest.approx(0.1 * 2**0.5, rel=0.1), "independent moves"
    assert np.abs(found.cosine_LEE[:, 1, 2]).max() < 0.1 and found.cosine_LEE[:, 1, 1] == pytest.approx(1.0)


def test_without_an_origin_distances_are_from_the_mean_and_have_no_cosine(dense, tmp_path):
    upcycle_checkpoint(dense, save=tmp_path, moe=MoEConfig(), noise_std=0.1)
    found = expert_similarity(tmp_path / "iter_0000000")
    assert found.origin == "the mean of the experts" and found.cosine_LEE is None
    assert (found.from_origin_LE > 0).all()


def test_an_origin_of_another_model_is_refused(dense, tmp_path):
    other = tiny_checkpoint(tmp_path / "moe", "megatron") / "iter_0000001"
    upcycle_checkpoint(dense, save=tmp_path / "dense layers", moe=MoEConfig(placement="dense"))
    with pytest.raises(CheckpointError, match="give the stage-2 checkpoint that was upcycled"):
        expert_similarity(tmp_path / "dense layers/iter_0000000", tiny_other(tmp_path))
    assert expert_similarity(other).layers == (0, 2)


def tiny_other(folder):
    """A MoE checkpoint with two experts: no FFN of a fitting shape."""
    from tests.helpers.inference_models import GATES

    GATES["two experts"] = MoEConfig(num_moe_experts=2, placement="dense")
    try:
        return tiny_checkpoint(folder / "two", "two experts") / "iter_0000001"
    finally:
        del GATES["two experts"]


def test_identical_means_that_no_expert_has_left_its_siblings():
    zeros = np.zeros((1, 2, 2))
    assert Similarity((0,), "x", np.ones((1, 2)), zeros, None).identical
    assert not Similarity((0,), "x", np.ones((1, 2)), zeros + torch.eye(2).numpy(), None).identical
