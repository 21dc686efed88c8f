"""The stage-2 model: logits, losses, gradients, expanded embeddings, tower and projector."""

from collections.abc import Callable

import torch

from megatron_moellava import platform
from megatron_moellava.config import RunConfig
from megatron_moellava.data.batch import Batch
from megatron_moellava.model.roles import freeze
from megatron_moellava.stages import STAGES
from megatron_moellava.verify.folder import Folder, to_batch
from megatron_moellava.verify.session import Session, Subject, from_any_rank, open_session, without_tied_head
from megatron_moellava.verify.static import verify_projector
from megatron_moellava.verify.table import Table, relative_errors

# Measured for Phi and Llama, all layouts: 3e-6, 1e-6, 1e-6 and 3e-6. MiniCPM's logits, of size
# 25, differ by 8e-6. A layer norm's epsilon of 1e-5 in place of 1e-6 moves logits by 6e-5 and losses by 5e-6.
LOGITS = 2e-5  # absolute
LOSS = 4e-6  # absolute
FEATURES = 5e-6  # absolute
GRADIENTS = 2e-5  # relative to the largest element, or to the norm
# A bias of keys has no gradient where no rotation follows (softmax does not see it): what is recorded there is rounding
# noise. So no gradient is measured against less than this.
GRADIENT_FLOOR = 1e-3


def verify_dense(folder: Folder, run: RunConfig, subject: Subject, table: Table) -> None:
    """Compare every recorded case of dense.pt, and the projector where there is one."""
    recorded = folder.load("dense.pt")
    session = open_session(run, subject)
    kinds: dict[str, Callable] = {"eval": _eval, "train": _train, "expanded": _expanded, "tower": _tower}
    for case, expected in recorded.items():
        kind, _, name = case.partition("/")
        batch = to_batch(folder.inputs[name], subject.num_features, session.multiple)
        kinds[kind](table, f"dense {case}", session, batch, expected)
    if folder.has("mm_projector.bin"):
        verify_projector(folder, subject.model, session, table)


def _eval(table: Table, case: str, session: Session, batch: Batch, expected: dict) -> None:
    session.train(False)
    compare_logits(table, case, session.logits(batch), batch, expected["logits"])
    table.close(case, "loss", session.loss(batch), expected["loss"], LOSS)


def _train(table: Table, case: str, session: Session, batch: Batch, expected: dict) -> None:
    for chunk in session.chunks:
        freeze(chunk, STAGES[2])
    session.train(True)
    if "logits" in expected:
        compare_logits(table, case, session.logits(batch), batch, expected["logits"])
    table.close(case, "loss", session.backward(batch), expected["loss"], LOSS)
    compare_gradients(table, case, session, expected)


def _expanded(table: Table, case: str, session: Session, batch: Batch, expected: dict) -> None:
    """The splice itself, and the decoder fed with the recorded embeddings."""
    mask_BS = expected["attention_mask"]
    length = mask_BS.shape[1]
    table.equal(case, "attention mask", batch.padding_mask_BS[:, :length], mask_BS)
    shifted_BS = torch.cat([expected["labels"][:, 1:], torch.full_like(mask_BS[:, :1], -100, dtype=torch.int64)], dim=1)
    table.equal(case, "labels", batch.labels_BS[:, :length], shifted_BS)
    embeddings_BSD = from_any_rank(_embeddings(session, batch))[:, :length]
    table.close(case, "embeddings", embeddings_BSD[mask_BS], expected["inputs_embeds"][mask_BS], FEATURES)
    session.train(False)
    whole, fed = session.logits(batch), session.logits(batch, expected["inputs_embeds"])
    table.close(case, "logits of embeddings", fed[:, :length][mask_BS], whole[:, :length][mask_BS], LOGITS)


@torch.no_grad()
def _embeddings(session: Session, batch: Batch) -> torch.Tensor | None:
    first = session.chunks[0]
    if not first.pre_process:
        return None
    tokens_BS, pixels_NCHW = (item.to(platform.device()) for item in (batch.tokens_BS, batch.pixel_values_NCHW))
    return first.embed(tokens_BS, pixels_NCHW).transpose(0, 1).cpu()


@torch.no_grad()
def _tower(table: Table, case: str, session: Session, batch: Batch, expected: dict) -> None:
    first, found = session.chunks[0], None
    table.close(case, "pixels", batch.pixel_values_NCHW, expected["pixel_values"], 0)
    if first.pre_process:
        pixels_NCHW = expected["pixel_values"].to(platform.device())
        found = first.vision_tower(pixels_NCHW).cpu(), first.encode_images(pixels_NCHW).cpu()
    features, projected = from_any_rank(found)
    table.close(case, "features", features, expected["features"], FEATURES)
    table.close(case, "projected", projected, expected["projected"], FEATURES)


def compare_logits(table: Table, case: str, ours_BSV: torch.Tensor, batch: Batch, theirs_BSV: torch.Tensor) -> None:
    """Where a token is real: the states of padding depend on what a program makes of it."""
    length = theirs_BSV.shape[1]
    mask_BS = batch.padding_mask_BS[:, :length]
    table.close(case, "logits", ours_BSV[:, :length].cpu()[mask_BS], theirs_BSV[mask_BS], LOGITS)


def compare_gradients(table: Table, case: str, session: Session, expected: dict) -> None:
    """Norms of all trained parameters, and the recorded gradients element by element."""
    ours = session.gradients()
    norms = {name: float(gradient.norm()) for name, gradient in ours.items()}
    table.named(
        case,
        "gradient norms",
        relative_errors(norms, without_tied_head(session.model, expected["grad_norms"]), GRADIENT_FLOOR),
        GRADIENTS,
    )
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    table.close(case, "total gradient norm", total / expected["grad_norm_total"], 1.0, GRADIENTS)
    if "grads" in expected:
        theirs = without_tied_head(session.model, expected["grads"])
        kept = {name: ours[name] for name in ours.keys() & theirs.keys()}
        table.named(case, "gradients", relative_errors(kept, theirs, GRADIENT_FLOOR), GRADIENTS)
