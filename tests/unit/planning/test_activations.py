"""What is kept for the backward pass."""

from megatron_moellava.config import DistillationConfig
from megatron_moellava.planning.activations import activations_of, sizes
from tests.helpers.planning import layout_of


def test_first_stages_keep_more_micro_batches():
    four = layout_of(parallel__pipeline_model_parallel_size=4, training__global_batch_size=64)
    assert [max(four.in_flight(rank)) for rank in range(4)] == [(4,), (3,), (2,), (1,)]
    few = layout_of(parallel__pipeline_model_parallel_size=4, training__global_batch_size=4)
    assert [max(few.in_flight(rank)) for rank in range(4)] == [(2,), (2,), (2,), (1,)]
    virtual = {"parallel__pipeline_model_parallel_size": 2, "parallel__virtual_pipeline_model_parallel_size": 2}
    interleaved = layout_of(**virtual)
    assert interleaved.layers_of(0) == [list(range(8)), list(range(16, 24))]
    # Megatron-Core's warm-up of the first rank: 2 micro-batches on each chunk, then a third on the first.
    assert {(1, 0), (2, 0), (2, 1), (2, 2), (3, 2)} <= interleaved.in_flight(0)
    assert max(map(sum, interleaved.in_flight(0))) == 5 and max(map(sum, interleaved.in_flight(1))) == 3


def test_gpu_modules_keep_less_of_a_dense_layer_and_of_experts_the_activation_twice():
    """Phi-2's experts have no gate; without one Transformer Engine's keep their activation before the router's weight, too."""
    layout = layout_of()
    (local_moe, local_dense), (moe, dense) = (
        [kept for kept, _ in activations_of(layout, 0, name).layers[0][:2]] for name in ("local", "te")
    )
    assert 0.9 * local_dense < dense < local_dense
    activation = sizes(layout)["expert_inner"] * layout.activation_bytes
    assert moe - local_moe == activation - (local_dense - dense)


def test_a_teacher_costs_a_byte_for_each_logit():
    """What autograd keeps of the loss is measured in tests/unit/training/test_distillation.py."""
    usual, distilled = layout_of(), layout_of(training__distillation=DistillationConfig(teacher_logits="x"))
    ends = [activations_of(layout, 0, "te").end for layout in (usual, distilled)]
    assert ends[1] - ends[0] == usual.tokens * usual.vocabulary / usual.tp
