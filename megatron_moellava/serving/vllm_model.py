"""MoE-LLaVA in vLLM: the modelling file of exports, whose attention, linear layers and norms vLLM replaces by its own.

vLLM flattens all requests of a step into one row of tokens, and wants the same operations whatever they hold, so that it can
compile and record them: every expert sees every token, and the weights of those that were not chosen are zero. Experts are
not divided under tensor parallelism.
"""

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from megatron_moellava.conversion.modeling_moe_llava import Mixture


class FlatMixture(Mixture):
    """`Mixture` whose operations do not depend on what the router chose."""

    def of_experts(self, hidden_TD, weights_TK, chosen_TK):
        """Sum of all experts' outputs, times the weights of the chosen ones."""
        weights_TE = weights_TK.new_zeros(len(hidden_TD), len(self.experts)).scatter(-1, chosen_TK, weights_TK)
        weights_TE = weights_TE.to(hidden_TD.dtype)
        return sum(expert(hidden_TD) * weights_TE[:, number, None] for number, expert in enumerate(self.experts))

    def image_tokens_T1(self, count):
        """Which tokens of the step are of an image: the first `count` of a tensor that all steps share."""
        return self.is_image_BS[:count, None]


@MULTIMODAL_REGISTRY.register_processor(
    MultiModalProcessor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class MoELlavaForConditionalGeneration(TransformersMultiModalForCausalLM):
    """An export with a modelling file. ValueError for what vLLM cannot tell apart in a step of several requests."""

    requires_raw_input_tokens = True  # beside the embeddings: which tokens are of an image

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        if config.embedding_multiplier != 1.0 and not config.scale_multimodal_embeddings:
            raise ValueError(
                "scale_multimodal_embeddings=False: words beside a picture have other embeddings than words alone (MiniCPM as "
                "MoE-LLaVA released it), and vLLM embeds all requests of a step together; serve it with `moellava serve`"
            )
        if config.expert_owners and vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError(
                "expert_owners: later stages of a pipeline do not see which tokens are of an image; serve the model with "
                "pipeline_parallel_size=1"
            )
        # SigLIP's pooling, which no feature needs: vLLM's linear layers do not fit into its attention.
        config.vision_config.vision_use_head = False
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.ignore_unexpected_prefixes.append("model.vision_tower.head.")
        self.logits_processor.scale /= config.logits_divisor
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.is_image_T = torch.zeros(tokens, dtype=torch.bool, device=self.device_config.device)
        for module in self.mixtures():
            module.is_image_BS = self.is_image_T

    def mixtures(self) -> list[Mixture]:
        """The layers with experts."""
        return [module for module in self.model.modules() if isinstance(module, Mixture)]

    def recursive_replace(self) -> None:
        """Exchange what the modelling file has for what vLLM runs."""
        for module in self.mixtures():
            module.__class__ = FlatMixture
        super().recursive_replace()

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **arguments):
        """Hidden states [T, D] of a step; `input_ids` [T], also where `inputs_embeds` [T, D] hold the same tokens."""
        if self.config.expert_owners:
            self.is_image_T[: len(input_ids)].copy_(input_ids == self.config.image_token_id)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **arguments)
