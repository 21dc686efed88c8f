"""What experts and their dispatcher need."""

from megatron_moellava.backbones import BACKBONES
from megatron_moellava.model.configuration import transformer_config
from tests.helpers.runs import problems, tiny


def test_deepep_is_a_matter_of_configuration():
    """Megatron-Core accepts the flex dispatcher with DeepEP's backend; only a GPU can run it."""
    run = tiny(moe__moe_token_dispatcher_type="flex", parallel__expert_model_parallel_size=2)
    config = transformer_config(BACKBONES["llama-tiny"], run)
    assert (config.moe_token_dispatcher_type, config.moe_flex_dispatcher_backend) == ("flex", "deepep")
    assert config.moe_router_dtype == "fp32"  # DeepEP takes no other weights
    assert "needs GPUs" in problems(2, moe__moe_token_dispatcher_type="flex", parallel__expert_model_parallel_size=2)
