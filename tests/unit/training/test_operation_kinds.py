"""Kinds of operations by their names."""

from megatron_moellava.training.operation_kinds import OTHER, by_kind, kind_of


def test_operations_and_kernels_have_the_kind_of_their_work():
    kinds = {
        "aten::addmm": "GEMM",
        "nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_NTN": "GEMM",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "nccl:all_reduce": "communication",
        "aten::_index_put_impl_": "routing",
        "aten::silu_backward": "activation",
        "Memcpy HtoD": "copies",
        "## Call CompiledFxGraph fbti5ovn4cut3cdcky5fc ##": "compiled kernels",
        "triton_poi_fused_cat_silu_0": "compiled kernels",
        "aten::mul": OTHER,
    }
    assert {name: kind_of(name) for name in kinds} == kinds


def test_times_add_up_by_kind_the_largest_first():
    found = by_kind([("aten::mul", 1.0), ("aten::mm", 2.0), ("aten::add", 0.5), ("aten::bmm", 3.0)])
    assert list(found.items()) == [("GEMM", 5.0), (OTHER, 1.5)]
