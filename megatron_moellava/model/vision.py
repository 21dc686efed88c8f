"""Where an image becomes tokens: the vision tower (CLIP, SigLIP, SigLIP 2 NaFlex) and the projector.

A tower of fixed resolution gets N images and is one batch of sequences of one length. A tower at native resolution gets the
patches of all images as one packed row, which attends image by image; each image has a grid of patches of its own.

Shapes: N images (at native resolution patches), C channels, H and W pixels, P patches, R rows of the tower's sequence (patches
and class token), V visual tokens, D width of the tower, L width of the language model.
"""

import math
from itertools import accumulate

import torch
import torch.nn.functional as F

from megatron_moellava import platform
from megatron_moellava.config import MoEConfig
from megatron_moellava.model.attention import packed_seq_params
from megatron_moellava.model.layers import mlp_submodules, modules, tower_spec
from megatron_moellava.towers import Tower

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

Grids = tuple[tuple[int, ...], ...]  # `Plan.grid` of each image; empty: the tower has none


class VisionTower(MegatronModule):
    """The layers of a published vision transformer up to its feature layer; a norm after them only if features have it."""

    def __init__(
        self,
        config: TransformerConfig,
        tower: Tower,
        pg_collection=None,
        adapted: bool = False,
        moe: MoEConfig | None = None,
    ):
        super().__init__(config=config)
        self.tower = tower
        dtype = config.params_dtype
        if tower.native:
            self.embedder = torch.nn.Linear(3 * tower.patch_size**2, tower.hidden_size, tower.patch_bias, dtype=dtype)
        else:
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
            self.ln_pre = self._norm()
        self.decoder = TransformerBlock(
            config,
            tower_spec(config, adapted, moe, tower.num_frames),
            post_process=False,
            post_layer_norm=False,
            pg_collection=pg_collection,
        )
        if tower.post_layernorm:
            self.ln_post = self._norm()

    def _norm(self):
        return modules().layer_norm()(
            config=self.config, hidden_size=self.tower.hidden_size, eps=self.tower.layernorm_epsilon
        )

    def forward(self, pixels_NCHW: torch.Tensor, grids: Grids = (), real: int | None = None) -> torch.Tensor:
        """Visual features [N, V, D] of preprocessed images: hidden_states[feature_layer], less the first row if so set.

        At native resolution [N, D], one for each patch. Of a tower that `takes_videos` the images are whole videos, frame by
        frame; ValueError where they cannot be. `real`: how many images are some; those after them only fill up, and
        routers leave them out (at native resolution: all, or 0). None: all.
        """
        packed = None
        if self.tower.native:
            lengths = [rows * columns for rows, columns in grids]
            cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            packed = packed_seq_params(cu_seqlens, max(lengths), lengths=lengths)
            hidden_RND = self.embed_patches(pixels_NCHW, grids).unsqueeze(1)
        else:
            if len(pixels_NCHW) % self.tower.num_frames:
                raise ValueError(f"{len(pixels_NCHW)} images are no videos of {self.tower.num_frames} frames")
            hidden_RND = self.embed(pixels_NCHW).transpose(0, 1).contiguous()
        if self.config.recompute_granularity is not None and torch.is_grad_enabled():
            hidden_RND.requires_grad_()  # where only adapters are trained, see MoELlava._needs_differentiable_input
        padding_NR = None
        if real is not None and self.config.num_moe_experts is not None:
            rows, images, _ = hidden_RND.shape
            padding_NR = filled_up(rows, images, real)
        hidden_RND = self.decoder(hidden_RND, attention_mask=None, packed_seq_params=packed, padding_mask=padding_NR)
        if self.tower.post_layernorm:
            hidden_RND = self.ln_post(hidden_RND)
        if self.tower.native:
            return hidden_RND.squeeze(1)
        return hidden_RND.transpose(0, 1)[:, int(self.tower.drop_first_feature) :]

    def embed(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """Rows [N, R, D] before the first layer: patches, class token in front, positions, optional norm."""
        patches_NPD = self.conv1(pixels_NCHW.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        if self.tower.class_token:
            patches_NPD = torch.cat([self.class_token.expand(len(patches_NPD), -1, -1), patches_NPD], dim=1)
        rows_NRD = patches_NPD + self.position_embeddings.weight
        return self.ln_pre(rows_NRD) if self.tower.pre_layernorm else rows_NRD

    def embed_patches(self, patches_NCHW: torch.Tensor, grids: Grids) -> torch.Tensor:
        """Rows [N, D] before the first layer: each patch flattened (pixel by pixel, colours innermost) and embedded, and its
        position."""
        flat_NI = patches_NCHW.permute(0, 2, 3, 1).flatten(1).to(self.embedder.weight.dtype)
        resized = {grid: self._positions(grid) for grid in dict.fromkeys(grids)}
        return self.embedder(flat_NI) + torch.cat([resized[grid] for grid in grids])

    def _positions(self, grid: tuple[int, ...]) -> torch.Tensor:
        """The square table of positions resized to a grid, [rows * columns, D]; in fp32, as transformers does it."""
        side, weight = self.tower.position_side, self.position_embeddings.weight
        table_1DHW = weight.float().view(1, side, side, -1).permute(0, 3, 1, 2)
        resized_1DHW = F.interpolate(table_1DHW, size=grid, mode="bilinear", align_corners=False, antialias=True)
        return resized_1DHW.flatten(2)[0].T.to(weight.dtype)


def filled_up(rows: int, images: int, real: int) -> torch.Tensor:
    """bool [images, rows]: True in the images that are none, those after the first `real`."""
    return (torch.arange(images, device=platform.device()) >= real).unsqueeze(1).expand(images, rows)


def merged(features: torch.Tensor, grids: Grids, tower: Tower) -> torch.Tensor:
    """Features as the projector takes them: those of `tower.shuffle` x `tower.shuffle` neighbouring patches behind each other,
    row by row. [N, V, D] -> [N, V / 4, 4 D], at native resolution [V, D] -> [V / 4, 4 D]; as they are without a shuffle.

    A grid of 2 x 4 patches 0 .. 7 -> [[0, 1, 4, 5], [2, 3, 6, 7]].
    """
    side = tower.shuffle
    if side == 1:
        return features
    if not tower.native:
        width = tower.position_side
        blocks = features.unflatten(1, (width // side, side, width // side, side)).transpose(2, 3)
        return blocks.flatten(3, 5).flatten(1, 2)
    images = features.split([rows * columns for rows, columns in grids])
    return torch.cat(
        [
            image_VD.unflatten(0, (rows // side, side, columns // side, side))
            .transpose(1, 2)
            .flatten(2, 4)
            .flatten(0, 1)
            for image_VD, (rows, columns) in zip(images, grids, strict=True)
        ]
    )


class ImageNewline(torch.nn.Module):
    """The learned row [L] that ends each line of a picture's features."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width, dtype=dtype) / math.sqrt(width))


def lines_of(features_NVL: torch.Tensor, grids: Grids, newline_L: torch.Tensor) -> torch.Tensor:
    """LLaVA-NeXT's merge of tiles: of each image the overview's tokens, then all lines of the picture, each ended by the
    newline. [N, V, L] of N tiles -> [tokens of all images, L].

    `grids`: tiles down and across, the lines and columns of features that show something, and those that they are reduced
    to, if they are; 0 tiles: the overview alone, ended by one newline.
    """
    side = math.isqrt(features_NVL.shape[1])
    parts, start = [], 0
    for down, across, rows, columns, *reduced in grids:
        parts.append(features_NVL[start])
        tiles = features_NVL[start + 1 : start + 1 + down * across]
        start += 1 + down * across
        if not down:
            parts.append(newline_L[None])
            continue
        whole = (
            tiles.unflatten(1, (side, side)).unflatten(0, (down, across)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        )
        top, left = (down * side - rows) // 2, (across * side - columns) // 2
        shown_RCL = whole[top : top + rows, left : left + columns]
        if reduced:
            shown_1LRC = F.interpolate(shown_RCL.permute(2, 0, 1)[None], size=reduced, mode="bilinear")
            shown_RCL = shown_1LRC[0].permute(1, 2, 0)
        parts.append(torch.cat([shown_RCL, newline_L.expand(len(shown_RCL), 1, -1)], dim=1).flatten(0, 1))
    return torch.cat(parts)


class ModalityBranch(MegatronModule):
    """What one modality has of its own; what is None is the model's."""

    def __init__(self, config: TransformerConfig, tower: VisionTower | None, projector: "Projector | None"):
        super().__init__(config=config)
        self.tower, self.projector = tower, projector


class Projector(MLP):
    """Linear, exact GELU, Linear: visual features -> word embeddings (LLaVA-1.5's `mlp2x_gelu`)."""

    def __init__(self, config: TransformerConfig, tower: Tower):
        size = tower.projector_input_size
        super().__init__(config, mlp_submodules(), input_size=size, ffn_hidden_size=config.ffn_hidden_size)
        if tower.newline:
            self.image_newline = ImageNewline(config.hidden_size, config.params_dtype)

    def forward(self, features_NVD: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """[N, V, D] -> [N, V, L], or [V, D] -> [V, L]. `padding`: what a router would leave out."""
        output_NVL, bias_L = super().forward(features_NVD)
        return output_NVL + bias_L
