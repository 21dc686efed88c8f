"""Muon (arXiv 2502.16982) for the matrices, AdamW for the rest, by Megatron-Core's layer-wise distributed optimizer.

A matrix is stepped by its orthogonalized momentum, which needs it whole: each data-parallel rank steps other matrices, and
hands them to the rest. Under tensor parallelism ranks gather the momentum of a matrix ("duplicated"), so an update does not
depend on the layout; each attention matrix is stepped as its query, key and value. AdamW has what is no matrix, and the
embeddings: of the words, of the output layer, and of the tower's positions.

What Megatron-Core 0.19.2 lacks and is added here: in fp32 it leaves the optimizers bare that its layer-wise one expects
wrapped; in bf16 its fp32 copies forget which matrices are attention's or experts'; it splits the tower's attention by the
language model's heads; and its exchange of stepped parameters takes all of them for one type, which routers (fp32 in a
bf16 model) are not.
"""

import torch
import torch.distributed as dist

from megatron_moellava.config import RunConfig
from megatron_moellava.model.roles import parameter_roles

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

# Of OptimizerConfig, ours and Megatron-Core's.
MUON_FIELDS = (
    "muon_momentum",
    "muon_nesterov",
    "muon_scale_mode",
    "muon_extra_scale_factor",
    "muon_num_ns_steps",
    "muon_fp32_matmul_prec",
)
# What Megatron-Core notes on a parameter for Muon.
_NOTES = ("is_qkv", "qkv_split_shapes", "expert_tp")


class Muon(LayerWiseDistributedOptimizer):
    """Megatron-Core's, whose ranks exchange parameters of several types."""

    @torch.no_grad()
    def allgather_params(self) -> None:
        """Every parameter from the rank that has stepped it to the others of its group; collective."""
        for lists, group in ((self.dp_cp_params_list, self.dp_cp), (self.expt_dp_params_list, self.expt_dp)):
            for rank, parameters in enumerate(lists or ()):
                for parameter in parameters:
                    dist.broadcast(parameter.data, group=group, group_src=rank)


def build_muon(
    run: RunConfig, config: MegatronOptimizerConfig, chunks: list[DistributedDataParallel], overrides: dict
) -> Muon:
    """The optimizer of a run with `optimizer.optimizer=muon`; `config` has everything but Muon's own."""
    for name in MUON_FIELDS:
        setattr(config, name, getattr(run.optimizer, name))
    config.optimizer, config.muon_tp_mode = "muon", "duplicated"
    config.use_distributed_optimizer, config.use_layer_wise_distributed_optimizer = False, config.bf16
    _mark_embeddings(chunks)
    optimizer = get_megatron_optimizer(config, chunks, config_overrides=overrides)
    if not config.bf16:
        parts = [item for item in optimizer.chained_optimizers if not getattr(item, "is_stub_optimizer", False)]
        groups = ProcessGroupCollection.use_mpu_process_groups()
        optimizer = LayerWiseDistributedOptimizer(parts, config, groups, model_chunks=chunks)
    optimizer.__class__ = Muon
    for chunk in chunks:
        _note_heads(chunk)
        for parameter in chunk.parameters():
            if (main := getattr(parameter, "main_param", None)) is not None:
                for note in (name for name in _NOTES if hasattr(parameter, name)):
                    setattr(main, note, getattr(parameter, note))
    for item in optimizer.chained_optimizers:
        if isinstance(item.optimizer, TensorParallelMuon):
            item.optimizer.register_step_post_hook(_count)
    return optimizer


def _mark_embeddings(chunks: list[DistributedDataParallel]) -> None:
    """The tower's, which Megatron-Core does not know as such; its positions are rows that are looked up."""
    for chunk in chunks:
        for role, name, parameter in parameter_roles(chunk.module):
            if role == "tower" and "embedding" in name:
                parameter.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]


def _note_heads(chunk: DistributedDataParallel) -> None:
    """The rows of query, key and value of each attention layer: Megatron-Core takes the language model's for the tower's."""
    for module in chunk.modules():
        weight = getattr(getattr(module, "linear_qkv", None), "weight", None)
        if weight is not None and weight.requires_grad:
            config = module.config
            width, groups = config.kv_channels, config.num_query_groups or config.num_attention_heads
            shapes = [config.num_attention_heads // groups * width, width, width]
            weight.is_qkv, weight.qkv_split_shapes = weight.shape[0] % sum(shapes) == 0, shapes


def _count(torch_optimizer: torch.optim.Optimizer, *_) -> None:
    """Updates, by group, as fused optimizers count them: Muon itself does not, and a checkpoint has to know."""
    for group in torch_optimizer.param_groups:
        group["step"] = group.get("step", 0) + 1
