"""`Backbone`: one language model as data. Field names are Megatron-Core's; a family file fills them and nothing else.

`HuggingFace` says, also as data, how the same model is spelt in a `config.json`: which key holds which field, and
which keys must have which value because this program (or Megatron-Core) supports no other. It is read for import and
written for export (`from_config.py`).
"""

import math
from collections.abc import Callable
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field

from megatron_moellava.config import MoEConfig
from megatron_moellava.mapping import Heads, Mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Llama-3.1's frequency scaling (transformers `modeling_rope_utils`, type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """YaRN's frequency scaling (arXiv 2309.00071), with DeepSeek's two weights of the growth of the attention's logits."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @property
    def attention_factor(self) -> float:
        """What rotated queries and keys are multiplied by."""
        return self._growth(self.mscale) / self._growth(self.mscale_all_dim)

    def _growth(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Multi-latent attention (MLA, arXiv 2405.04434): the keys and values of all heads come from one narrow latent of a token.

    A head's `kv_channels` are then those of its queries and keys: `qk_head_dim` that positions leave alone, and
    `qk_pos_emb_head_dim` that they rotate, which keys have once for all heads.
    """

    q_lora_rank: int | None  # width of the queries' own latent; None: queries come from the hidden states
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int
    layernorm_epsilon: float = (
        1e-6  # of the latents' norms; the published code has it so, whatever the other norms have
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Original:
    """How MoE-LLaVA's own checkpoints call this family, or would in their manner: a name, in two spellings."""

    name: str  # e.g. "phi"
    stem: str  # of its classes, e.g. "Phi"
    train_modules: tuple[str, ...] = ("up_proj", "down_proj", "gate_proj", "wg")  # the recipe's, recorded in config.moe

    @property
    def model_type(self) -> str:
        """Of a dense model."""
        return f"llava_{self.name}"

    @property
    def moe_model_type(self) -> str:
        """Of a model with experts."""
        return f"moe_llava_{self.name}"

    @property
    def architecture(self) -> str:
        """Of a dense model."""
        return f"Llava{self.stem}ForCausalLM"

    @property
    def moe_architecture(self) -> str:
        """Of a model with experts."""
        return f"MoELLaVA{self.stem}ForCausalLM"


@dataclass(frozen=True, kw_only=True, slots=True)
class MoELayers:
    """How a family's config says which layers have experts. `keys`: what `read` looks at and `write` gives."""

    keys: tuple[str, ...] = ()
    read: Callable[[dict], tuple[int, ...]]  # config -> the layers
    write: Callable[[tuple[int, ...], int], dict] = lambda layers, num_layers: {}  # the inverse


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The experts of a family whose published models have some, as transformers configures and spells them."""

    fields: Dict[str, str]  # config key -> MoEConfig field
    defaults: Dict[str, object]  # what an absent key means (the config class's default)
    layers: MoELayers
    constants: Dict[str, object] = field(default_factory=dict)  # MoEConfig fields that all models of the family share
    norm_topk_prob: bool | None = None  # what an absent key means; None: there is no such key, and weights sum to 1
    shared_count: str = ""  # config key: the shared expert is so many times as wide as a routed one
    module: str = "mlp."  # stands in the place of "mlp." where there are experts
    expert: str = "experts.{k}."  # `{k}`: the number of the expert
    router: str = "gate."
    expert_bias: str = "e_score_correction_bias"
    shared: str = "shared_experts."
    shared_gate: str = "shared_expert_gate.weight"

    @property
    def keys(self) -> frozenset[str]:
        """Every config key that says something of the experts."""
        others = {"norm_topk_prob"} if self.norm_topk_prob is not None else set()
        others |= {self.shared_count} if self.shared_count else set()
        return frozenset({*self.fields, *self.layers.keys, *others})


@dataclass(frozen=True, kw_only=True, slots=True)
class HuggingFace:
    """The `config.json` side of a family."""

    family: str  # the name of the family file, and of its tiny size's stem
    model_type: str  # e.g. "phi"
    architecture: str  # e.g. "PhiForCausalLM"
    original: Original
    aliases: tuple[str, ...] = ()  # other model types of the same architecture and names
    fields: Dict[str, str]  # config key -> Backbone field; several keys may name one field (two ways to spell it)
    constants: Dict[str, object]  # config key -> the only supported value; `hidden_act` and the like
    defaults: Dict[str, object] = field(default_factory=dict)  # what an absent key means (the config class's default)
    inert: tuple[str, ...] = ()  # keys of this family's configs that change no number here; each says why in its file
    prefix: str = "model."  # where the decoder lives in the state dict; the projector and the tower live beside it
    moe_model_type: str = ""  # transformers' model type that computes the same with experts; empty: there is none
    experts: Experts | None = None  # of a family whose own models have experts
    export_as: str = ""  # family whose names transformers knows this architecture by; empty: its own
    read: Callable[[dict], dict] = lambda config: {}  # Backbone fields that are not one config key each
    write: Callable[["Backbone"], dict] = lambda backbone: {}  # the inverse of `read`
    drops: tuple[str, ...] = ()  # published tensors that the original never loads, e.g. Phi-2's lm_head.bias


@dataclass(frozen=True, kw_only=True, slots=True)
class Backbone:
    """One language model. Units: sizes in elements, angles as in the RoPE paper."""

    name: str  # "phi-2"
    source: str  # URL of the published config
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    normalization: str = "RMSNorm"  # or "LayerNorm" (weight and bias)
    layernorm_epsilon: float = 1e-5
    activation: str = "silu"  # "silu", "gelu_tanh", "gelu"
    gated_linear_unit: bool = True
    add_bias_linear: bool = False  # biases of the attention output and the MLP
    add_qkv_bias: bool = False
    qk_layernorm: bool = False  # RMSNorm over each head of q and k (Qwen3)
    qk_layernorm_spans_heads: bool = False  # over all heads of q, and of k, together (OLMoE)
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0  # share of a head's channels that is rotated
    rope_scaling: RopeScaling | None = None
    yarn: YarnScaling | None = None
    multi_latent_attention: LatentAttention | None = None
    share_embeddings_and_output_weights: bool = False
    sliding_window: int | None = None  # full attention is exact for samples up to this length; longer ones are an error
    # Quirks that Megatron-Core lacks; read in model/layers.py only.
    parallel_residual: bool = False  # Phi: x + attention(norm(x)) + mlp(norm(x)), one norm
    output_layer_bias: bool = False
    embedding_multiplier: float = 1.0  # MiniCPM's scale_emb; the original skips it when images are present
    residual_multiplier: float = 1.0  # MiniCPM's scale_depth / sqrt(num_layers), on each residual branch
    logits_divisor: float = 1.0  # MiniCPM's hidden_size / dim_model_base
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0  # on each residual branch, not on the embeddings
    moe: MoEConfig | None = None  # the experts that its own weights have, which a run takes over; None: it is dense
    template: str  # conversation version used when the run names none
    hf: HuggingFace
    mapping: tuple[Mapping, ...]

    @property
    def context_length(self) -> int:
        """Tokens of the longest sample it can take: its positions, and no more than a sliding window sees."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @property
    def rotary_channels(self) -> int:
        """Channels of a head of which `rotary_percent` are rotated."""
        latent = self.multi_latent_attention
        return latent.qk_pos_emb_head_dim if latent else self.kv_channels

    @property
    def value_channels(self) -> int:
        """Channels of a head of the values."""
        return self.multi_latent_attention.v_head_dim if self.multi_latent_attention else self.kv_channels

    @property
    def heads(self) -> Heads:
        """What the mapping of a fused QKV tensor needs to know."""
        return Heads(
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
        )
