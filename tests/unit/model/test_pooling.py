"""Averages of visual tokens over blocks in space and time."""

import torch
import torch.nn.functional as F

from megatron_moellava.model.pooling import pooled


def test_pictures_pass_and_frames_become_the_means_of_their_blocks():
    features = torch.randn(4, 16, 3, dtype=torch.float64)
    rows = pooled(features, ((1, 1), (2, 2), (1, 2)))
    assert rows.shape == (16 + 4 + 4, 3)
    assert torch.equal(rows[:16], features[0])
    for images, found in ((features[1:3], rows[16:20]), (features[3:], rows[20:])):
        grid = images.mean(0).view(4, 4, 3).permute(2, 0, 1)
        assert torch.allclose(found, F.avg_pool2d(grid, 2).flatten(1).T)


def test_odd_sides_lose_their_last_row_and_column_and_gradients_flow():
    features = torch.randn(1, 9, 2, requires_grad=True)
    rows = pooled(features, ((1, 2),))
    assert torch.allclose(rows, features[0].view(3, 3, 2)[:2, :2].mean((0, 1))[None])
    rows.sum().backward()
    assert (features.grad.view(3, 3, 2)[:2, :2] == 0.25).all() and (features.grad.view(3, 3, 2)[2] == 0).all()


def test_without_groups_nothing_changes():
    features = torch.randn(2, 4, 3)
    assert torch.equal(pooled(features, ()), features.flatten(0, 1))
    assert torch.equal(pooled(features[0], ()), features[0])
