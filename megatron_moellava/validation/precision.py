"""What `training.precision=auto` stands for: the checkpoint's precision where a run goes on, else this machine's fastest."""

from dataclasses import replace

from megatron_moellava.checkpoint.resume_point import newest_described
from megatron_moellava.config import MoELlavaError, RunConfig
from megatron_moellava.machine import Machine, fastest_precision


def decided(run: RunConfig, machine: Machine) -> tuple[RunConfig, str]:
    """The run with its precision by name, and the reason for it; empty where the run has named it itself."""
    if run.training.precision != "auto":
        return run, ""
    precision, reason = _of_the_run_before(run) or fastest_precision(machine)
    return with_precision(run, precision), reason


def with_precision(run: RunConfig, precision: str) -> RunConfig:
    """The run with that precision."""
    return replace(run, training=replace(run.training, precision=precision))  # type: ignore[arg-type]


def _of_the_run_before(run: RunConfig) -> tuple[str, str] | None:
    """Of the checkpoint in `checkpoint.save` that the run goes on with, and that reason; None where it starts."""
    if run.checkpoint.save is None:
        return None
    try:
        resumed = newest_described(run.checkpoint.save, run.checkpoint.ckpt_step)
    except MoELlavaError:
        return None  # validation.checkpoints says it
    if resumed is None or not resumed[1].config:
        return None
    config = resumed[1].config
    return config["training"].get("precision", "bf16"), f"{resumed[0].name} goes on in it"
