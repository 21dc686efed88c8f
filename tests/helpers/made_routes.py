"""Choices of imagined tokens, for the tests of the report: any number of layers, experts and choices."""

import numpy as np

from megatron_moellava.analysis.routing import Picture, Routes
from megatron_moellava.analysis.similarity import Similarity


def routes(
    layers: int = 3, experts: int = 4, topk: int = 2, tokens: int = 600, question: str = "what is it?"
) -> Routes:
    draw = np.random.default_rng(0)
    choices_TLK = draw.permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=2)[:, :, :topk].astype(np.int16)
    is_image_T = np.arange(tokens) % 3 > 0
    numbers = tuple(2 * layer for layer in range(layers))
    counts_LME = np.zeros((2 * layers, 2, experts), dtype=np.int64)
    for index, layer in enumerate(numbers):
        for modality, chosen_T in enumerate((~is_image_T, is_image_T)):
            counts_LME[layer, modality] = np.bincount(choices_TLK[chosen_T, index].ravel(), minlength=experts)
    record_layers = [_layer(layer, counts_LME[layer], topk) for layer in numbers]
    picture = Picture("one", question, draw.integers(0, 255, (72, 72, 3), dtype=np.uint8), choices_TLK[:36, :, 0].T)
    return Routes(
        layers=numbers,
        num_experts=experts,
        topk=topk,
        choices_TLK=choices_TLK,
        modality_T=is_image_T.astype(np.int64),
        record={"num_experts": experts, "topk": topk, "layers": record_layers},
        counts_LME=counts_LME,
        pictures=(picture,),
        num_samples=10,
        skipped=(),
    )


def _layer(layer: int, counts_ME: np.ndarray, topk: int) -> dict:
    def numbers(counts_E: np.ndarray) -> dict:
        shares = counts_E / counts_E.sum()
        return {
            "tokens": int(counts_E.sum()) // topk,
            "choices": counts_E.tolist(),
            "dropped": [0] * len(counts_E),
            "entropy": 0.6,
            "top1": 0.5,
            "top2": 0.2,
            "max_load": float(shares.max() * len(counts_E)),
            "balance": 1.1,
        }

    groups = {"text": numbers(counts_ME[0]), "image": numbers(counts_ME[1]), "type:color": numbers(counts_ME[0])}
    return {"layer": layer, **numbers(counts_ME.sum(axis=0)), "groups": groups}


def similarity(layers: int = 3, experts: int = 4) -> Similarity:
    draw = np.random.default_rng(1)
    between = draw.random((layers, experts, experts))
    between = between + between.transpose(0, 2, 1)
    cosine = draw.uniform(-1, 1, (layers, experts, experts))
    return Similarity(tuple(range(0, 2 * layers, 2)), "stage2", draw.random((layers, experts)), between, cosine)
