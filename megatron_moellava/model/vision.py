"""Where an image becomes tokens: the vision tower (CLIP, SigLIP) and the projector.

Shapes: N images, C channels, H and W pixels, P patches, R rows of the tower's sequence (patches and class token),
V visual tokens, D width of the tower, L width of the language model.
"""

import torch

from megatron_moellava.model.layers import mlp_submodules, modules, tower_spec
from megatron_moellava.towers import Tower

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig


class VisionTower(MegatronModule):
    """The layers of a published vision transformer up to its feature layer; no norm after them."""

    def __init__(self, config: TransformerConfig, tower: Tower, pg_collection=None, adapted: bool = False):
        super().__init__(config=config)
        self.tower = tower
        dtype = config.params_dtype
        self.conv1 = torch.nn.Conv2d(
            3, tower.hidden_size, tower.patch_size, stride=tower.patch_size, bias=tower.patch_bias, dtype=dtype
        )
        self.position_embeddings = torch.nn.Embedding(tower.num_positions, tower.hidden_size, dtype=dtype)
        torch.nn.init.normal_(self.position_embeddings.weight, std=config.init_method_std)
        if tower.class_token:
            self.class_token = torch.nn.Parameter(
                torch.randn(1, 1, tower.hidden_size, dtype=dtype) * config.init_method_std
            )
        if tower.pre_layernorm:
            self.ln_pre = modules().layer_norm()(
                config=config, hidden_size=tower.hidden_size, eps=tower.layernorm_epsilon
            )
        self.decoder = TransformerBlock(
            config, tower_spec(config, adapted), post_process=False, post_layer_norm=False, pg_collection=pg_collection
        )

    def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """Visual features [N, V, D] of preprocessed images: hidden_states[feature_layer], less the first row if so set."""
        hidden_NRD = self.embed(pixels_NCHW)
        hidden_RND = hidden_NRD.transpose(0, 1).contiguous()
        if self.config.recompute_granularity is not None and torch.is_grad_enabled():
            hidden_RND.requires_grad_()  # where only adapters are trained, see MoELlava._needs_differentiable_input
        hidden_RND = self.decoder(hidden_RND, attention_mask=None)
        return hidden_RND.transpose(0, 1)[:, int(self.tower.drop_first_feature) :]

    def embed(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """Rows [N, R, D] before the first layer: patches, class token in front, positions, optional norm."""
        patches_NPD = self.conv1(pixels_NCHW.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        if self.tower.class_token:
            patches_NPD = torch.cat([self.class_token.expand(len(patches_NPD), -1, -1), patches_NPD], dim=1)
        rows_NRD = patches_NPD + self.position_embeddings.weight
        return self.ln_pre(rows_NRD) if self.tower.pre_layernorm else rows_NRD


class Projector(MLP):
    """Linear, exact GELU, Linear: visual features -> word embeddings (LLaVA-1.5's `mlp2x_gelu`)."""

    def __init__(self, config: TransformerConfig, tower_width: int):
        super().__init__(config, mlp_submodules(), input_size=tower_width, ffn_hidden_size=config.ffn_hidden_size)

    def forward(self, features_NVD: torch.Tensor) -> torch.Tensor:
        """[N, V, D] -> [N, V, L]."""
        output_NVL, bias_L = super().forward(features_NVD)
        return output_NVL + bias_L
