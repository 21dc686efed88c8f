"""Training curves: the trainer itself takes the recorded AdamW steps, with injected noise."""

import math
from collections.abc import Iterator
from dataclasses import replace

from megatron_moellava import parallel
from megatron_moellava.config import CheckpointConfig, MoEConfig, OptimizerConfig, RunConfig
from megatron_moellava.data.batch import Batch
from megatron_moellava.data.loader import Batches
from megatron_moellava.training.loop import Trainer
from megatron_moellava.verify.folder import Folder, to_batch
from megatron_moellava.verify.session import Session, Subject, without_tied_head
from megatron_moellava.verify.table import Table, relative_errors

LOSS = 2e-5  # absolute; measured 3e-6
NORM = 1e-5  # relative; measured 6e-7
# Relative. Adam divides by the size of the gradient, and so turns the rounding noise of a parameter that has next to no
# gradient (a bias of keys) into steps of the learning rate; measured 1e-4.
FINAL = 5e-4
CAPACITY = {"stage3_recipe": 1.5, "stage3_drop": 0.5, "stage3_noaux": 1.5}


def verify_curves(folder: Folder, run: RunConfig, subjects: dict[str, Subject], table: Table) -> None:
    """Compare every recorded training curve of the folder."""
    recorded = folder.load("train.pt")
    for case, curve in recorded.items():
        checkpoint = "moe" if case.startswith("stage3") else "dense"
        if case == "noise" or checkpoint not in subjects:
            continue
        noise = recorded["noise"] if checkpoint == "moe" else None
        verify_curve(folder, run, subjects[checkpoint], case, curve, noise, table)


def verify_curve(
    folder: Folder, run: RunConfig, subject: Subject, case: str, curve: dict, noise: dict | None, table: Table
) -> None:
    """Replay the steps of one curve; compare losses and gradient norms, then the tensors after the last."""
    moe = moe_of(subject.model.moe, case) if subject.model.moe else None
    history = curve["hist"]
    multiple = run.parallel.tensor_model_parallel_size
    batches = [to_batch(folder.inputs[step["input"]], subject.num_features, multiple) for step in history]
    trainer = Trainer(
        run_of(run, subject, case, moe, curve["lr"], batches),
        Replay(iter(batches)) if parallel.reads_data() else None,  # type: ignore[arg-type]
        len(history),
    )
    session = Session(trainer.run, subject.model, trainer.chunks)
    for chunk in trainer.wrapped:
        chunk.train()
    errors: dict[str, dict[str, float]] = {"loss": {}, "moe_loss": {}, "gradient norm": {}}
    for step in history:
        numbers = take_step(trainer, session, noise, step["step"])
        moe_loss = (
            moe.moe_aux_loss_coeff * len(subject.model.moe_layers) * numbers["load_balancing_loss"] if moe else 0.0
        )
        where = f"step {step['step']}"
        errors["loss"][where] = abs(numbers["loss"] + moe_loss - step["loss"])
        errors["gradient norm"][where] = abs(numbers["grad_norm"] / step["grad_norm"] - 1.0)
        if step["moe_loss"] is not None:
            errors["moe_loss"][where] = abs(moe_loss - step["moe_loss"])
    for quantity, found in errors.items():
        if found:
            table.named(f"curve {case}", quantity, found, NORM if quantity == "gradient norm" else LOSS)
    compare_final(table, f"curve {case}", session, curve)


def take_step(trainer: Trainer, session: Session, noise: dict | None, step: int) -> dict[str, float]:
    """One step of the trainer with that step's recorded noise; NaN where the step was skipped."""
    if noise is not None:
        prefix = f"{step}|"
        session.inject({name.removeprefix(prefix): value for name, value in noise.items() if name.startswith(prefix)})
    numbers, applied, _ = trainer.step()
    return numbers if applied else {"loss": math.nan, "grad_norm": math.nan, "load_balancing_loss": math.nan}


def compare_final(table: Table, case: str, session: Session, curve: dict) -> None:
    """Weights after the last step: norms of all trained ones, and some element by element."""
    ours = session.parameters()
    final_norms, final = (without_tied_head(session.model, curve[key]) for key in ("final_norms", "final"))
    norms = {name: float(ours[name].norm()) for name in final_norms if name in ours}
    table.named(case, "final norms", relative_errors(norms, final_norms), FINAL)
    kept = {name: ours[name] for name in final if name in ours}
    table.named(case, "final weights", relative_errors(kept, final), FINAL)


def moe_of(moe: MoEConfig, case: str) -> MoEConfig:
    """The mixture as the recorded case configured it: capacity, and whether the balance loss counts."""
    coefficient = 0.0 if case == "stage3_noaux" else moe.moe_aux_loss_coeff
    return replace(moe, moe_expert_capacity_factor=CAPACITY[case], moe_aux_loss_coeff=coefficient)


def run_of(
    run: RunConfig, subject: Subject, case: str, moe: MoEConfig | None, lr: float, batches: list[Batch]
) -> RunConfig:
    """One batch of the recording on every data-parallel rank in each step; plain AdamW at a constant rate."""
    rows = len(batches[0].tokens_BS)
    return replace(
        subject.run(run, moe),
        training=replace(
            run.training,
            stage=int(case.removeprefix("stage")[0]),  # type: ignore[arg-type]
            train_steps=len(batches),
            micro_batch_size=rows,
            global_batch_size=rows * parallel.data_parallel_size(),
        ),
        optimizer=OptimizerConfig(lr=lr, min_lr=lr, lr_decay_style="constant", lr_warmup_fraction=0.0, clip_grad=0.0),
        checkpoint=CheckpointConfig(load=subject.checkpoint),
    )


class Replay(Batches):
    """The recorded batches in the place of a loader."""

    def __init__(self, batches: Iterator[Batch]):
        self.batches = batches

    def __next__(self) -> Batch:
        return next(self.batches)
