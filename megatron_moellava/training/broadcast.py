"""One process of each model-parallel group reads a batch; the others receive it here."""

import dataclasses
from typing import Any

from megatron_moellava import parallel
from megatron_moellava.data.batch import Batch

_PIXELS = "pixel_values_NCHW"  # only the first pipeline stage looks at images
_APART = "apart"  # likewise, of modalities, by their names
_META = (
    "cu_seqlens",
    "max_seqlen",
    "sample_ids",
    "tags",
    "grids",
    "pairs",
    "rows",
    "pools",
    "pictures",
    "counts",
)  # stays on the host, which asks for lengths


def broadcast_batch(batch: Batch | None) -> Batch:
    """The reading process passes its batch, the others None; all return it on their device (pixels: first
    stage only; `cu_seqlens`: on the host)."""
    tensors: dict | None = None
    meta: Any = None
    pixels: dict | None = None
    if batch is not None:
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        meta = {name: fields.pop(name) for name in _META}
        pixels = {_PIXELS: fields.pop(_PIXELS), **fields.pop(_APART)}
        tensors = fields
    tensors, meta = parallel.broadcast_from_reader(tensors, meta)
    first_stage = parallel.is_first_stage()
    pixels = parallel.broadcast_on_first_stage(pixels) if first_stage else {_PIXELS: None}
    return Batch(**tensors, **meta, **{_PIXELS: pixels.pop(_PIXELS), _APART: pixels})
