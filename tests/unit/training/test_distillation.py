"""The loss with a teacher: equal to torch's KL divergence over the full vocabulary, and what is compared where it is cut."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron_moellava.config import DistillationConfig
from megatron_moellava.data.batch import Batch, total
from megatron_moellava.data.encode import IGNORE_INDEX
from megatron_moellava.model.vocabulary import top_ids, with_rest
from megatron_moellava.training.distillation import DistillationLoss, divergence
from tests.helpers.trainers import one_layout

VOCABULARY = 13


@pytest.fixture(scope="module", autouse=True)
def groups():
    with one_layout():
        yield


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Of a teacher, and of a student (leaf)."""
    draw = torch.Generator().manual_seed(3)
    teacher, student = (2 * torch.randn(2, 8, VOCABULARY, generator=draw) for _ in range(2))
    return teacher, student.requires_grad_()


def labelled(rows: slice, top_k: int) -> tuple[Batch, torch.Tensor]:
    """(padded rows with the teacher's distributions of their labels, where the labels are)"""
    labels_BS = torch.full((2, 8), IGNORE_INDEX)
    labels_BS[0, 1:3], labels_BS[1, 2:6] = torch.tensor([4, 0]), torch.tensor([1, 12, 7, 7])
    labels_BS, teacher_BSV = labels_BS[rows], logits()[0][rows]
    is_label_BS = labels_BS != IGNORE_INDEX
    teacher_TV = teacher_BSV[is_label_BS]
    ids_TK = top_ids(teacher_TV, top_k)
    batch = Batch(
        tokens_BS=torch.ones_like(labels_BS),
        labels_BS=labels_BS,
        position_ids_BS=torch.zeros_like(labels_BS),
        padding_mask_BS=torch.ones_like(labels_BS, dtype=torch.bool),
        cu_seqlens=None,
        max_seqlen=8,
        pixel_values_NCHW=torch.zeros(0, 3, 2, 2),
        teacher_ids_TK=ids_TK.int(),
        teacher_log_probs_TC=with_rest(teacher_TV, ids_TK).log_softmax(dim=1),
    )
    return batch, is_label_BS


def step(options: DistillationConfig, top_k: int, *parts: slice) -> tuple[dict[str, float], torch.Tensor]:
    """(numbers of a step of these micro-batches, gradient of its loss with respect to the student's logits)."""
    student = logits()[1]
    batches = [labelled(part, top_k)[0] for part in parts]
    counts = total(batch.counts for batch in batches)
    found = [DistillationLoss(options, counts, 1.0)(student[p], b) for p, b in zip(parts, batches, strict=True)]
    sum(loss for loss, _ in found).backward()
    assert sum(loss.item() for loss, _ in found) == pytest.approx(float(sum(numbers for _, numbers in found)[0]))
    return dict(zip(DistillationLoss.names, sum(n for _, n in found).tolist(), strict=True)), student.grad


def expected(weight: float, temperature: float) -> tuple[dict[str, float], torch.Tensor]:
    """The same by torch alone, over the whole vocabulary."""
    teacher, student = logits()
    batch, is_label_BS = labelled(slice(0, 2), 1)
    ce = F.cross_entropy(student[is_label_BS], batch.labels_BS[is_label_BS])
    flat = [(values[is_label_BS] / temperature).log_softmax(dim=1) for values in (student, teacher)]
    kl = F.kl_div(*flat, log_target=True, reduction="batchmean") * temperature**2
    loss = (1 - weight) * ce + weight * kl
    loss.backward()
    return {"loss": float(loss), "ce_loss": float(ce), "kl_loss": float(kl)}, student.grad


@pytest.mark.parametrize("parts", [(slice(0, 2),), (slice(0, 1), slice(1, 2))], ids=["one batch", "two micro-batches"])
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.5, 1.0), (0.3, 2.0), (1.0, 0.5)])
def test_with_the_whole_vocabulary_it_is_the_full_divergence(weight, temperature, parts):
    options = DistillationConfig(teacher_logits="", weight=weight, temperature=temperature)
    numbers, gradient = step(options, VOCABULARY, *parts)
    wanted, wanted_gradient = expected(weight, temperature)
    assert numbers == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-5, atol=1e-6)


def test_the_label_alone_is_the_usual_loss():
    numbers, gradient = step(DistillationConfig(teacher_logits="", weight=0.0), 3, slice(0, 2))
    wanted, wanted_gradient = expected(0.0, 1.0)
    assert numbers["loss"] == numbers["ce_loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-5, atol=1e-6)


def test_fewer_tokens_see_less_of_the_divergence_and_never_more():
    divergences = [step(DistillationConfig(teacher_logits="", weight=1.0), k, slice(0, 2))[0]["kl_loss"] for k in
                   (1, 2, 4, 8, VOCABULARY)]  # fmt: skip
    assert divergences == sorted(divergences) and divergences[0] > 0
    assert divergences[-1] == pytest.approx(expected(1.0, 1.0)[0]["kl_loss"], rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_like_its_teacher_has_nothing_to_learn_from_it(temperature):
    teacher_TV = logits()[0].flatten(0, 1).requires_grad_()
    ids_TK = top_ids(teacher_TV, 4)
    log_probs_TC = with_rest(teacher_TV, ids_TK).log_softmax(dim=1).detach()
    found_T = divergence(log_probs_TC, with_rest(teacher_TV, ids_TK), temperature)
    found_T.sum().backward()
    assert float(found_T.detach().abs().max()) < 1e-5 and float(teacher_TV.grad.abs().max()) < 1e-6


def test_the_rest_counts_as_one_token():
    teacher_TC, student_TC = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.5, 0.1, 0.4]]).log()
    wanted = sum(p * math.log(p / q) for p, q in ((0.7, 0.5), (0.2, 0.1), (0.1, 0.4)))
    assert divergence(teacher_TC, student_TC, 1.0).tolist() == [pytest.approx(wanted)]


def test_what_the_backward_pass_needs_is_what_the_planner_counts():
    """A softmax in fp32 and a mask in bytes for each logit of a label, beside what is as wide as the teacher's tokens."""
    labels, vocabulary = 32, 4096
    draw = torch.Generator().manual_seed(1)
    logits_TV = torch.randn(labels, vocabulary, generator=draw).bfloat16().requires_grad_()
    ids_TK = top_ids(logits_TV, 8)
    teacher_TC = with_rest(logits_TV, ids_TK).log_softmax(dim=1).detach()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = divergence(teacher_TC, with_rest(logits_TV, ids_TK), 1.0).sum()
    assert loss.requires_grad
    per_logit = sum(kept.values()) / (labels * vocabulary)
    assert 5.0 <= per_logit < 5.2


def test_rows_without_a_label_cost_nothing():
    student = logits()[1]
    batch, _ = labelled(slice(0, 2), 3)
    nothing = {"teacher_ids_TK": batch.teacher_ids_TK[:0], "teacher_log_probs_TC": batch.teacher_log_probs_TC[:0]}
    batch = replace(batch, labels_BS=torch.full_like(batch.labels_BS, IGNORE_INDEX), counts=None, **nothing)
    loss, numbers = DistillationLoss(DistillationConfig(teacher_logits=""), batch.counts, 1.0)(student, batch)
    loss.backward()
    assert numbers.tolist() == [0.0, 0.0, 0.0] and not student.grad.any()
