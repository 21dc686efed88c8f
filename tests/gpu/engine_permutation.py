"""Launches of Transformer Engine's Triton kernels that move tokens to their experts and back, in torch.

A row map is [tokens, experts] here: the row of the token's copy for this expert, or -1; the kernels' denser form stays
between them.
"""

import functools

import torch

from tests.gpu.pretended import tag, without_notes

LAUNCHES = (
    "make_row_id_map",
    "permute_with_mask_map",
    "unpermute_with_mask_map",
    "unpermute_with_mask_map_bwd_with_merging_probs",
    "make_chunk_sort_map",
    "sort_chunks_by_map",
)


def launch(function):
    """Given tensors of the device, it leaves some there; inside of custom operators nothing else says where results are."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        given = [item for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor)]
        assert all(item.is_cuda for item in given), f"{function.__name__} was given a tensor of the host"
        with without_notes():
            results = function(*args, **kwargs)
        for item in results if isinstance(results, tuple) else (results,):
            if item is not None:
                tag(item)
        return results

    return call


@launch
def make_row_id_map(routing_map, num_tokens, num_experts):
    """Rows are ordered by expert, then by token."""
    chosen = routing_map.bool().t().reshape(-1)
    place = torch.where(chosen, chosen.cumsum(0) - 1, -1)
    return place.reshape(num_experts, num_tokens).t().contiguous()


def moves(
    row_id_map: torch.Tensor, pad_offsets: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token, expert and row of every copy."""
    token, expert = (row_id_map >= 0).nonzero(as_tuple=True)
    row = row_id_map[token, expert]
    return token, expert, row if pad_offsets is None else row + pad_offsets[expert]


@launch
def permute_with_mask_map(
    inp, row_id_map, probs, scale, pad_offsets, num_tokens, num_experts, num_out_tokens, hidden_size, scale_hidden_dim
):
    assert scale is None and num_out_tokens > 0
    token, expert, row = moves(row_id_map, pad_offsets)
    assert pad_offsets is not None or len(row) == num_out_tokens, (len(row), num_out_tokens)
    output = inp.new_zeros(num_out_tokens, hidden_size).index_copy(0, row, inp[token])
    if probs is None:
        return output, None, None
    return output, None, probs.new_zeros(num_out_tokens).index_copy(0, row, probs[token, expert])


@launch
def unpermute_with_mask_map(
    inp, row_id_map, merging_probs, permuted_probs, pad_offsets, num_tokens, num_experts, hidden_size
):
    token, expert, row = moves(row_id_map, pad_offsets)
    values = inp[row].float()
    if merging_probs is not None:
        values = values * merging_probs[token, expert].float()[:, None]
    output = values.new_zeros(num_tokens, hidden_size).index_add(0, token, values).to(inp.dtype)
    if permuted_probs is None:
        return output, None
    probs = permuted_probs.new_zeros(num_tokens, num_experts)
    return output, probs.index_put((token, expert), permuted_probs[row])


@launch
def unpermute_with_mask_map_bwd_with_merging_probs(
    fwd_output_grad, row_id_map, fwd_input, merging_probs, pad_offsets, num_tokens, num_experts, num_out_tokens, hidden_size
):  # fmt: skip
    token, expert, row = moves(row_id_map, pad_offsets)
    grad = fwd_output_grad[token].float()
    weighted = (grad * merging_probs[token, expert].float()[:, None]).to(fwd_output_grad.dtype)
    products = (grad * fwd_input[row].float()).sum(-1).to(merging_probs.dtype)
    return (
        weighted.new_zeros(num_out_tokens, hidden_size).index_copy(0, row, weighted),
        products.new_zeros(num_tokens, num_experts).index_put((token, expert), products),
    )


@launch
def make_chunk_sort_map(split_sizes, sorted_indices, num_tokens, num_splits):
    """Where each row goes when the chunks are put into the order of `sorted_indices`."""
    chunks = list(torch.arange(num_tokens).split(split_sizes.tolist()))
    order = torch.cat([chunks[index] for index in sorted_indices.tolist()])
    return torch.empty_like(order).index_copy(0, order, torch.arange(num_tokens))


@launch
def sort_chunks_by_map(inp, row_id_map, probs, num_tokens, hidden_size, is_forward):

    def moved(tensor):
        return torch.empty_like(tensor).index_copy(0, row_id_map, tensor) if is_forward else tensor[row_id_map]

    return moved(inp), None if probs is None else moved(probs)
