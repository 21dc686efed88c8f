"""The precision that all processes of a run compute in: `auto` becomes a name here, before anything is built."""

from typing import NamedTuple, get_args

from megatron_moellava import parallel, platform
from megatron_moellava.config import Precision, RunConfig
from megatron_moellava.machine import slowness
from megatron_moellava.validation.precision import decided, with_precision

UNLIKE = "the processes run on machines of different kinds"


class Settled(NamedTuple):
    """`run` with its precision by name, why it is that one (empty: the run says so), and what is to be warned of."""

    run: RunConfig
    reason: str
    warning: str


def settled(run: RunConfig) -> Settled:
    """What every process takes; fp32 where they would not choose alike. Collective."""
    machine = platform.machine()
    own, reason = decided(run, machine)
    precision = parallel.common_choice(own.training.precision, get_args(Precision), "fp32")
    if precision != own.training.precision:
        own, reason = with_precision(own, precision), UNLIKE
    return Settled(own, reason, slowness(precision, machine))


def settle_and_say(run: RunConfig) -> RunConfig:
    """The run of `settled`, said on the main process."""
    found = settled(run)
    if found.reason:
        parallel.say(f"precision {found.run.training.precision}: {found.reason}")
    if found.warning:
        parallel.say(found.warning)
    return found.run
