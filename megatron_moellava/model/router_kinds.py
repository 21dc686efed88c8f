"""The module of each kind of router (`routers.py`), and what makes the routers of a run."""

from collections.abc import Callable
from functools import partial

from megatron_moellava.config import MoEConfig
from megatron_moellava.model.modality_router import ModalityRouter
from megatron_moellava.model.router import MegatronRouter, OriginalRouter
from megatron_moellava.routers import knows_modality

MODULES: dict[str, type[MegatronRouter]] = {"megatron": MegatronRouter, "original": OriginalRouter}


def router_builder(moe: MoEConfig) -> Callable[..., MegatronRouter]:
    """What makes the routers of a run."""
    module: type[MegatronRouter] = ModalityRouter if knows_modality(moe) else MODULES[moe.router]
    options: dict = {} if module is MegatronRouter else {"moe": moe}
    if moe.normalize_top1:
        options["normalizes_top1"] = True
    return partial(module, **options) if options else module
