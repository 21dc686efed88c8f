"""From a folder of recordings to the table: import its checkpoints, run every case that it has."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from megatron_moellava import parallel
from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import (
    CheckpointError,
    ConfigError,
    MoELlavaError,
    RunConfig,
    from_dict,
    set_override,
    split_override,
)
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.costs.shapes import model_from_json
from megatron_moellava.model.precision import settled
from megatron_moellava.verify.conversations import verify_conversations
from megatron_moellava.verify.curves import verify_curves
from megatron_moellava.verify.data import verify_data
from megatron_moellava.verify.dense import verify_dense
from megatron_moellava.verify.folder import Folder, find_folders
from megatron_moellava.verify.gates import verify_gates
from megatron_moellava.verify.moe import verify_generation, verify_moe
from megatron_moellava.verify.session import Subject, from_any_rank
from megatron_moellava.verify.static import verify_names, verify_placements, verify_trained
from megatron_moellava.verify.table import Table

CHECKPOINTS = ("dense", "moe", "moe_residual")


def verify(path: Path, overrides: list[str]) -> bool:
    """Run all cases of `path` in the layout that `overrides` ask for; print the tables; True when everything agrees."""
    folders = find_folders(path)
    run = base_run(overrides)
    parallel.initialize(run.parallel, run.training.seed)
    run = settled(run).run
    try:
        results = [verify_folder(folder, run) for folder in folders]
        if parallel.is_main_process():
            for folder, table in zip(folders, results, strict=True):
                print(f"\n{folder.path}\n{table.render()}", flush=True)
        # Only the last pipeline stage knows the losses of a step, so its table decides for all processes.
        return from_any_rank(all(table.passes for table in results) if parallel.is_main_process() else None)
    finally:
        parallel.shutdown()


def base_run(overrides: list[str]) -> RunConfig:
    """fp32, padded rows, embeddings scaled as the original does it."""
    tree: dict = {
        "model": {"backbone": "", "tower": "", "scale_multimodal_embeddings": False},
        "data": {"packing": False},
        "training": {"stage": 2, "precision": "fp32"},
        "logging": {"tensorboard": False, "routing_interval": 1_000_000},
    }
    for override in overrides:
        set_override(tree, *split_override(override))
    run = from_dict(RunConfig, tree)
    _check_layout(run)
    return run


def _check_layout(run: RunConfig) -> None:
    """Layouts that cannot run rows of the recordings' lengths, said before anything is imported."""
    layout = run.parallel
    refused = {
        "parallel.context_parallel_size": (layout.context_parallel_size > 1, "rows of any length cannot be cut"),
        "parallel.virtual_pipeline_model_parallel_size": (
            (layout.virtual_pipeline_model_parallel_size or 1) > 1,
            "a single micro-batch cannot be interleaved",
        ),
        "parallel.sequence_parallel=false": (
            layout.sequence_parallel is False and layout.tensor_model_parallel_size > 1,
            "Megatron-Core's MoE layers need it with tensor parallelism",
        ),
    }
    for name, (is_asked, why) in refused.items():
        if is_asked:
            raise ConfigError(f"{name} cannot be verified: {why}; leave it unset")


def verify_folder(folder: Folder, run: RunConfig) -> Table:
    """Every case that this folder has files for."""
    table = Table(left_out=folder.left_out(CHECKPOINTS))
    verify_gates(folder, table)
    conversations = folder.beside("data/conversations.json")
    if conversations:
        verify_conversations(conversations, conversations.parents[1] / "assets", table)
    verify_data(folder, table)
    with shared_folder() as place:
        names = [name for name in CHECKPOINTS if folder.has_checkpoint(name)]
        on_first_rank(lambda: import_all(folder, names, place))
        subjects = {name: subject_of(place / name) for name in names}
        if subjects:
            verify_models(folder, run, subjects, table)
        dist.barrier()
    return table


def subject_of(imported: Path) -> Subject:
    """What a checkpoint's run.json says of its model; its weights are verified when they are loaded."""
    return Subject(model_from_json(read_description(require_checkpoint(imported)).model), str(imported))


def verify_models(folder: Folder, run: RunConfig, subjects: dict[str, Subject], table: Table) -> None:
    """The cases that need a checkpoint."""
    if folder.has("moe_layers.json"):
        verify_placements(folder, next(iter(subjects.values())).model.backbone.num_layers, table)
    if folder.has("names.json"):
        verify_names(folder, subjects, table)
        verify_trained(folder, run, subjects, table)
    if "dense" in subjects and folder.has("dense.pt"):
        verify_dense(folder, run, subjects["dense"], table)
    for name in ("moe", "moe_residual"):
        if name in subjects and folder.has(f"{name}.pt"):
            verify_moe(folder, f"{name}.pt", run, subjects[name], table)
    if "moe" in subjects and folder.has("generate.pt"):
        verify_generation(folder, run, subjects["moe"], table)
    if folder.has("train.pt"):
        verify_curves(folder, run, subjects, table)


def import_all(folder: Folder, names: list[str], place: Path) -> None:
    """Import the original checkpoints `names` of a folder, each into `place`/name."""
    for name in names:
        import_checkpoint(folder.path / name, save=place / name, tower=folder.tower_of(name))


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """A temporary folder that rank 0 makes and removes; the ranks must be on one machine."""
    with tempfile.TemporaryDirectory() if dist.get_rank() == 0 else contextlib.nullcontext() as made:
        name = [made]
        dist.broadcast_object_list(name, src=0)
        yield Path(str(name[0]))


def on_first_rank(action: Callable[[], None]) -> None:
    """Run on rank 0 while the others wait; its error is raised on every rank, as a CheckpointError."""
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except MoELlavaError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise CheckpointError(failure[0])
