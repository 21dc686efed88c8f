"""Whether a run can begin with a source, from its first rows: no index, no Energon, nothing that takes long to import."""

import contextlib
import os
from pathlib import Path

import yaml

from megatron_moellava.config import DataError
from megatron_moellava.data import media, quantities
from megatron_moellava.data.pair_rows import parse_pair
from megatron_moellava.data.rows import HELP, read_rows
from megatron_moellava.data.sample import IMAGE_PLACEHOLDER, BadSample, Sample, parse_record

FIRST_ROWS = 20  # that are looked at


def first_rows_problem(source, data, num_features: int = 0, pairs: bool = False) -> str | None:
    """Why no run can begin with a source (`data`: DataConfig); None if it can, whatever later rows hold.

    `num_features`: tokens of an image. `pairs`: its rows are pairs of answers.
    """
    path = Path(source.path).expanduser()
    try:
        if path.is_dir():
            return None if sum(shard_counts(path).values()) else f"data.sources.path={path} holds no rows"
        bad, count = None, 0
        with contextlib.closing(read_rows(path)) as rows:
            for number, record in rows:
                count += 1
                bad = _bad_row(record, f"{path.name} row {number}", source, data, num_features, pairs)
                is_decided = bad is None if data.max_skip_share else bad is not None
                if is_decided or count == FIRST_ROWS:
                    break
    except (DataError, OSError, UnicodeDecodeError) as error:
        return str(error) if isinstance(error, DataError) else f"data.sources.path={path} cannot be read ({error})"
    return bad if count else f"data.sources.path={path} holds no rows; {HELP}"


def _bad_row(record: dict | BadSample, origin: str, source, data, num_features: int, pairs: bool) -> str | None:
    """What is wrong with a row: of its text, that its pictures are not there, or that they leave no room for an answer."""
    try:
        if isinstance(record, BadSample):
            raise record
        limits = {"origin": origin, "max_images": data.max_images, "ignore_keys": data.ignore_keys}
        limits["modalities"] = data.modalities
        # With a rate their number depends on the video, which is not opened here.
        limits["frames"] = lambda name: [IMAGE_PLACEHOLDER] * (1 if data.video_fps else data.video_frames)
        sample = parse_pair(record, **limits)[0] if pairs else parse_record(record, **limits)
        folder = os.path.expanduser(source.image_folder) or str(Path(source.path).expanduser().parent)
        by_text = data.length_counts == "text"
        limit = data.seq_length if by_text else min(data.seq_length, data.max_sample_length or data.seq_length)
        if sample.images and num_features >= limit and _answers_follow(sample):
            return (
                f"{origin}: an image is {num_features} tokens, which leaves nothing to learn of the {limit} of a sample; raise "
                "data.seq_length and data.max_sample_length"
            )
        for image in sample.images:
            found = media.source(image, folder, origin, data.trust_paths)
            if isinstance(found, str) and not os.path.exists(found):
                return f"{origin}: image {found} does not exist; pass --image-folder DIR, or correct the row"
            if image.modality is not None:
                quantities.check_picture(found, image.modality, f"{origin}, {image.modality.name} {image.name[:80]!r}")
    except BadSample as error:
        return str(error)
    return None


def _answers_follow(sample: Sample) -> bool:
    """Whether there is no answer before the first picture: what follows one that is cut away goes with it."""
    first = next(turn for turn in sample.turns if turn.role == "assistant" or IMAGE_PLACEHOLDER in turn.text)
    return first.role == "user"


def shard_counts(path: Path) -> dict[str, int]:
    """Rows of each WebDataset shard, as Energon's .nv-meta says. DataError for a folder without."""
    found = [path / ".nv-meta" / name for name in (".info.json", ".info.yaml")]
    info = next((file for file in found if file.exists()), None)
    if info is None:
        raise DataError(f"data.sources.path={path} is a folder without Energon's .nv-meta; {_folder_advice(path)}")
    try:
        return dict(yaml.safe_load(info.read_text())["shard_counts"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{info} is damaged ({type(error).__name__}: {error}); run `energon prepare` again") from None


def _folder_advice(path: Path) -> str:
    for pattern in ("*.parquet", "*.jsonl", "*.json", "*.jsonl.gz", "*.json.gz"):
        if files := sorted(path.glob(pattern)):
            return f"name its files as sources, such as {files[0]}"
    return "make shards with moellava prepare-data, or run `energon prepare` on existing ones"
