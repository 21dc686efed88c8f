"""A batch as the arguments of the model."""

from megatron_moellava.data.batch import Batch


def model_inputs(batch: Batch) -> dict:
    """The arguments of `MoELlava.forward` for a batch."""
    return {
        "tokens_BS": batch.tokens_BS,
        "position_ids_BS": batch.position_ids_BS,
        "labels_BS": batch.labels_BS,
        "padding_mask_BS": batch.padding_mask_BS,
        "pixels_NCHW": batch.pixel_values_NCHW,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
        "image_rows": batch.counts.image_rows,
        "grids": batch.grids,
        "shows_R": batch.shows_R,
        "pools": batch.pools,
        "apart": batch.apart,
    }
