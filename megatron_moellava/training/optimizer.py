"""Megatron-Core's DDP, distributed Adam and learning-rate schedule, built from the run's configuration."""

import math

import torch

from megatron_moellava import platform
from megatron_moellava.config import OptimizerConfig, RunConfig
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.model.roles import parameter_roles
from megatron_moellava.routing.observer import RoutingObserver
from megatron_moellava.stages import part_of
from megatron_moellava.training.loss_scale import LossScale
from megatron_moellava.training.main_params import round_main_params
from megatron_moellava.training.muon import build_muon
from megatron_moellava.training.weight_average import average_weights

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import clip_grads, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.utils import local_multi_tensor_l2_norm

ROUTER_GROUP = "is_router"  # key of the parameter group of the routers
ROLE_GROUP = "role"  # key of the parameter groups that `optimizer.roles` is about


def overlaps(run: RunConfig) -> tuple[bool, bool]:
    """(reduce gradients during the backward pass, gather parameters during the forward pass), as asked for or where it pays.

    Neither changes a number (tests/distributed); on a CPU both only cost threads.
    """
    several = parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1
    return run.optimizer.overlaps(pays=platform.HAS_CUDA and several)


def wrap_data_parallel(run: RunConfig, chunks: list[MoELlava]) -> list[DistributedDataParallel]:
    """Gradients in contiguous fp32 buffers, reduced over the data-parallel ranks, sharded for the optimizer (Muon, which
    steps whole matrices: reduced for all)."""
    overlap_grad_reduce, overlap_param_gather = overlaps(run)
    if run.optimizer.gradient_accumulation_fusion is not False:
        accumulate_in_products(chunks)
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=run.optimizer.optimizer == "adam",
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
    )
    return [DistributedDataParallel(chunk.config, config, chunk) for chunk in chunks]


def accumulate_in_products(chunks: list[MoELlava]) -> None:
    """Let Transformer Engine's layers add weight gradients to the fp32 buffers inside of their products.

    They can without apex; Megatron-Core's own output layer cannot, and with `gradient_accumulation_fusion` in the model's
    configuration it would refuse to be built.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True


def build_optimizer(run: RunConfig, chunks: list[DistributedDataParallel]) -> ChainedOptimizer:
    """AdamW in fp32 main parameters (which `main_params.py` may round).

    Parts of the model may have rates and weight decay of their own (`optimizer.roles`), the routers a warm-up.
    """
    if platform.HAS_CUDA and clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm
    options = run.optimizer
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=run.training.precision == "bf16",
        fp16=run.training.precision == "fp16",
        params_dtype=chunks[0].module.config.params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=overlaps(run)[1],
    )
    overrides = get_standard_config_overrides(config)
    overrides |= role_overrides(options, chunks)
    # Routers are fp32 in a bf16 model. In one group with bf16 parameters Megatron-Core would save the Adam states of one
    # parameter as another's: it numbers a group's parameters by buffer, and orders them by dtype.
    overrides[ParamKey(name=("*.mlp.router.*", "*projector.router.*"))] = ParamGroupOverride(**{ROUTER_GROUP: True})
    if options.optimizer == "muon":
        return build_muon(run, config, chunks, overrides)
    optimizer = get_megatron_optimizer(config, chunks, config_overrides=overrides)
    for part in distributed_optimizers(optimizer)[:-1]:
        # The optimizers of dense and of expert parameters would each gather the parameters of both; the last one does.
        part._defer_param_sync = True
    round_main_params(run, distributed_optimizers(optimizer))
    average_weights(options, distributed_optimizers(optimizer))
    return optimizer


def role_overrides(
    options: OptimizerConfig, chunks: list[DistributedDataParallel]
) -> dict[ParamKey, ParamGroupOverride]:
    """For Megatron-Core's parameter groups: what `optimizer.roles` and `projector_lr` say, by parameter."""
    part_of_parameter = {
        parameter: part_of(role) for chunk in chunks for role, _, parameter in parameter_roles(chunk.module)
    }

    overrides = {}
    for part, own in options.of_roles().items():
        override: dict = {ROLE_GROUP: part}
        if own.lr is not None or own.min_lr is not None:
            override["max_lr"] = options.lr if own.lr is None else own.lr
            override["min_lr"] = options.min_lr if own.min_lr is None else own.min_lr
        if own.weight_decay is not None:
            override["start_wd"] = override["end_wd"] = own.weight_decay
        is_of_part = ParamWithNamePredicate(part, lambda parameter, _, part=part: part_of_parameter[parameter] == part)
        overrides[ParamKey(with_name_predicate=is_of_part)] = ParamGroupOverride(**override)
    return overrides


def role_rates(options: OptimizerConfig, optimizer: ChainedOptimizer) -> dict[str, float]:
    """The present learning rates of the parts that `optimizer.roles` gives one of their own, as a log names them."""
    if options.roles is None:
        return {}
    parts = {part for part, own in options.of_roles().items() if own.lr is not None or own.min_lr is not None}
    return {
        f"lr/{group[ROLE_GROUP]}": group["lr"] for group in optimizer.param_groups if group.get(ROLE_GROUP) in parts
    }


