"""MoE-LLaVA for transformers (version 5): LlavaForConditionalGeneration with some MLPs replaced by experts.

This file lies beside an export and is loaded with `trust_remote_code=True`. It is for models that transformers cannot
run alone: Phi-2 or StableLM with experts, residual MoE, DeepSeekMoE, MiniCPM's scalings. Routing is deterministic: softmax
in fp32, no capacity limit.
"""

import copy

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel


class MoELlavaConfig(LlavaConfig):
    """LLaVA's configuration with the fields of the mixture."""

    model_type = "moe_llava"

    moe_layers: list | None = None  # 0-based layers whose MLP is a mixture
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0  # width of an expert; 0: the dense MLP's
    normalize_top1: bool = False  # one expert per token: its weight is 1, not its probability
    norm_topk_prob: bool = True  # False: several experts have their probabilities among all, which do not sum to 1
    routed_scaling_factor: float = 1.0  # of the weights of the chosen experts
    use_residual: bool = False
    expert_bias: bool = False  # experts are chosen by sigmoid + bias, and weighted by the sigmoid alone
    shared_expert_intermediate_size: int = 0  # of an expert that sees every token
    expert_owners: list | None = None  # "image", "text" or "shared" for each expert; None: all are everybody's
    expert_penalty: float | None = None  # of the logits of another modality's experts; None: they cannot be chosen
    embedding_multiplier: float = 1.0  # of word embeddings, never of visual tokens
    scale_multimodal_embeddings: bool = True  # False: only where there are no images (MiniCPM in the original)
    logits_divisor: float = 1.0
    output_layer_bias: bool = False


