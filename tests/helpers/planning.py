"""Requests to the planner."""

from argparse import Namespace

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import load_config
from megatron_moellava.costs.layout import Layout
from megatron_moellava.planning.command import request_of, settings_of
from megatron_moellava.planning.search import search, with_settings
from megatron_moellava.towers import get_tower


def arguments(**given) -> Namespace:
    """The planner's command line as argparse gives it, with `given` instead of the defaults."""
    values = {
        "backbone": "phi-2",
        "stage": 3,
        "gpus": 8,
        "gpu": "h100",
        "tower": "clip-vit-large-patch14-336",
        "num_experts": None,
        "seq_length": None,
        "global_batch_size": None,
        "samples": None,
        "tokens_per_sample": None,
        "images": None,
        "image_size": None,
        "videos": None,
        "video_seconds": 60.0,
        "imbalance": 1.25,
        "memory_limit": None,
        "top": 5,
        "picture": "plan.png",
        "json": None,
        "yaml": None,
        "config": None,
        "dry_run": False,
        "overrides": [],
    }
    return Namespace(**values | given)


def found_for(**given):
    """What the search finds for `arguments(**given)`."""
    options = arguments(**given)
    return search(request_of(options, settings_of(options)))


def layout_of(world_size: int = 8, **settings) -> Layout:
    """phi-2 in stage 3 on `world_size` GPUs; `parallel__tensor_model_parallel_size=2` sets a field."""
    run = load_config(None, ["model.backbone=phi-2", "training.stage=3", "moe.num_moe_experts=4"])
    run = with_settings(run, {name.replace("__", "."): value for name, value in settings.items()})
    backbone, tower = get_backbone("phi-2"), get_tower(run.model.tower)
    return Layout(run=run, backbone=backbone, tower=tower, world_size=world_size)
