"""The key-value part of GGUF files: sizes of the language model and of the tower, and the vocabulary, as llama.cpp reads them.

Key names are the `gguf` package's; what llama.cpp makes of them was read in its `llama-model.cpp` and `clip.cpp`.
"""

from pathlib import Path

from megatron_moellava.backbones import Backbone
from megatron_moellava.config import ConfigError
from megatron_moellava.conversion.served_tokenizer import ServedTokenizer
from megatron_moellava.costs.shapes import Model
from megatron_moellava.data.llama_tokenizer import LlamaTokenizer
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.towers import Tower

# How llama.cpp splits texts before merging bytes: its name of the family's pattern.
SPLITS = {
    "phi": "phi-2",
    "qwen": "qwen2",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "stablelm": "stablelm2",
    "llama": "llama-bpe",
}
FEATURE_LAYER = "clip.vision.feature_layer"  # the `gguf` package has no name for it
NEVER = -1e9  # score of a piece that no merge makes
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}


def describe_text(writer, model: Model, expert_width: int, kind: str) -> None:
    """Sizes of the language model. `expert_width`: of one expert; `kind`: of most tensors."""
    import gguf

    backbone = model.backbone
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(backbone.name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_vocab_size(backbone.vocab_size)
    writer.add_context_length(backbone.max_position_embeddings)
    writer.add_embedding_length(backbone.hidden_size)
    writer.add_block_count(backbone.num_layers)
    writer.add_feed_forward_length(expert_width or backbone.ffn_hidden_size)
    writer.add_head_count(backbone.num_attention_heads)
    writer.add_head_count_kv(backbone.num_query_groups)
    writer.add_key_length(backbone.kv_channels)
    writer.add_value_length(backbone.kv_channels)
    writer.add_rope_freq_base(backbone.rotary_base)
    writer.add_rope_dimension_count(int(backbone.kv_channels * backbone.rotary_percent))
    rms = backbone.normalization == "RMSNorm"
    (writer.add_layer_norm_rms_eps if rms else writer.add_layer_norm_eps)(backbone.layernorm_epsilon)
    if backbone.hf.family == "stablelm":
        writer.add_parallel_residual(backbone.parallel_residual)
    if model.moe:
        writer.add_expert_count(model.moe.num_moe_experts)
        writer.add_expert_used_count(model.moe.moe_router_topk)
        writer.add_expert_feed_forward_length(expert_width)


def describe_tower(writer, tower: Tower, hidden_size: int, kind: str) -> None:
    """Sizes and pixels of the tower, for LLaVA's projector. `hidden_size`: of the language model."""
    import gguf

    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(tower.name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(hidden_size)
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.ffn_hidden_size)
    writer.add_vision_block_count(tower.num_used_layers)
    # Else llama.cpp stops one layer before the file's last: LLaVA's rule for a tower that is there as a whole.
    writer.add_array(FEATURE_LAYER, [tower.num_used_layers])
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layernorm_epsilon)
    writer.add_vision_image_mean(list(tower.image_mean))
    writer.add_vision_image_std(list(tower.image_std))
    writer.add_vision_use_gelu(tower.activation != "quick_gelu")


def describe_vocabulary(writer, served: ServedTokenizer, folder: Path, backbone: Backbone, template: str) -> None:
    """Every id with its text and kind, how texts become ids, and the chat template.

    ConfigError for a vocabulary that is no list of merges.
    """
    loaded, content = load_tokenizer(folder), served.files["tokenizer.json"]
    assert isinstance(content, dict)
    model = content["model"]
    if model["type"] != "BPE":
        raise ConfigError(f"--layout gguf: a {model['type']} vocabulary has no merges; export --layout transformers")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    is_llama = isinstance(loaded, LlamaTokenizer)
    tokens, kinds = _tokens(content, backbone.vocab_size, is_llama)
    writer.add_tokenizer_model("llama" if is_llama else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if is_llama:
        writer.add_token_scores(_scores(tokens, pairs))
        writer.add_add_space_prefix(loaded.legacy)  # type: ignore[attr-defined]  # `is_llama`: a LlamaTokenizer
    else:
        writer.add_tokenizer_pre(SPLITS[backbone.hf.family])
        writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_add_bos_token(loaded.bos_id is not None)
    if loaded.bos_id is not None:
        writer.add_bos_token_id(loaded.bos_id)
    writer.add_eos_token_id(loaded.eos_id)
    if loaded.pad_id < len(tokens):
        writer.add_pad_token_id(loaded.pad_id)
    writer.add_chat_template(template)


def _tokens(content: dict, rows: int, is_llama: bool) -> tuple[list[str], list[int]]:
    """(text, kind) of each row of the vocabulary; those that the tokenizer lacks are unused."""
    import gguf

    kind = gguf.TokenType
    tokens, kinds = [f"[PAD{index}]" for index in range(rows)], [kind.UNUSED] * rows
    for text, index in content["model"]["vocab"].items():
        tokens[index], kinds[index] = text, kind.NORMAL
        if is_llama and len(text) == 6 and text.startswith("<0x"):
            kinds[index] = kind.BYTE
    for token in content["added_tokens"]:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = kind.CONTROL if token["special"] else kind.USER_DEFINED
    if content["model"].get("unk_token"):
        kinds[tokens.index(content["model"]["unk_token"])] = kind.UNKNOWN
    return tokens, [int(value) for value in kinds]


def _scores(tokens: list[str], pairs: list[list[str]]) -> list[float]:
    """SentencePiece's order of merges; pieces that nothing makes are characters, found as they are."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    return [-float(ranks[text]) if text in ranks else NEVER for text in tokens]
