"""The data sets: that they are there, that their first rows can be trained on, and how long rows may be."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from megatron_moellava.backbones import Backbone
from megatron_moellava.config import MoELlavaError, RunConfig, Source
from megatron_moellava.data.sample import BadSample, parse_record, read_rows

ROWS_LOOKED_AT = 100


def data_problems(run: RunConfig) -> Iterator[str]:
    """Of `data.sources`, from their first rows: an epoch may still meet a bad one later."""
    if not run.data.sources:
        yield "data.sources is empty; pass --data FILE.json (and --image-folder DIR)"
    for index, source in enumerate(run.data.sources):
        where = f"data.sources[{index}]"
        if not 0 < source.weight < float("inf"):
            yield f"{where}.weight={source.weight} must be positive; leave a source out that is not to be read"
        if source.image_folder and not Path(source.image_folder).is_dir():
            yield f"{where}.image_folder={source.image_folder} is not a folder; pass --image-folder DIR"
        elif not Path(source.path).exists():
            yield f"{where}.path={source.path} does not exist; docs/data.md says which files can be read"
        elif Path(source.path).is_dir():
            yield from _shards(f"{where}.path={source.path}", Path(source.path))
        else:
            yield from _rows(f"{where}.path={source.path}", source, run)


def _shards(where: str, path: Path) -> Iterator[str]:
    if not any((path / ".nv-meta" / name).exists() for name in (".info.json", ".info.yaml")):
        yield f"{where} is a folder without Energon's .nv-meta; make shards with tools/prepare_data.py"


def _rows(where: str, source: Source, run: RunConfig) -> Iterator[str]:
    """A file that is no data at all, and bad rows where none is tolerated or where there is nothing else."""
    count, bad = 0, []
    try:
        for number, record in islice(read_rows(source.path), ROWS_LOOKED_AT):
            count += 1
            bad += _bad_row(f"{Path(source.path).name} row {number}", record, source, run.data.max_images)
    except MoELlavaError as error:
        yield f"{where}: {error}"
        return
    except (OSError, UnicodeDecodeError) as error:
        yield f"{where} cannot be read ({error}); give a LLaVA JSON or JSONL file"
        return
    if count == 0:
        yield f"{where} holds no rows; give a LLaVA JSON or JSONL file with some"
    elif bad and (len(bad) == count or not run.data.max_skip_share):
        more = f", and {len(bad) - 1} more of the first {count} rows are bad" if len(bad) > 1 else ""
        yield f"{where}: {bad[0]}{more}; repair or remove such rows, or allow a share of them: data.max_skip_share"


def _bad_row(origin: str, record: dict | BadSample, source: Source, max_images: int) -> list[str]:
    """What is wrong with a row, if anything."""
    if isinstance(record, BadSample):
        return [str(record)]
    try:
        sample = parse_record(record, origin=origin, max_images=max_images)
    except BadSample as error:
        return [str(error)]
    for image in sample.images:
        path = os.path.join(source.image_folder, image.name)
        if image.data is None and not image.name.startswith("data:") and not os.path.exists(path):
            return [f"{origin}: image {path} does not exist"]
    return []


def length_problems(run: RunConfig, backbone: Backbone) -> Iterator[str]:
    """No sample may be longer than the backbone's context. A packed row may: positions restart in every sample."""
    data, context = run.data, backbone.context_length
    window = context < backbone.max_position_embeddings
    limit = f"{'sliding_window' if window else 'max_position_embeddings'}={context} ({backbone.name})"
    if data.max_sample_length is None and not data.packing and data.seq_length > context:
        yield f"data.seq_length={data.seq_length} is more than {limit}; use at most {context}, or set data.packing=true"
    if data.max_sample_length is not None and data.max_sample_length > min(context, data.seq_length):
        yield (
            f"data.max_sample_length={data.max_sample_length} must be at most {limit} and data.seq_length="
            f"{data.seq_length}; use {min(context, data.seq_length)} or leave it unset"
        )
