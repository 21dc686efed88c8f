"""One process of test_conversion: loads a converted checkpoint under each layout and saves it again from there."""

import json
import sys
from pathlib import Path

from megatron_moellava import parallel
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import RunConfig, from_dict
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from megatron_moellava.model.build import build_model
from megatron_moellava.model.weights import load_weights
from megatron_moellava.training.checkpoint import TrainingState, save_checkpoint


def resave(source: str, target: str, layout: dict) -> None:
    opened = open_checkpoint(Path(source))
    run = from_dict(
        RunConfig,
        {
            "model": {"backbone": source, "tower": source},  # a checkpoint describes its own model
            "moe": opened.run.model["moe"],
            "training": {"stage": 3 if opened.model.moe else 2, "precision": "fp32", "device": "cpu"},
            "parallel": layout,
        },
    )
    parallel.initialize(run.parallel, seed=1)
    chunks = build_model(run)
    load_weights(require_checkpoint(source), chunks)
    save_checkpoint(target, run, chunks, TrainingState(iteration=7, consumed_samples=0, data=None))


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        resave(*job)
    parallel.shutdown()
