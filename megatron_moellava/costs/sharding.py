"""A model and the sizes of the axes that divide it: what the shapes on one rank follow from.

Which layers a pipeline rank holds is `layout.py`'s; nothing here depends on it. A rank's `tokens` are those of one
micro-batch before tensor parallelism splits them.
"""

import math
from dataclasses import dataclass

from megatron_moellava.backbones import Backbone
from megatron_moellava.config import LoraConfig, MoEConfig, RunConfig
from megatron_moellava.costs.shapes import Model, expert_ffn_hidden_size, model_of_run
from megatron_moellava.stages import adapted_roles, trained_roles
from megatron_moellava.towers import POOLINGS, Tower
from megatron_moellava.towers.branches import Branch, branches_of_data


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """`run` for one model. The backbone is an object, so that models without a name can be planned."""

    run: RunConfig
    backbone: Backbone
    tower: Tower

    @property
    def model(self) -> Model:
        """The same as shapes.py lists it."""
        return model_of_run(self.run, self.backbone, self.tower)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Modalities with a tower or a projector of their own."""
        return branches_of_data(self.run.data)

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return self.run.parallel.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        """Pipeline-parallel size."""
        return self.run.parallel.pipeline_model_parallel_size

    @property
    def vp(self) -> int:
        """Virtual pipeline chunks per rank."""
        return self.run.parallel.virtual_pipeline_model_parallel_size or 1

    @property
    def ep(self) -> int:
        """Expert-parallel size."""
        return self.run.parallel.expert_model_parallel_size

    @property
    def etp(self) -> int:
        """Tensor-parallel size of the experts."""
        return self.run.parallel.expert_tensor_parallel_size or 1

    @property
    def sp(self) -> int:
        """Ranks that share the positions of the residual stream."""
        return 1 if self.run.parallel.sequence_parallel is False else self.tp

    @property
    def tokens(self) -> int:
        """Of the longest possible micro-batch."""
        return self.run.training.micro_batch_size * self.run.data.seq_length

    @property
    def fullest_sample(self) -> tuple[int, int]:
        """(images that the tower encodes, visual tokens) of the sample that gives the tower most to do for its tokens: a
        picture, a video of a tower that takes such, or where frames are pooled as much of a video as a row holds. With each
        image comes one of every modality that is apart (`branches`), whose visual tokens are not among these."""
        data, features = self.run.data, self.tower.num_features
        if self.tower.takes_videos:
            return self.tower.num_frames, self.tower.num_frames * features
        pooling = POOLINGS[data.video_pooling]
        if pooling == POOLINGS["none"]:
            return 1, features
        width = pooling.width(features)
        groups = min(math.ceil(data.video_frames / pooling.temporal), max(data.seq_length // width, 1))
        return min(data.video_frames, groups * pooling.temporal), groups * width

    @property
    def images(self) -> int:
        """Of the fullest micro-batch: whole samples of a picture or a video with a short text each in a packed row, one per
        padded row."""
        images, visual = self.fullest_sample
        apart = images * sum(branch.seen_by(self.tower).num_features for branch in self.branches)
        fits = self.run.data.seq_length // (visual + apart + 16)
        return self.run.training.micro_batch_size * images * (max(fits, 1) if self.run.data.packing else 1)

    @property
    def trains(self) -> tuple[str, ...]:
        """Roles that receive gradients."""
        return trained_roles(self.run.training)

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters, if the run has some."""
        return self.run.training.lora

    @property
    def backpropagates(self) -> frozenset[str]:
        """Roles whose matrices pass gradients on and keep their inputs: trained ones, and those with adapters beside them."""
        return frozenset((*self.trains, *adapted_roles(self.lora)))

    @property
    def vocabulary(self) -> int:
        """Rows of the word embeddings, padded for tensor parallelism."""
        return math.ceil(self.backbone.vocab_size / self.tp) * self.tp

    @property
    def moe(self) -> MoEConfig:
        """Of a model that has experts."""
        assert self.run.moe is not None
        return self.run.moe

    @property
    def expert_inner(self) -> float:
        """Width of a routed expert on one rank."""
        return expert_ffn_hidden_size(self.moe, self.backbone) / self.etp

    @property
    def activation_bytes(self) -> int:
        """Bytes of one element of an activation."""
        return 4 if self.run.training.precision == "fp32" else 2  # plans are for GPUs, where auto is 16 bits


def routed_tokens(sharding: Sharding, imbalance: float = 1.0) -> float:
    """Rows that the experts of one rank compute: with expert tensor parallelism each rank of the group sees them all."""
    return sharding.tokens / sharding.sp * sharding.moe.moe_router_topk * sharding.etp * imbalance
