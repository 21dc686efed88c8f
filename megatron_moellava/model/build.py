"""The model of a run on this rank, with fresh weights; checkpoint.py fills it."""

from megatron_moellava import platform
from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import RunConfig
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.towers import tower_of_run

from megatron.core import parallel_state


def build_model(run: RunConfig) -> list[MoELlava]:
    """The chunks of this pipeline rank: one, or one for each virtual stage; on the device, parameters in run precision."""
    platform.exact_products(run.training.precision)
    backbone, tower = get_backbone(run.model.backbone), tower_of_run(run)
    virtual = run.parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual or 1):
        vp_stage = stage if virtual else None
        chunks.append(
            MoELlava(
                run,
                backbone,
                tower,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                vp_stage=vp_stage,
            ).to(platform.device())
        )
    return chunks