def l2_norm(chunk_size, noop_flag, tensor_lists, per_tensor, *unused) -> tuple[torch.Tensor, None]:
    """[1], the norm of all tensors together, for Megatron-Core on a GPU without Transformer Engine and apex.

    Its own stand-in reads the norm of every tensor on the host, and waits for the device each time.
    """
    norms = torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors])
    return torch.linalg.vector_norm(torch.stack(norms)).float().reshape(1), None


class Scheduler(OptimizerParamScheduler):
    """Megatron-Core's schedule; the routers' learning rate may take longer to reach it."""

    def __init__(self, optimizer: ChainedOptimizer, *, router_warmup_steps: int, **options):
        self.router_warmup_steps = router_warmup_steps  # before Megatron-Core sets the first rate
        super().__init__(optimizer, **options)

    def get_lr(self, param_group: dict) -> float:
        """The learning rate of a parameter group at this step; the routers' grows linearly to the schedule's."""
        lr = super().get_lr(param_group)
        if param_group.get(ROUTER_GROUP) and self.num_steps < self.router_warmup_steps:
            return lr * self.num_steps / self.router_warmup_steps
        return lr


def build_scheduler(options: OptimizerConfig, optimizer: ChainedOptimizer, train_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then decay to `min_lr` at the last step (transformers' cosine schedule)."""
    warmup_steps = math.ceil(options.lr_warmup_fraction * train_steps)
    return Scheduler(
        optimizer,
        router_warmup_steps=math.ceil((options.router_lr_warmup_fraction or 0.0) * train_steps),
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=max(train_steps, warmup_steps + 1),
        lr_decay_style=options.lr_decay_style,
        lr_wsd_decay_style=options.lr_wsd_decay_style,
        wsd_decay_steps=options.wsd_decay_steps(train_steps),
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=train_steps,
        wd_incr_style="constant",
    )


def rate_after(options: OptimizerConfig, train_steps: int, updates: int) -> float:
    """The learning rate with which a run of `train_steps` goes on after so many updates."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=options.lr)
    build_scheduler(options, optimizer, train_steps).step(increment=updates)
    return optimizer.param_groups[0]["lr"]


class Update:
    """One optimizer step that leaves everything as it was when a gradient is not finite."""

    def __init__(self, optimizer: ChainedOptimizer, loss_scale: LossScale | None = None):
        """`loss_scale`: of a run in fp16; it moves with each step, a skipped one too."""
        self.optimizer, self.loss_scale = optimizer, loss_scale
        self._measure = optimizer.get_grad_norm
        self._grad_norm = 0.0
        # The step clips by the norm that was measured to see whether there is to be a step.
        optimizer.get_grad_norm = lambda: self._grad_norm

    def __call__(self) -> tuple[bool, float]:
        """Returns (applied, gradient norm before clipping). The norm covers all ranks, so all of them agree."""
        self.optimizer.prepare_grads()
        norm = self._measure()
        self._grad_norm = 0.0 if norm is None else float(norm)  # the one wait of a step: for the decision and the log
        is_finite = math.isfinite(self._grad_norm)
        if self.loss_scale is not None:
            self.loss_scale.advance(found_inf=not is_finite)
        if not is_finite:
            self.optimizer.zero_grad()
            return False, self._grad_norm
        self._step()
        return True, self._grad_norm

    def _step(self) -> None:
        """Megatron-Core's, which prepares the gradients again, in place."""
        if self.loss_scale is not None:
            self.loss_scale.is_divided = True
        self.optimizer.step()
        if self.loss_scale is not None:
            self.loss_scale.is_divided = False


class ExpertBiases:
    """The routers' expert biases of this rank, which Megatron-Core moves when it finalizes gradients, before anybody has
    looked whether these are finite."""

    def __init__(self, chunks: list[MoELlava]):
        routers = RoutingObserver(chunks).routers.values()
        self.biases = [router.expert_bias for router in routers if router.expert_bias is not None]
        self.kept: list[torch.Tensor] = []

    def keep(self) -> None:
        """Remember them as they are."""
        self.kept = [bias.clone() for bias in self.biases]

    def restore(self) -> None:
        """Bring back what was kept last."""
        for bias, kept in zip(self.biases, self.kept, strict=True):
            bias.copy_(kept)


def distributed_optimizers(optimizer: ChainedOptimizer) -> list:
    """The optimizers of dense and of expert parameters, without stand-ins for ranks that train nothing."""
    return [item for item in optimizer.chained_optimizers if not getattr(item, "is_stub_optimizer", False)]


def optimizer_step_count(optimizer: ChainedOptimizer) -> int:
    """Updates applied so far (skipped steps do not count), which Adam's bias correction needs."""
    counts = [0]
    for item in distributed_optimizers(optimizer):
        counts += [int(group["step"]) for group in item.optimizer.param_groups if "step" in group]
        counts += [int(state["step"]) for state in item.optimizer.state.values() if "step" in state]
    count = torch.tensor(max(counts), device=platform.device())  # nccl takes no tensor of the host
    torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
    return int(count)
