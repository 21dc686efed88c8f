"""The model: images -> tower -> projector -> rows of the word embeddings -> decoder -> loss of every token.

One instance is one pipeline stage. The first stage holds tower, projector and embeddings, the last the output layer.
Megatron's [S, B, D] order begins after the embedding and ends at the logits. Shapes: B rows, S positions, D width,
V vocabulary, N images, F visual tokens per image.
"""

import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import torch

import megatron_moellava.platform as platform
from megatron_moellava.backbones import Backbone, YarnScaling
from megatron_moellava.config import Component, RunConfig
from megatron_moellava.costs.shapes import Model, model_of_run
from megatron_moellava.data.encode import IGNORE_INDEX, IMAGE_TOKEN
from megatron_moellava.data.pooling import Pools
from megatron_moellava.model.attention import packed_seq_params
from megatron_moellava.model.configuration import (
    moe_projector_config,
    projector_config,
    tower_config,
    transformer_config,
)
from megatron_moellava.model.context_parallel import encode_share, encode_share_of_grids, sequence_share, share
from megatron_moellava.model.kv_cache import KVCache
from megatron_moellava.model.layers import decoder_spec
from megatron_moellava.model.lora import attach
from megatron_moellava.model.modality_router import marks_of
from megatron_moellava.model.moe_projector import MoEProjector
from megatron_moellava.model.pooling import pooled
from megatron_moellava.model.vision import (
    Grids,
    ModalityBranch,
    Projector,
    VisionTower,
    filled_up,
    lines_of,
    merged,
)
from megatron_moellava.routers import ROUTERS, knows_modality
from megatron_moellava.towers import Tower
from megatron_moellava.towers.branches import PREFIX, Branch, branches_of_data

from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

NO_PICTURES: Mapping[str, torch.Tensor] = MappingProxyType({})


