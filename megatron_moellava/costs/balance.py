"""What pictures cost beside text, for the data: rows are dealt to data-parallel ranks by cost, and at native resolution
pictures differ in theirs.

Units: the attention of a sample of n tokens in the decoder counts n ** 2, and a picture `Tower.work(patches)` times
`tower_weight`. What is the same for every packed row (its matrix products) is left out.
"""

from megatron_moellava.backbones import Backbone
from megatron_moellava.config import RunConfig
from megatron_moellava.costs.flops import CAUSAL
from megatron_moellava.stages import adapted_roles, trained_roles
from megatron_moellava.towers import Tower

FORWARD, WITH_GRADIENTS = 1.0, 3.0  # passes: gradients of activations and of weights cost two forward passes more


def tower_weight(run: RunConfig, backbone: Backbone, tower: Tower) -> float:
    """Cost of one unit of `Tower.work` in units of squared tokens: both times 4 FLOPs, their width and their layers."""
    trained = {*trained_roles(run.training), *adapted_roles(run.training.lora)}
    passes = WITH_GRADIENTS if "tower" in trained else FORWARD
    vision = passes * tower.hidden_size * tower.num_used_layers
    width = backbone.num_attention_heads * backbone.kv_channels
    return vision / (WITH_GRADIENTS * CAUSAL * width * backbone.num_layers)
