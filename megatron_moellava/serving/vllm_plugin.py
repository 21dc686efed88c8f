"""What vLLM finds by its entry point group `vllm.general_plugins`: models of `--layout transformers` with a modelling file.

Its environment has vLLM, torch and transformers; of this package no more than these two modules and the modelling file are
imported there, so that `pip install --no-deps` is enough. The class is apart, because every process of vLLM asks every plugin.
"""

from transformers import AutoConfig, AutoModel
from vllm import ModelRegistry

from megatron_moellava.conversion.modeling_moe_llava import MoELlavaConfig, MoELlavaModel

CLASS = "megatron_moellava.serving.vllm_model:MoELlavaForConditionalGeneration"


def register() -> None:
    """The architecture that config.json names; vLLM may call it several times in a process."""
    AutoConfig.register(MoELlavaConfig.model_type, MoELlavaConfig, exist_ok=True)
    AutoModel.register(MoELlavaConfig, MoELlavaModel, exist_ok=True)
    ModelRegistry.register_model("MoELlavaForConditionalGeneration", CLASS)
