"""The data sets: that they are there, that their first rows can be trained on, and how long rows may be."""

from collections.abc import Iterator
from pathlib import Path

from megatron_moellava.backbones import Backbone
from megatron_moellava.config import DataConfig, RunConfig, Source
from megatron_moellava.data.first_rows import first_rows_problem
from megatron_moellava.data.sample import KEYS
from megatron_moellava.stages import PREFERENCE
from megatron_moellava.validation.modalities import modality_problems


def data_problems(run: RunConfig, num_features: int = 0) -> Iterator[str]:
    """Of `data.sources` and `validation.sources`, from their first rows: an epoch may still meet a bad one later.

    `num_features`: of an image.
    """
    data = run.data
    if not data.sources:
        yield "data.sources is empty; pass --data FILE.json (and --image-folder DIR)"
    if data.video_frames > max(data.max_images, DataConfig().video_frames):
        yield (
            f"data.video_frames={data.video_frames} is more than data.max_images={data.max_images}, so every long video would "
            "be a bad row; raise data.max_images"
        )
    if read := sorted({*data.ignore_keys} & {*KEYS}):
        yield f"data.ignore_keys={read} would drop what a row consists of; name other keys"
    if data.sampler == "modality_length" and any(source.weight != 1 for source in data.sources):
        yield "data.sampler=modality_length reads every row once per epoch; set all data.sources.weight to 1"
    if data.sampler == "modality_length" and any(Path(source.path).expanduser().is_dir() for source in data.sources):
        yield "data.sampler=modality_length needs to know all lengths: use LLaVA JSON files, not shards"
    wrong = [*modality_problems(data)]
    yield from wrong
    for index, source in enumerate(data.sources):
        if not 0 < source.weight < float("inf"):
            yield f"data.sources[{index}].weight={source.weight} must be positive; leave a source out that is not to be read"
    if wrong:
        return  # the rows would be read by a record that is wrong
    pairs = run.training.stage == PREFERENCE
    for section, sources, are_pairs in (("data", data.sources, pairs), ("validation", run.validation.sources, False)):
        for index, source in enumerate(sources):
            yield from _source_problems(f"{section}.sources[{index}]", source, data, num_features, are_pairs)


def _source_problems(where: str, source: Source, data: DataConfig, num_features: int, pairs: bool) -> Iterator[str]:
    if source.image_folder and not Path(source.image_folder).expanduser().is_dir():
        yield f"{where}.image_folder={source.image_folder} is not a folder; pass --image-folder DIR"
    elif not Path(source.path).expanduser().exists():
        yield f"{where}.path={source.path} does not exist; docs/reference/data.md says which files can be read"
    elif problem := first_rows_problem(source, data, num_features, pairs):
        yield problem


def length_problems(run: RunConfig, backbone: Backbone) -> Iterator[str]:
    """No sample may be longer than the backbone's context. A packed row may: positions restart in every sample."""
    data, context = run.data, backbone.context_length
    window = context < backbone.max_position_embeddings
    limit = f"{'sliding_window' if window else 'max_position_embeddings'}={context} ({backbone.name})"
    by_text = data.length_counts == "text"  # images grow afterwards, beyond the context as in the original
    if data.max_sample_length is None and not data.packing and not by_text and data.seq_length > context:
        yield f"data.seq_length={data.seq_length} is more than {limit}; use at most {context}, or set data.packing=true"
    if data.max_sample_length is not None and data.max_sample_length > min(context, data.seq_length):
        yield (
            f"data.max_sample_length={data.max_sample_length} must be at most {limit} and data.seq_length="
            f"{data.seq_length}; use {min(context, data.seq_length)} or leave it unset"
        )
