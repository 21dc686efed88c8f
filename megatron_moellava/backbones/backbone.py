"""`Backbone`: one language model as data. Field names are Megatron-Core's; a family file fills them and nothing else.

`HuggingFace` says, also as data, how the same model is spelt in a `config.json`: which key holds which field, and
which keys must have which value because this program (or Megatron-Core) supports no other. It is read for import and
written for export (`from_config.py`).
"""

from collections.abc import Callable
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field

from megatron_moellava.mapping import Heads, Mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Llama-3.1's frequency scaling (transformers `modeling_rope_utils`, type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Original:
    """How MoE-LLaVA's own checkpoints call this family."""

    model_type: str  # dense, e.g. "llava_phi"
    moe_model_type: str  # e.g. "moe_llava_phi"
    architecture: str  # e.g. "LlavaPhiForCausalLM"
    moe_architecture: str  # e.g. "MoELLaVAPhiForCausalLM"
    train_modules: tuple[str, ...]  # the recipe's --train_modules, recorded in config.moe


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
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0  # share of a head's channels that is rotated
    rope_scaling: RopeScaling | None = None
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
    template: str  # conversation version used when the run names none
    hf: HuggingFace
    mapping: tuple[Mapping, ...]

    @property
    def context_length(self) -> int:
        """Tokens of the longest sample it can take: its positions, and no more than a sliding window sees."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @property
    def heads(self) -> Heads:
        """What the mapping of a fused QKV tensor needs to know."""
        return Heads(
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
        )
