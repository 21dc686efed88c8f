"""One process of test_hf_logits.py: import every model of a folder, compare it under this layout, write the errors.

torchrun --nproc-per-node 2 hf_worker.py FOLDER TOWER NAME parallel.tensor_model_parallel_size=2
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from megatron_moellava import parallel
from megatron_moellava.backbones.from_config import hf_config_of
from megatron_moellava.config import RunConfig
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.layout import ORIGINAL, TRANSFORMERS
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from megatron_moellava.data.batch import Batch, pad
from megatron_moellava.model.roles import freeze
from megatron_moellava.stages import LANGUAGE
from megatron_moellava.towers.from_config import hf_config_of as tower_config_of
from megatron_moellava.verify.command import base_run, on_first_rank
from megatron_moellava.verify.folder import sample_of
from megatron_moellava.verify.session import Subject, open_session
from megatron_moellava.verify.table import largest_difference, relative_errors


def main(folder: Path, tower: str, layout: str, overrides: list[str]) -> None:
    run = base_run(overrides)
    parallel.initialize(run.parallel, seed=0)
    errors = {}
    for source in sorted(item.parent for item in folder.glob("*/reference.pt")):
        save = folder / layout / source.name
        on_first_rank(lambda source=source, save=save: convert(source, save, tower))
        errors[source.name] = compare(source, save, run)
    if parallel.is_main_process():
        (folder / f"{layout}.json").write_text(json.dumps(errors))
    parallel.shutdown()


def convert(source: Path, save: Path, tower: str) -> None:
    """A Megatron checkpoint, and beside it the config.json files of the backbone and the tower that were read."""
    whole = "text_config" in json.loads((source / "config.json").read_text())
    import_checkpoint(source, save=save, tower=None if whole else tower)
    model = open_checkpoint(save).model
    (save / "tower").mkdir()
    (save / "config.json").write_text(json.dumps(hf_config_of(model.backbone)))
    (save / "tower/config.json").write_text(json.dumps(tower_config_of(model.tower)))


def compare(source: Path, save: Path, run: RunConfig) -> dict[str, float]:
    expected = torch.load(source / "reference.pt", weights_only=True)
    model = open_checkpoint(save).model
    model = replace(model, tower=replace(model.tower, name=str(save / "tower")))
    subject = Subject(model, str(save))
    moe = replace(model.moe, moe_aux_loss_coeff=0.0) if model.moe else None
    session = open_session(run, subject, moe)
    for chunk in session.chunks:
        freeze(chunk, LANGUAGE)
    batch = to_batch(expected["tokens"])
    errors = {
        "logits": largest_difference(session.logits(batch), expected["logits"]),
        "loss": abs(session.backward(batch) - expected["loss"]),
    }
    native = model.backbone.moe is not None  # recorded of a language model alone, whose names have no prefix
    layout = replace(TRANSFORMERS, language="") if native else TRANSFORMERS if model.moe else ORIGINAL
    gradients = session.gradients(layout)
    worst = relative_errors(gradients, expected["gradients"], floor=1e-3)
    name = max(worst, key=worst.get)
    return errors | {"gradients": worst[name], "worst gradient": name, "compared": len(worst)}


def to_batch(tokens_BS: torch.Tensor) -> Batch:
    """Every token is a target but the first."""
    rows = [sample_of(ids, [-100, *ids[1:]], 0, "") for ids in tokens_BS.tolist()]
    return pad(rows, [], 1, 0, (3, 28, 28))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