class Gate(nn.Module):
    """A linear layer without bias, in fp32 whatever the model's dtype."""

    def __init__(self, num_experts: int, hidden_size: int, has_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.expert_bias = nn.Parameter(torch.zeros(num_experts), requires_grad=False) if has_bias else None

    def forward(self, hidden_TD):
        """Logits [T, E], in fp32."""
        return hidden_TD.float() @ self.weight.float().T


class Mixture(nn.Module):
    """Top-k of the experts; with `use_residual` the dense MLP stays and a learned coefficient mixes the two."""

    def __init__(self, config: MoELlavaConfig, make_mlp) -> None:
        super().__init__()
        hidden = config.text_config.hidden_size
        self.top_k = config.num_experts_per_tok
        self.has_expert_bias = config.expert_bias
        self.gate = Gate(config.num_experts, hidden, config.expert_bias)
        self.normalizes = config.norm_topk_prob if self.top_k > 1 else config.normalize_top1
        self.scale = config.routed_scaling_factor
        width = config.moe_intermediate_size
        self.experts = nn.ModuleList(make_mlp(width) for _ in range(config.num_experts))
        size = config.shared_expert_intermediate_size
        self.shared_expert = make_mlp(size) if size else None
        self.owners, self.penalty = config.expert_owners, config.expert_penalty
        self.is_image_BS = None  # of the pass that is under way
        self.mlp = make_mlp() if config.use_residual else None
        self.coefficient = nn.Linear(hidden, 2) if config.use_residual else None

    def forward(self, hidden_BSD):
        """[B, S, D] -> [B, S, D]; every token reaches all its experts, whatever their load."""
        hidden_TD = hidden_BSD.flatten(0, -2)
        logits_TE = self.gate(hidden_TD)
        if self.owners:
            logits_TE = self.by_modality(logits_TE, self.image_tokens_T1(len(logits_TE)))
        if not self.has_expert_bias:
            weights_TK, chosen_TK = logits_TE.softmax(-1).topk(self.top_k, dim=-1)
        else:
            scores_TE = logits_TE.sigmoid()
            biased_TE = (scores_TE + self.gate.expert_bias.float()).masked_fill(logits_TE.isneginf(), -torch.inf)
            chosen_TK = biased_TE.topk(self.top_k, dim=-1).indices
            weights_TK = scores_TE.gather(-1, chosen_TK)
        if self.normalizes:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        weights_TK = weights_TK * self.scale
        output_TD = self.of_experts(hidden_TD, weights_TK, chosen_TK)
        if self.shared_expert is not None:
            output_TD = output_TD + self.shared_expert(hidden_TD)
        if self.mlp is not None:
            mix_T2 = self.coefficient(hidden_TD).softmax(-1)
            output_TD = output_TD * mix_T2[:, :1] + self.mlp(hidden_TD) * mix_T2[:, 1:]
        return output_TD.view_as(hidden_BSD)

    def of_experts(self, hidden_TD, weights_TK, chosen_TK):
        """Sum of the chosen experts' outputs, times their weights."""
        output_TD = torch.zeros_like(hidden_TD)
        for number, expert in enumerate(self.experts):
            tokens, slots = (chosen_TK == number).nonzero(as_tuple=True)
            weighted = expert(hidden_TD[tokens]) * weights_TK[tokens, slots, None].to(hidden_TD.dtype)
            output_TD.index_add_(0, tokens, weighted)
        return output_TD

    def image_tokens_T1(self, count):
        """Which of the pass's `count` tokens are of an image."""
        return self.is_image_BS.reshape(count, 1)

    def by_modality(self, logits_TE, is_image_T1):
        """Logits of the other modality's experts: -inf, or lower by the penalty."""
        is_image_T1 = is_image_T1.to(logits_TE.device)
        of_image_E, of_text_E = (
            torch.tensor([owner == name for owner in self.owners], device=logits_TE.device)
            for name in ("image", "text")
        )
        others_TE = torch.where(is_image_T1, of_text_E, of_image_E)
        lower = torch.inf if self.penalty is None else self.penalty
        return torch.where(others_TE, logits_TE - lower, logits_TE)


def sized(text, intermediate_size: int):
    """The text model's config with another width of the MLP; 0: as it is."""
    if not intermediate_size:
        return text
    other = copy.deepcopy(text)
    other.intermediate_size = intermediate_size
    return other


class ScaledEmbedding(nn.Embedding):
    """Word embeddings times `multiplier` (MiniCPM)."""

    multiplier = 1.0

    def forward(self, ids):
        words = super().forward(ids)
        return words if self.multiplier == 1.0 else words * self.multiplier


class ScaledHead(nn.Linear):
    """The output layer over hidden states divided by `divisor` (MiniCPM)."""

    divisor = 1.0

    def forward(self, hidden):
        return super().forward(hidden / self.divisor)


def equip(model: LlavaModel, config: MoELlavaConfig) -> None:
    """Put `Mixture` in place of the MLPs that `config.moe_layers` names, and the scaling of word embeddings in."""
    text, decoder = config.text_config, model.language_model
    for number in config.moe_layers or ():
        kind = type(decoder.layers[number].mlp)
        decoder.layers[number].mlp = Mixture(config, lambda size=0, kind=kind: kind(sized(text, size)))
    if config.embedding_multiplier != 1.0:
        decoder.embedding_multiplier = 1.0  # Granite's own would scale visual tokens too
        decoder.embed_tokens = ScaledEmbedding(text.vocab_size, text.hidden_size, decoder.embed_tokens.padding_idx)
        decoder.embed_tokens.multiplier = config.embedding_multiplier


class MoELlavaModel(LlavaModel):
    """Tower, projector and decoder, without the output layer: what other tools build upon."""

    config_class = MoELlavaConfig

    def __init__(self, config: MoELlavaConfig) -> None:
        super().__init__(config)
        equip(self, config)
        self.post_init()


class MoELlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with `Mixture` in place of the MLPs that `config.moe_layers` names."""

    config_class = MoELlavaConfig

    def __init__(self, config: MoELlavaConfig) -> None:
        super().__init__(config)
        text = config.text_config
        equip(self.model, config)
        self.lm_head = ScaledHead(text.hidden_size, text.vocab_size, bias=config.output_layer_bias)
        self.lm_head.divisor = config.logits_divisor
        self.post_init()

    def forward(self, input_ids=None, pixel_values=None, **arguments):
        if self.config.expert_owners:
            if input_ids is None:
                raise ValueError("experts by modality need input_ids, which say which tokens are of an image")
            for layer in self.model.language_model.layers:
                if isinstance(layer.mlp, Mixture):
                    layer.mlp.is_image_BS = input_ids == self.config.image_token_id
        if self.config.embedding_multiplier != 1.0 and not self.config.scale_multimodal_embeddings:
            # A cache remembers that the text it holds began with images.
            cache = next(
                (arguments[name] for name in ("cache", "past_key_values") if arguments.get(name) is not None), None
            )
            seen = pixel_values is not None or getattr(cache, "has_images", False)
            if cache is not None:
                cache.has_images = seen
            self.get_input_embeddings().multiplier = 1.0 if seen else self.config.embedding_multiplier
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, **arguments)
