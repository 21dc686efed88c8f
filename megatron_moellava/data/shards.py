"""LLaVA JSON + images -> Energon WebDataset shards, in parallel, resumable and verified.

A shard is written beside its place and renamed when it is whole; its report comes last. A shard with a report is written
again only where it would become another one: rows of it were bad, or a picture's file has changed. Images keep their
bytes (base64 is decoded, video frames become PNG) and are decoded once, so that nothing undecodable gets in. Rows are in
random order across shards.
"""

import hashlib
import io
import itertools
import json
import multiprocessing
import shutil
import tarfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from megatron_moellava.config import DataConfig, DataError, Modality
from megatron_moellava.data import images, media
from megatron_moellava.data.index import Index, index_json
from megatron_moellava.data.placeholders import with_placeholders
from megatron_moellava.data.regions import region_fields
from megatron_moellava.data.sample import BadSample, ImageRef, Sample, frame_counts, parse_record

TYPES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
ROLES = {"user": "human", "assistant": "gpt"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that decides what the shards hold; the worker processes get a copy."""

    source: str
    image_folder: str
    out: str
    rows_per_shard: int
    max_images: int
    video_frames: int
    video_fps: float
    video_times: Literal["none", "seconds"]
    video_pooling: Literal["none", "2x2", "2x2x2"]
    max_skip_share: float
    ignore_keys: tuple[str, ...]
    trust_paths: bool
    modalities: tuple[Modality, ...]
    fingerprint: str

    @property
    def data(self) -> DataConfig:
        """What decides which frames of a video are kept, and what the text says of them."""
        return DataConfig(
            video_frames=self.video_frames,
            video_fps=self.video_fps,
            video_times=self.video_times,
            video_pooling=self.video_pooling,
            trust_paths=self.trust_paths,
        )

    def shard(self, number: int) -> Path:
        """The file of shard `number`."""
        return Path(self.out) / f"shard-{number:06}.tar"

    def report(self, number: int) -> Path:
        """The file whose existence says that shard `number` is complete."""
        return Path(self.out) / "reports" / f"shard-{number:06}.json"


def make_shards(
    source: str | Path,
    image_folder: str | Path,
    out: str | Path,
    *,
    rows_per_shard: int = 1000,
    workers: int = 1,
    max_images: int = 16,
    video_frames: int = 8,
    video_fps: float = 0.0,
    video_times: Literal["none", "seconds"] = "none",
    video_pooling: Literal["none", "2x2", "2x2x2"] = "none",
    max_skip_share: float = 0.0,
    ignore_keys: tuple[str, ...] = (),
    trust_paths: bool = False,
    modalities: tuple[Modality, ...] = (),
) -> dict:
    """Write what is missing; returns (and writes as report.json) what went in and what was skipped, by row.

    The same command gives the same result, however often and from whatever state of `out` it is run.
    """
    source, image_folder, out = (Path(path).expanduser() for path in (source, image_folder, out))
    out.mkdir(parents=True, exist_ok=True)
    index = index_json(source, out / "index")
    plan = Plan(
        source=str(source),
        image_folder=str(image_folder),
        out=str(out),
        rows_per_shard=rows_per_shard,
        max_images=max_images,
        video_frames=video_frames,
        video_fps=video_fps,
        video_times=video_times,
        video_pooling=video_pooling,
        max_skip_share=max_skip_share,
        ignore_keys=ignore_keys,
        trust_paths=trust_paths,
        modalities=modalities,
        fingerprint=index.fingerprint,
    )
    _claim(plan)
    reports = _run(plan, index, workers)
    total = _summary(plan, index, reports)
    _verify(plan, reports)
    _write_energon_index(plan, len(reports), workers)
    (out / "report.json").write_text(json.dumps(total, indent=1))
    shutil.rmtree(out / "index")
    return total


def _claim(plan: Plan) -> None:
    """One folder, one source and layout; else shards of two runs would mix."""
    values: tuple = (plan.fingerprint, plan.rows_per_shard, plan.max_images, plan.video_frames)
    values += (plan.image_folder, plan.ignore_keys, plan.trust_paths)
    shown = (plan.video_fps, plan.video_times, plan.video_pooling)
    values += () if shown == (0, "none", "none") else shown
    values += plan.modalities
    claim, wanted = Path(plan.out) / "reports" / "plan", hashlib.sha256(repr(values).encode()).hexdigest()
    claim.parent.mkdir(exist_ok=True)
    if claim.exists() and claim.read_text() != wanted:
        raise DataError(f"{plan.out} holds shards of another source or with other settings; choose an empty folder")
    claim.write_text(wanted)


def _run(plan: Plan, index: Index, workers: int) -> list[dict]:
    from tqdm import tqdm

    offsets = index.offsets.tolist()
    starts = range(0, index.rows, plan.rows_per_shard)
    missing = [number for number in range(len(starts)) if not _is_done(plan, number)]
    skipped = 0
    done = index.rows - sum(min(plan.rows_per_shard, index.rows - starts[n]) for n in missing)
    bar = tqdm(total=index.rows, initial=done, desc="Writing shards", unit=" rows", mininterval=1)
    with bar, ProcessPoolExecutor(max(1, workers), mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {
            pool.submit(
                _write_shard, plan, n, str(index.path), offsets[starts[n] : starts[n] + plan.rows_per_shard + 1]
            )
            for n in missing
        }
        for job in as_completed(jobs):
            report = job.result()
            skipped += len(report["skipped"])
            bar.update(report["rows"])
            if skipped > plan.max_skip_share * index.rows:
                pool.shutdown(wait=False, cancel_futures=True)
                raise DataError(
                    f"{skipped} of {index.rows} rows are bad, more than --max-skip-share {plan.max_skip_share} allows; "
                    f"for example: {report['skipped'][-1][1]}"
                )
    return [json.loads(plan.report(n).read_text()) for n in range(len(starts))]


def _is_done(plan: Plan, number: int) -> bool:
    """A shard is whole, without a bad row (which may be good by now), and of the picture files that are there."""
    try:
        report = json.loads(plan.report(number).read_text())
        return not report["skipped"] and all(_stamp(name) == stamp for name, stamp in report["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _stamp(file: str) -> list[int]:
    status = Path(file).stat()
    return [status.st_size, status.st_mtime_ns]


def _write_shard(plan: Plan, number: int, rows: str, offsets: list[int]) -> dict:
    report: dict = {
        "rows": len(offsets) - 1,
        "written": 0,
        "images": 0,
        "bytes": 0,
        "skipped": [],
        "notes": [],
        "files": {},
    }
    work = plan.shard(number).with_suffix(".partial")
    with open(rows, "rb") as source, tarfile.open(work, "w") as tar:
        for start, end in itertools.pairwise(offsets):
            source.seek(start)
            line = json.loads(source.read(end - start))
            try:
                record, files, notes, sources = _members(plan, line)
            except BadSample as error:
                report["skipped"].append([error.reason, str(error)])
                continue
            key = f"{line['row']:09}"
            for name, data in ({"json": json.dumps(record).encode()} | files).items():
                _add(tar, f"{key}.{name}", data)
                report["bytes"] += len(data)
            report["written"] += 1
            report["images"] += len(files)
            report["notes"] += notes
            report["files"] |= {name: _stamp(name) for name in sources}
    work.rename(plan.shard(number))
    temporary = plan.report(number).with_suffix(".partial")
    temporary.write_text(json.dumps(report))
    temporary.rename(plan.report(number))
    return report


def _members(plan: Plan, line: dict) -> tuple[dict, dict[str, bytes], list[str], list[str]]:
    """(record with member names, image files by member name, notes, files that were read)"""
    if "bad" in line:
        raise BadSample(*line["bad"])
    origin = f"{line['file']} row {line['row']}"
    limits: dict = {"max_images": plan.max_images, "ignore_keys": plan.ignore_keys, "modalities": plan.modalities}
    limits["frames"] = partial(media.frame_texts, folder=plan.image_folder, where=origin, data=plan.data)
    sample = parse_record(line["record"], origin=origin, **limits)
    files, notes, sources = {}, list(sample.notes), []
    for number, ref in enumerate(sample.images):
        found = media.source(ref, plan.image_folder, f"{origin}, {ref.key} {ref.name[:80]!r}", plan.trust_paths)
        data, kind, seen = _image_file(ref, plan, found, origin)
        files[f"{number}.{kind}"] = data
        notes += seen
        sources += [found] if isinstance(found, str) and Path(found).is_file() else []
    return _record(sample, list(files)), files, notes, sources


def _image_file(ref: ImageRef, plan: Plan, found: bytes | str, origin: str) -> tuple[bytes, str, tuple[str, ...]]:
    if ref.frame is not None:
        buffer = io.BytesIO()
        image, notes = media.open_ref(ref, plan.image_folder, origin, plan.trust_paths)
        image.save(buffer, "PNG")
        return buffer.getvalue(), "png", notes
    row, origin = origin, f"{origin}, {ref.key} {ref.name[:80]!r}"
    try:
        data = found if isinstance(found, bytes) else Path(found).read_bytes()
    except OSError as error:
        raise BadSample("missing image", f"{origin}: {error.strerror}; check --image-folder and the row") from None
    _, notes = media.open_ref(replace(ref, data=data), plan.image_folder, row)
    return data, images.file_type(data, TYPES), notes


def _record(sample: Sample, names: list[str]) -> dict:
    turns = [{"from": "gpt", "value": sample.leading}] if sample.leading else []  # `v0` trains it
    kinds = [ref.modality.name if ref.modality else "image" for ref in sample.images]
    texts = with_placeholders([turn.text for turn in sample.turns], kinds)
    turns += [{"from": ROLES[turn.role], "value": text} for turn, text in zip(sample.turns, texts, strict=True)]
    record = {"id": sample.id, "conversations": turns} | region_fields(sample.regions, sample.box_format)
    record |= {"system": sample.system} if sample.system else {}
    frames = frame_counts(ref.frame for ref in sample.images if ref.modality is None)
    record |= {"frames": frames} if frames else {}
    pictures: dict[str, list[str]] = {}
    for kind, name in zip(kinds, names, strict=True):
        pictures.setdefault(kind, []).append(name)
    return record | pictures | ({"tag": sample.tag} if sample.tag else {})


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def _summary(plan: Plan, index: Index, reports: list[dict]) -> dict:
    skipped = [entry for report in reports for entry in report["skipped"]]
    return {
        "source": plan.source,
        "rows": index.rows,
        "written": sum(report["written"] for report in reports),
        "images": sum(report["images"] for report in reports),
        "bytes": sum(report["bytes"] for report in reports),
        "shards": len(reports),
        "rows_with_duplicate_id": index.duplicates,
        "duplicates_message": index.duplicates_message,
        "skipped": dict(Counter(reason for reason, _ in skipped)),
        "skipped_rows": [message for _, message in skipped],
        "notes": dict(Counter(note for report in reports for note in report["notes"])),
    }


def _verify(plan: Plan, reports: list[dict]) -> None:
    """What is on disk is what was counted."""
    for number, report in enumerate(reports):
        try:
            with tarfile.open(plan.shard(number)) as tar:
                members = tar.getmembers()
        except (OSError, tarfile.TarError) as error:
            members, report = [], report | {"error": str(error)}
        rows = sum(member.name.endswith(".json") for member in members)
        size = sum(member.size for member in members)
        if (rows, size) != (report["written"], report["bytes"]):
            plan.report(number).unlink()
            raise DataError(
                f"{plan.shard(number)} holds {rows} rows and {size:,} bytes where {report['written']} and "
                f"{report['bytes']:,} were written; run the same command again, it will write this shard anew"
            )


def _write_energon_index(plan: Plan, shards: int, workers: int) -> None:
    from megatron.energon.flavors import BaseWebdatasetFactory

    BaseWebdatasetFactory.prepare_dataset(
        plan.out,
        [plan.shard(number).name for number in range(shards)],
        split_parts_ratio=[("train", 1.0)],
        workers=max(1, workers),
    )
    dataset = "__module__: megatron.energon\n__class__: CrudeWebdataset\nsubflavors: {}\n"
    (Path(plan.out) / ".nv-meta" / "dataset.yaml").write_text(dataset)
