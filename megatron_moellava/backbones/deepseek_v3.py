"""DeepSeek-V3 and Moonlight: DeepSeek-V2's attention, and experts chosen by sigmoid scores plus a bias that is learned
without a gradient, among the best groups of experts; their weights sum to a scaling factor.

The published DeepSeek-V3 also has a layer behind the last that predicts a second token ahead (MTP): imports leave it out, as
transformers does. Its weights are published in blocks of FP8, which are not read: convert them to bf16 first.
"""

from dataclasses import replace

from megatron_moellava.backbones import deepseek_v2, dots1, llama
from megatron_moellava.backbones.backbone import HuggingFace, LatentAttention, Original, YarnScaling

HF = HuggingFace(
    family="deepseek_v3",
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    original=Original(name="deepseek_v3", stem="DeepseekV3"),
    fields=deepseek_v2.MLA_FIELDS,
    defaults=llama.DEFAULTS,
    constants=deepseek_v2.MLA_CONSTANTS
    | {"rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    # Of losses that neither transformers nor the published code adds: the biases balance. Of layers that predict ahead.
    inert=(
        *deepseek_v2.MLA_INERT,
        "aux_loss_alpha",
        "seq_aux",
        "output_router_logits",
        "num_nextn_predict_layers",
        "num_mtp_layers",
    ),
    read=deepseek_v2.mla_read,
    write=deepseek_v2.mla_write,
    experts=replace(
        dots1.EXPERTS,
        defaults={"moe_intermediate_size": 2048, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4},
        norm_topk_prob=True,
    ),
)

DEEPSEEK_V3_EXPERTS = replace(
    dots1.DOTS1_TINY_EXPERTS,
    num_moe_experts=256,
    moe_router_topk=8,
    placement=tuple(range(3, 61)),
    moe_ffn_hidden_size=2048,
    moe_router_num_groups=8,
    moe_router_group_topk=4,
    moe_shared_expert_intermediate_size=2048,
)
DEEPSEEK_V3 = replace(
    deepseek_v2.DEEPSEEK_V2_LITE,
    name="deepseek-v3",
    source="https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json",
    num_layers=61,
    hidden_size=7168,
    ffn_hidden_size=18432,
    num_attention_heads=128,
    num_query_groups=128,
    vocab_size=129280,
    multi_latent_attention=replace(deepseek_v2.DEEPSEEK_V2_LITE_MLA, q_lora_rank=1536),
    yarn=YarnScaling(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0),
    moe=DEEPSEEK_V3_EXPERTS,
    hf=HF,
)
MOONLIGHT_16B_A3B = replace(
    deepseek_v2.DEEPSEEK_V2_LITE,
    name="moonlight-16b-a3b",
    source="https://huggingface.co/moonshotai/Moonlight-16B-A3B/blob/main/config.json",
    ffn_hidden_size=11264,
    vocab_size=163840,
    max_position_embeddings=8192,
    layernorm_epsilon=1e-5,
    rotary_base=50000.0,
    yarn=None,
    moe=replace(
        DEEPSEEK_V3_EXPERTS,
        num_moe_experts=64,
        moe_router_topk=6,
        placement=tuple(range(1, 27)),
        moe_ffn_hidden_size=1408,
        moe_router_topk_scaling_factor=2.446,
        moe_router_num_groups=None,
        moe_router_group_topk=None,
        moe_shared_expert_intermediate_size=2816,
    ),
    hf=HF,
)
DEEPSEEK_V3_TINY = replace(
    deepseek_v2.DEEPSEEK_V2_TINY,
    name="deepseek-v3-tiny",
    layernorm_epsilon=1e-5,
    multi_latent_attention=LatentAttention(
        q_lora_rank=64, kv_lora_rank=48, qk_head_dim=24, qk_pos_emb_head_dim=8, v_head_dim=32
    ),
    yarn=YarnScaling(factor=4.0, original_max_position_embeddings=512, mscale=1.0, mscale_all_dim=0.5),
    moe=dots1.DOTS1_TINY_EXPERTS,
    hf=HF,
)
SIZES = (DEEPSEEK_V3, MOONLIGHT_16B_A3B, DEEPSEEK_V3_TINY)
