"""MoE-LLaVA for transformers (version 5): LlavaForConditionalGeneration with some MLPs replaced by experts.

This file lies beside an export and is loaded with `trust_remote_code=True`. It is for models that transformers cannot
run alone: Phi-2 or StableLM with experts, residual MoE, MiniCPM's logit scaling. Routing is deterministic: softmax over
the chosen experts' logits in fp32, no capacity limit.
"""

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration


class MoELlavaConfig(LlavaConfig):
    """LLaVA's configuration with the fields of the mixture."""

    model_type = "moe_llava"

    moe_layers: list | None = None  # 0-based layers whose MLP is a mixture
    num_experts: int = 0
    num_experts_per_tok: int = 0
    use_residual: bool = False
    logits_divisor: float = 1.0
    output_layer_bias: bool = False


class Gate(nn.Module):
    """A linear layer without bias, in fp32 whatever the model's dtype."""

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, hidden_TD):
        """Logits [T, E], in fp32."""
        return hidden_TD.float() @ self.weight.float().T


class Mixture(nn.Module):
    """Top-k of the experts; with `use_residual` the dense MLP stays and a learned coefficient mixes the two."""

    def __init__(self, config: MoELlavaConfig, make_mlp) -> None:
        super().__init__()
        hidden = config.text_config.hidden_size
        self.top_k = config.num_experts_per_tok
        self.gate = Gate(config.num_experts, hidden)
        self.experts = nn.ModuleList(make_mlp() for _ in range(config.num_experts))
        self.mlp = make_mlp() if config.use_residual else None
        self.coefficient = nn.Linear(hidden, 2) if config.use_residual else None

    def forward(self, hidden_BSD):
        """[B, S, D] -> [B, S, D]; every token reaches all its experts, whatever their load."""
        hidden_TD = hidden_BSD.flatten(0, -2)
        probs_TE = self.gate(hidden_TD).softmax(-1)
        weights_TK, chosen_TK = probs_TE.topk(self.top_k, dim=-1)
        if self.top_k > 1:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        output_TD = torch.zeros_like(hidden_TD)
        for number, expert in enumerate(self.experts):
            tokens, slots = (chosen_TK == number).nonzero(as_tuple=True)
            weighted = expert(hidden_TD[tokens]) * weights_TK[tokens, slots, None].to(hidden_TD.dtype)
            output_TD.index_add_(0, tokens, weighted)
        if self.mlp is not None:
            mix_T2 = self.coefficient(hidden_TD).softmax(-1)
            output_TD = output_TD * mix_T2[:, :1] + self.mlp(hidden_TD) * mix_T2[:, 1:]
        return output_TD.view_as(hidden_BSD)


class ScaledHead(nn.Linear):
    """The output layer over hidden states divided by `divisor` (MiniCPM)."""

    divisor = 1.0

    def forward(self, hidden):
        return super().forward(hidden / self.divisor)


class MoELlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with `Mixture` in place of the MLPs that `config.moe_layers` names."""

    config_class = MoELlavaConfig

    def __init__(self, config: MoELlavaConfig) -> None:
        super().__init__(config)
        text = config.text_config
        layers = self.model.language_model.layers
        for number in config.moe_layers or ():
            kind = type(layers[number].mlp)
            layers[number].mlp = Mixture(config, lambda kind=kind: kind(text))
        self.lm_head = ScaledHead(text.hidden_size, text.vocab_size, bias=config.output_layer_bias)
        self.lm_head.divisor = config.logits_divisor
        self.post_init()