class MoELlava(MegatronModule):
    """A pipeline stage of the vision-language model, dense or MoE by `run.moe`."""

    def __init__(
        self,
        run: RunConfig,
        backbone: Backbone,
        tower: Tower,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ):
        config = transformer_config(backbone, run)
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder  # Megatron-Core's schedules ask for it
        self.run, self.backbone, self.tower = run, backbone, tower
        self.branches = branches_of_data(run.data)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.language_model = LanguageModel(run, backbone, config, pre_process, post_process, vp_stage)
        self.share_embeddings_and_output_weights = backbone.share_embeddings_and_output_weights
        if pre_process:
            adapted, mixtures = run.training.lora is not None, run.mixtures
            self.vision_tower = VisionTower(tower_config(tower, run), tower, adapted=adapted, moe=mixtures.get("tower"))
            self.projector: Projector | MoEProjector = (
                MoEProjector(moe_projector_config(backbone, tower, run), tower, mixtures["projector"])
                if "projector" in mixtures
                else Projector(projector_config(backbone, run), tower)
            )
            for branch in self.branches:
                self.add_module(branch.prefix.rstrip("."), self._branch(branch))
        self.adapters = attach(self, run)

    def _branch(self, branch: Branch) -> ModalityBranch:
        run, sizes, config = self.run, branch.seen_by(self.tower), projector_config(self.backbone, self.run)
        tower = None
        if branch.tower:
            tower = VisionTower(tower_config(sizes, run), sizes, adapted=run.training.lora is not None)
        return ModalityBranch(config, tower, Projector(config, sizes) if branch.own_projector else None)

    def sizes(self) -> Model:
        """Of the whole model, all pipeline stages together."""
        return model_of_run(self.run, self.backbone, self.tower)

    def set_input_tensor(self, input_tensor) -> None:
        """Megatron-Core's schedules hand over the hidden states of the stage before."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self):
        """Megatron-Core keeps the two copies of a tied embedding equal through this."""
        return self.language_model.shared_embedding_or_output_weight()

    def encode_images(self, pixels_NCHW: torch.Tensor, grids: Grids = (), modality: str = "") -> torch.Tensor:
        """Projected visual tokens [N, F, D]. The tower runs without a graph unless it is trained.

        `grids`: how each image's tokens lie, of towers that `has_grids`; the result then is [V, D], the visual tokens of all
        images, one after the other. At native resolution N are patches. `modality`: that the images are of, if it is apart.
        """
        return self._laid_out(self._encode(pixels_NCHW, grids, modality), grids, modality)

    def _encode(
        self, pixels_NCHW: torch.Tensor, grids: Grids = (), modality: str = "", real: int | None = None
    ) -> torch.Tensor:
        tower, projector = self._way(modality)
        with torch.set_grad_enabled(self._trains(tower) and torch.is_grad_enabled()):
            features = tower(pixels_NCHW, grids, real)
        rows = merged(features, grids, tower.tower)
        return projector(rows, None if real is None else _filled_up(rows, real, tower.tower))

    def _way(self, modality: str) -> tuple[VisionTower, Projector | MoEProjector]:
        """Of the pictures of a modality; "": of all that have nothing of their own."""
        own = getattr(self, f"{PREFIX}{modality}") if modality else None
        return (own and own.tower) or self.vision_tower, (own and own.projector) or self.projector

    def _laid_out(self, features: torch.Tensor, grids: Grids, modality: str = "") -> torch.Tensor:
        tower, projector = self._way(modality)
        return lines_of(features, grids, projector.image_newline.weight) if tower.tower.newline else features

    def embed(
        self,
        tokens_BS: torch.Tensor,
        pixels_NCHW: torch.Tensor | None,
        features_NFD: torch.Tensor | None = None,
        has_images: bool = False,
        image_rows: int | None = None,
        grids: Grids = (),
        pools: Pools = (),
        shows_R: torch.Tensor | None = None,
        apart: Mapping[str, torch.Tensor] = NO_PICTURES,
    ) -> torch.Tensor:
        """Word embeddings [S, B, D]; the rows of IMAGE_TOKEN are overwritten by the visual tokens, in batch order.

        Under context parallelism S are the positions of this rank, and each rank encodes its part of the images.

        tokens [[5, -200, -200, 7]] with one image of two visual tokens -> [word 5, visual 0, visual 1, word 7].
        `features_NFD`: the result of `encode_images`, instead of pixels. `grids`: what that needs of towers that `has_grids`.
        `pools`: frames of videos whose visual tokens are averaged (`model/pooling.py`).
        `has_images`: the tokens continue a text with images (only MiniCPM's embeddings depend on it). `image_rows`: how
        many rows are placeholders, where the host knows (`Batch.counts`); None: counted here, which waits for the device.
        `shows_R`: which visual token each placeholder is, where several show the same picture, which is encoded once, and
        where pictures are `apart`: those of modalities with a tower or a projector of their own, whose visual tokens follow
        those of `pixels_NCHW`, one modality after the other.
        Raises ValueError when the number of placeholder rows differs from the number of visual tokens.
        """
        is_image_BS = tokens_BS == IMAGE_TOKEN
        words_BS = share(tokens_BS.masked_fill(is_image_BS, 0))
        words_SBD = self.language_model.embedding(words_BS, position_ids=None)
        encoded = {name: pixels for name, pixels in apart.items() if len(pixels)}
        if features_NFD is None and pixels_NCHW is not None and len(pixels_NCHW) > 0:
            features_NFD = self._encode_together(pixels_NCHW, grids)
        words_SBD = self._scale_words(words_SBD, has_images or features_NFD is not None or bool(encoded))
        if torch.is_grad_enabled():
            present = {*encoded, *([] if features_NFD is None else [""])}
            for way in ("", *(branch.modality for branch in self.branches)):
                words_SBD = words_SBD if way in present else words_SBD + self._untouched(way)
        if features_NFD is None and not encoded:
            return words_SBD
        parts = [] if features_NFD is None else [pooled(features_NFD, pools)]
        parts += [self._encode_together(pixels, (), name).flatten(0, 1) for name, pixels in encoded.items()]
        features_RD = (torch.cat(parts) if len(parts) > 1 else parts[0]).to(words_SBD.dtype)
        features_RD = features_RD if shows_R is None else features_RD[shows_R]
        rows = int(is_image_BS.sum()) if image_rows is None else image_rows
        if features_RD.shape[0] != rows:
            images = sum(map(len, encoded.values())) + (0 if features_NFD is None else len(grids or features_NFD))
            raise ValueError(f"{rows} placeholder rows for {features_RD.shape[0]} visual tokens of {images} images")
        if self.config.context_parallel_size > 1:
            order_BS = is_image_BS.flatten().cumsum(0).view_as(is_image_BS) - 1  # which visual token each image row is
            is_image_BS, order_BS = share(is_image_BS), share(order_BS)
            features_RD = features_RD[order_BS[is_image_BS]]
        words_BSD = words_SBD.transpose(0, 1)
        return words_BSD.masked_scatter(is_image_BS.unsqueeze(-1), features_RD).transpose(0, 1).contiguous()

    def _encode_together(self, pixels_NCHW: torch.Tensor, grids: Grids, modality: str = "") -> torch.Tensor:
        """`encode_images`; under context parallelism each rank does its part of the images."""
        tower, encode = self._way(modality)[0].tower, partial(self._encode, modality=modality)
        if tower.native:
            return encode_share_of_grids(encode, pixels_NCHW, grids, tower)
        return self._laid_out(encode_share(encode, pixels_NCHW, tower.num_frames), grids, modality)

    def _scale_words(self, words_SBD: torch.Tensor, has_images: bool) -> torch.Tensor:
        multiplier = self.backbone.embedding_multiplier
        if multiplier == 1.0 or (has_images and not self.run.model.scale_multimodal_embeddings):
            return words_SBD
        return words_SBD * multiplier

    def _untouched(self, modality: str = "") -> torch.Tensor:
        """Zero, with what is trained in its graph: a micro-batch without images of a way (`_way`) must not leave a rank waiting
        for gradients, nor for tokens of experts that ranks share. To routers it is padding."""
        module, projector = self._way(modality)
        tower, like = module.tower, torch.zeros((), dtype=self.config.params_dtype, device=platform.device())
        newline = projector.image_newline.weight.sum() * 0.0 if tower.newline else 0.0
        if self._trains(module) or self.shares_experts_of("tower"):
            side = tower.shuffle  # at native resolution: the smallest picture
            count, grids = (side**2, ((side, side),)) if tower.native else (tower.num_frames, ())
            pixels_NCHW = like.new_zeros(count, *tower.pixel_shape)
            return self._encode(pixels_NCHW, grids, modality, real=0).sum() * 0.0 + newline
        padding_11 = torch.ones(1, 1, dtype=torch.bool, device=like.device)
        features_11D = like.new_zeros(1, 1, tower.projector_input_size)
        return projector(features_11D, padding_11).sum() * 0.0 + newline

    @torch.no_grad()
    def meet_at_experts(self) -> None:
        """Go through tower and projector without a picture, as other ranks of shared experts do with theirs. Collective."""
        self._untouched()

    def shares_experts_of(self, *components: Component) -> bool:
        """Whether ranks that may have different images meet at the experts of one of these parts."""
        is_divided = parallel_state.get_expert_model_parallel_world_size() > 1
        return is_divided and any(component in self.run.mixtures for component in components)

    def _trains(self, tower: VisionTower) -> bool:
        adapted = self.adapters is not None and self.adapters.has_role("tower")
        return adapted or any(parameter.requires_grad for parameter in tower.parameters())

    def forward(
        self,
        tokens_BS: torch.Tensor,
        position_ids_BS: torch.Tensor,
        labels_BS: torch.Tensor | None = None,
        padding_mask_BS: torch.Tensor | None = None,
        pixels_NCHW: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        embeddings_SBD: torch.Tensor | None = None,
        inference_context=None,
        attention_mask: torch.Tensor | None = None,
        image_rows: int | None = None,
        grids: Grids = (),
        pools: Pools = (),
        shows_R: torch.Tensor | None = None,
        apart: Mapping[str, torch.Tensor] = NO_PICTURES,
        gather_logits: bool = True,
        is_image_BS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Losses [B, S] (fp32, zero where the label is IGNORE_INDEX), or logits [B, S, V] without labels: of the whole
        vocabulary, or without `gather_logits` of this tensor-parallel rank's part, with -inf where it is filled up.

        A stage that is not the last returns its hidden states. `padding_mask_BS`: True where a token is real. Packed
        rows (B = 1) bring `cu_seqlens` [n + 1] and `max_seqlen`; `embeddings_SBD` replaces tokens and images, and
        `is_image_BS` then says which are of an image, to routers that ask; `image_rows`, `grids`, `pools`, `shows_R` and
        `apart` are `embed`'s. Under context parallelism the arguments are of whole rows, and the result is of the positions of
        this rank.
        """
        counted_BS = padding_mask_BS if self._padding_counts() else None
        if knows_modality(self.run.moe) and is_image_BS is None:
            assert tokens_BS is not None, "embeddings without tokens must come with is_image_BS"
            is_image_BS = tokens_BS == IMAGE_TOKEN
        if self.pre_process and embeddings_SBD is None:
            embeddings_SBD = self.embed(
                tokens_BS, pixels_NCHW, image_rows=image_rows, grids=grids, pools=pools, shows_R=shows_R, apart=apart
            )
            has_none = pixels_NCHW is None or len(pixels_NCHW) == 0
            if has_none and not torch.is_grad_enabled() and self.shares_experts_of("tower", "projector"):
                self.meet_at_experts()  # with a graph `embed` has done so
            if counted_BS is not None:
                embeddings_SBD = embeddings_SBD * counted_BS.transpose(0, 1).unsqueeze(-1)
        if embeddings_SBD is not None and self.config.sequence_parallel:
            embeddings_SBD = scatter_to_sequence_parallel_region(embeddings_SBD)
        if embeddings_SBD is not None and self._needs_differentiable_input():
            embeddings_SBD.requires_grad_()
        if attention_mask is None and counted_BS is not None:
            attention_mask = causal_padding_mask(counted_BS)
        position_ids_BS, labels_BS, padding_mask_BS = share(position_ids_BS), share(labels_BS), share(padding_mask_BS)
        is_shared = self.config.context_parallel_size > 1
        with self.language_model.positions(position_ids_BS if cu_seqlens is not None or is_shared else None):
            output = self.language_model(
                input_ids=None,
                position_ids=None,
                attention_mask=attention_mask,
                decoder_input=embeddings_SBD,
                labels=None if labels_BS is None else labels_BS.clamp(min=0),
                inference_context=inference_context,
                packed_seq_params=packed_seq_params(cu_seqlens, max_seqlen, is_shared),
                padding_mask=self.router_mask(padding_mask_BS, is_image_BS),
                runtime_gather_output=labels_BS is None and gather_logits,
            )
        if labels_BS is None or not self.post_process:
            return output
        return output * (labels_BS != IGNORE_INDEX)

    def _needs_differentiable_input(self) -> bool:
        """A recomputed part of the decoder has a backward pass only where one of its inputs requires a gradient: with tower,
        projector and embeddings frozen none would, and nothing would train (reentrant checkpointing,
        megatron/core/tensor_parallel/random.py; Megatron-Bridge does the same for adapters). The experts' activation stands
        behind a matrix, and needs no such input."""
        return (
            self.config.recompute_granularity is not None
            and self.run.training.recompute != "moe_act"
            and torch.is_grad_enabled()
            and (
                self.adapters is not None
                or any(parameter.requires_grad for parameter in self.language_model.decoder.parameters())
            )
        )

    def _padding_counts(self) -> bool:
        """The states of padding rows matter to a router that counts them: zero embeddings, attending to real rows."""
        moe = self.run.moe
        return moe is not None and ROUTERS[moe.router].counts_padding and not self.run.data.packing

    def router_mask(
        self, padding_mask_BS: torch.Tensor | None, is_image_BS: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What the routers are told of this rank's tokens: [B, S], True = padding, or marks [B, S, 2] (`modality_router.py`).

        `padding_mask_BS`: of the positions of this rank under context parallelism; `is_image_BS`: of whole rows.
        """
        padding_BS = self._router_padding(padding_mask_BS)
        if not knows_modality(self.run.moe):
            return padding_BS
        assert is_image_BS is not None
        return marks_of(padding_BS, self._of_sequence_parallel(share(is_image_BS)))

    def _router_padding(self, padding_mask_BS: torch.Tensor | None) -> torch.Tensor | None:
        """What the router leaves out, [B, S of this rank], True = padding.

        A router that counts padding leaves out columns that only make the length divisible (`OriginalRouter`): for
        sequence parallelism, and for what else `RunConfig.row_multiple` fills rows up.
        """
        if padding_mask_BS is None or self.run.moe is None:
            return None
        padding_BS = ~padding_mask_BS
        if ROUTERS[self.run.moe.router].counts_padding:
            if self.run.row_multiple == 1:
                return None
            padding_BS = padding_BS.all(dim=0, keepdim=True).expand_as(padding_BS)
        return self._of_sequence_parallel(padding_BS)

    def _of_sequence_parallel(self, item_BS: torch.Tensor) -> torch.Tensor:
        """This rank's positions of what every tensor-parallel rank has."""
        return sequence_share(item_BS, dim=1) if self.config.sequence_parallel else item_BS


def _filled_up(rows: torch.Tensor, real: int, tower: Tower) -> torch.Tensor:
    """bool [N, V] (at native resolution [1, V]) of projector rows: True in images that are none."""
    return filled_up(len(rows), 1, real) if tower.native else filled_up(rows.shape[1], len(rows), real)


class LanguageModel(GPTModel):
    """Megatron-Core's GPT with what the backbones need beside it. The one place that chooses the decoder class."""

    def __init__(
        self, run: RunConfig, backbone: Backbone, config, pre_process: bool, post_process: bool, vp_stage: int | None
    ):
        self.backbone = backbone
        split = run.parallel.tensor_model_parallel_size
        super().__init__(
            config=config,
            transformer_layer_spec=decoder_spec(backbone, config, run.moe, vp_stage, run.training.lora is not None),
            vocab_size=-(-backbone.vocab_size // split) * split,
            max_sequence_length=backbone.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=backbone.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_percent=backbone.rotary_percent,
            rotary_base=backbone.rotary_base,
            scatter_embedding_sequence_parallel=False,
            vp_stage=vp_stage,
        )
        self.rotary_pos_emb = PositionedRotary(backbone)
        if post_process:
            self._finish_output_layer(backbone)

    def _finish_output_layer(self, backbone: Backbone) -> None:
        if backbone.output_layer_bias:
            self.output_layer = ColumnParallelLinear(
                self.config.hidden_size,
                self.vocab_size,
                config=self.config,
                init_method=self.config.init_method,
                bias=True,
                gather_output=False,
                skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
            )
        self.output_layer.register_forward_hook(self._mask_vocabulary_padding)

    def _mask_vocabulary_padding(self, layer, inputs, output):
        """Rows that only make the vocabulary divisible must not take part in the softmax."""
        logits, bias = output
        first = (
            0
            if logits.shape[-1] == self.vocab_size
            else parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        )
        valid = self.backbone.vocab_size - first
        if valid < logits.shape[-1]:
            logits = torch.cat([logits[..., :valid], torch.full_like(logits[..., valid:], float("-inf"))], dim=-1)
        return logits, bias

    def _postprocess(self, hidden_states, **arguments):
        cache = arguments["inference_context"]
        if self.post_process and isinstance(cache, KVCache):
            hidden_states = hidden_states[cache.current_step.last_tokens()]
        if self.post_process and self.backbone.logits_divisor != 1.0:
            hidden_states = hidden_states / self.backbone.logits_divisor
        logits_or_losses = super()._postprocess(hidden_states, **arguments)
        if self.post_process and arguments["labels"] is None:
            return logits_or_losses[..., : self.backbone.vocab_size]
        return logits_or_losses

    def positions(self, position_ids_BS: torch.Tensor | None):
        """Within this context the rotary embedding uses these positions (packed rows) instead of 0 .. S - 1."""
        by_engine = platform.HAS_TRANSFORMER_ENGINE and self.config.context_parallel_size == 1
        by_engine = by_engine and self.backbone.multi_latent_attention is None
        return self.rotary_pos_emb.at(None if by_engine else position_ids_BS)


class PositionedRotary(RotaryEmbedding):
    """Rotary embedding whose positions restart in a packed row; Transformer Engine does that from `cu_seqlens`."""

    def __init__(self, backbone: Backbone):
        super().__init__(
            kv_channels=backbone.rotary_channels,
            rotary_percent=backbone.rotary_percent,
            rotary_base=backbone.rotary_base,
        )
        scaling = backbone.rope_scaling
        if scaling is not None:
            self.inv_freq: torch.Tensor = self._apply_scaling(
                self.inv_freq,
                scaling.factor,
                scaling.low_freq_factor,
                scaling.high_freq_factor,
                scaling.original_max_position_embeddings,
            )
        if backbone.yarn is not None:
            self.inv_freq = _between_scales(self.inv_freq, backbone.rotary_base, backbone.yarn)
        self._positions_S: torch.Tensor | None = None

    def at(self, position_ids_BS: torch.Tensor | None) -> "PositionedRotary":
        """Itself, for `with`: rotations are those of the first row of `position_ids_BS`; None: positions 0, 1, ..."""
        self._positions_S = None if position_ids_BS is None else position_ids_BS[0]
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._positions_S = None

    def forward(self, max_seq_len: int, **arguments) -> torch.Tensor:
        """Angles [S, 1, 1, rotated channels]."""
        arguments["packed_seq"] = True  # never cut by Megatron-Core: the positions say what this rank holds
        angles = super().forward(max_seq_len, **arguments)
        return angles if self._positions_S is None else angles[self._positions_S]


def _between_scales(inv_freq: torch.Tensor, base: float, yarn: YarnScaling) -> torch.Tensor:
    """YaRN's frequencies: as they are where channels turn often within the original length, divided where they turn seldom.

    Megatron-Core has the formula in a class that is not built under context parallelism without a GPU.
    """
    channels = 2 * len(inv_freq)

    def place(turns: float) -> float:
        """The pair of channels that turns so often."""
        ratio = yarn.original_max_position_embeddings / (2 * math.pi * turns)
        return channels * math.log(ratio) / (2 * math.log(base))

    low, high = max(math.floor(place(yarn.beta_fast)), 0), min(math.ceil(place(yarn.beta_slow)), channels - 1)
    ramp = (torch.arange(len(inv_freq), device=inv_freq.device) - low) / (high - low or 1e-3)
    divided = ramp.clamp(0, 1)
    return inv_freq / yarn.factor * divided + inv_freq * (1 - divided)


def causal_padding_mask(padding_mask_BS: torch.Tensor) -> torch.Tensor:
    """[B, 1, S, S], True = may not attend: later positions and padding, as the original's attention."""
    length = padding_mask_BS.shape[1]
    later_SS = torch.ones(length, length, dtype=torch.bool, device=padding_mask_BS.device).triu(1)
    return later_SS | ~padding_mask_BS[:, None, None, :]
