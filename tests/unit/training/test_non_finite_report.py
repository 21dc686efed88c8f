"""Who began, when a loss or a gradient is not finite."""

from megatron_moellava.training.non_finite_report import name_ranks


def test_who_began_is_named_and_a_loss_comes_before_gradients():
    ranks = [(0, ["a"], "gradient"), (1, ["b"], "loss"), (2, ["c"], "")]
    assert name_ranks(ranks) == ("the loss of rank 1", "b")
    assert name_ranks([ranks[0], ranks[2]]) == ("the gradient of rank 0", "a")


def test_ranks_of_one_model_name_their_samples_once():
    assert name_ranks([(0, ["a"], "loss"), (1, ["a"], "loss")]) == ("the loss of rank 0, 1", "a")
    assert name_ranks([(0, ["a"], ""), (1, ["a"], ""), (2, ["b"], "")]) == ("the gradient", "a, b")
