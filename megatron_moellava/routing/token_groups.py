"""Which group a token is counted in: text, image or another modality, and the type of the question that its text belongs to.

A sample's tag names the types of its turns, joined by "+" ("color+shape+existence"); a turn ends with its answer. Only
text is split by type: an image stands before the questions, so a causal model cannot know them there.
Shapes: B rows, S positions, G groups, N tokens in Megatron-Core's order (sequence first).
"""

import itertools

import torch

from megatron_moellava.config import RunConfig
from megatron_moellava.data.batch import Batch
from megatron_moellava.data.encode import IGNORE_INDEX, IMAGE_TOKEN
from megatron_moellava.routers import MODALITIES

TYPE = "type:"  # prefix of a group of text tokens


def modalities_of(run: RunConfig) -> tuple[str, ...]:
    """Names of the groups that split all tokens: text, plain pictures, and those of each of `data.modalities`."""
    return (*MODALITIES, *(modality.name for modality in run.data.modalities))


def token_groups(batch: Batch, modalities: tuple[str, ...] = MODALITIES) -> tuple[list[str], torch.Tensor]:
    """Names, and membership [G, B, S] (bool). Padding belongs to no group; the first ones are the `modalities`."""
    real_BS, modality_BS = batch.padding_mask_BS, token_modalities(batch, modalities)
    names, members = list(modalities), [real_BS & (modality_BS == number) for number in range(len(modalities))]
    types, types_BS = question_types(batch)
    for number, name in enumerate(types):
        names.append(TYPE + name)
        members.append(members[0] & (types_BS == number))
    return names, torch.stack(members)


def token_modalities(batch: Batch, modalities: tuple[str, ...] = MODALITIES) -> torch.Tensor:
    """[B, S] int64: which of the `modalities` each token is of; padding counts as text.

    tokens [[-200, -200, 5, -200]] of pictures (("image", 2), ("depth", 1)) -> [[1, 1, 0, 2]] of ("text", "image", "depth")
    """
    is_image_BS = batch.tokens_BS == IMAGE_TOKEN
    if not batch.pictures:
        return is_image_BS.long()
    kinds = [modalities.index(name) for name, count in batch.pictures for _ in range(count)]
    kinds_R = torch.tensor([0, *kinds], device=is_image_BS.device)
    numbers_BS = is_image_BS.flatten().cumsum(dim=0).view_as(is_image_BS)  # a mask would wait for the device
    return kinds_R[numbers_BS * is_image_BS]


def question_types(batch: Batch) -> tuple[list[str], torch.Tensor]:
    """(names, number of each token's type [B, S]); -1 where a sample has no tag.

    labels [-100 7 8 -100 9 -100] of a sample with the tag "color+shape" -> [color x 3, shape x 3]
    """
    names: list[str] = []
    types_BS = torch.full_like(batch.tokens_BS, -1)
    for (row, start, end), tag in zip(spans(batch), batch.tags, strict=False):  # the tail of a packed row has no tag
        if not tag:
            continue
        numbers = [_number(name, names) for name in tag.split("+")]
        turns_S = turn_numbers(batch.labels_BS[row, start:end])
        if int(turns_S[-1]) + 1 != len(numbers):  # not one type for each turn: the tag as a whole is the type
            numbers, turns_S = [_number(tag, names)], torch.zeros_like(turns_S)
        types_BS[row, start:end] = torch.tensor(numbers, device=turns_S.device)[turns_S]
    return _used(names, types_BS)


def spans(batch: Batch) -> list[tuple[int, int, int]]:
    """(row, first position, end) of every sample."""
    if batch.cu_seqlens is None:
        return [(row, 0, batch.tokens_BS.shape[1]) for row in range(len(batch.tokens_BS))]
    ends = batch.cu_seqlens.tolist()
    return [(0, start, end) for start, end in itertools.pairwise(ends)]


def turn_numbers(labels_S: torch.Tensor) -> torch.Tensor:
    """The turn of every token, from 0. A turn ends where its answer's labels do; what follows the last belongs to it."""
    answer_S = labels_S != IGNORE_INDEX
    ended_S = torch.cat([answer_S.new_zeros(1), answer_S[:-1] & ~answer_S[1:]]).cumsum(dim=0)
    return ended_S.clamp(max=max(int(ended_S[answer_S].max()), 0) if answer_S.any() else 0)


def _number(name: str, names: list[str]) -> int:
    if name not in names:
        names.append(name)
    return names.index(name)


def _used(names: list[str], types_BS: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """Without the parts of a tag that has turned out not to name turns."""
    used = sorted({int(number) for number in types_BS.unique() if number >= 0})
    renumber = torch.full((len(names) + 1,), -1, dtype=types_BS.dtype, device=types_BS.device)
    for new, old in enumerate(used):
        renumber[old] = new
    return [names[old] for old in used], renumber[types_BS]
