"""The run's Energon task encoder: crude row -> tokens -> selection of a row's samples -> pixels -> Batch.

Images are decoded after the selection, so that the packing buffer holds tokens only and a resume is quick. A bad sample
is a counted event that travels to the main process with the next batch; there it meets `data.max_skip_share`.
"""

import json
import struct
import tarfile
from dataclasses import dataclass, field, replace

from megatron_moellava.config import DataError
from megatron_moellava.data import media
from megatron_moellava.data.batch import Batch, pack, pad, to_wire
from megatron_moellava.data.encode import EncodedSample
from megatron_moellava.data.encoder import Encoder
from megatron_moellava.data.packing import CarryOverPacking, select_rows
from megatron_moellava.data.sample import BadSample, ImageRef, parse_record

from megatron.energon import Cooker, SkipSample, TaskEncoder, stateless
from megatron.energon.flavors.webdataset.sample_loader import WebdatasetSampleLoaderDataset
from megatron.energon.flavors.webdataset.structs import FilteredSample

MEMBER_TYPES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
PATIENCE = 200  # samples from which a share of bad ones is judged
ADVICE = {
    "truncated": "cut at {cut} of {length} tokens; shorten the row, or raise data.max_sample_length",
    "tokenization mismatch, sample masked": "the original's label algorithm fails here and nothing of it is trained; "
    "use data.label_mode=spans",
    "leading answer dropped": "it begins with an answer, which is dropped; begin with a human turn",
    "empty answer among others": "an answer is empty and not trained; fill it or remove the turn",
    "alpha dropped": "transparency is dropped; paste the image onto the background it should have",
    "16-bit image scaled": "16-bit levels are scaled to 8 bits; store it with 8 bits to control how",
    "EXIF rotation applied": "it is turned as its EXIF data ask; the original ignores them",
    "CMYK colours converted": "CMYK becomes RGB as in Pillow; store it as RGB to control how",
    "palette colours converted": "palette colours become RGB; store it as RGB",
    "image of one pixel": "an image of a single pixel is used as it is; is it a placeholder?",
}


@dataclass(kw_only=True, slots=True)
class Events:
    """What happened to samples since the last batch."""

    seen: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (reason, message)
    notes: list[tuple[str, str]] = field(default_factory=list)  # (kind, message): used all the same


@dataclass(kw_only=True, slots=True)
class Work:
    """A sample on its way, with what decoding its images needs."""

    encoded: EncodedSample
    folder: str
    origin: str


class Pipeline(TaskEncoder):
    decoder = None  # crude bytes; Energon's own decoding would hide what is wrong with a sample

    def __init__(self, encoder: Encoder, tower, data, *, folders: list[str], pad_multiple: int):
        self.cookers = [Cooker(self.cook)]
        self.encoder, self.tower, self.data = encoder, tower, data
        self.folders, self.pad_multiple = folders, pad_multiple
        self.pixel_shape = (3, tower.image_size, tower.image_size)
        self.events = Events()
        self.total, self.bad = 0, 0  # of this worker, since it started

    @stateless
    def cook(self, sample: dict) -> dict:
        """Raises SkipSample after counting a bad sample."""
        folder = self.folders[sample["__subflavors__"]["source"]]
        origin = sample["__key__"]
        self.total += 1
        self.events.seen += 1
        try:
            record, origin, members = read_record(sample)
            parsed = parse_record(record, origin=origin, max_images=self.data.max_images)
            parsed = _with_members(parsed, members) if members else parsed
            tiles = [media.num_tiles(ref, folder, origin, self.tower, self.data) for ref in parsed.images]
            encoded = self.encoder(parsed, tuple(count * self.tower.num_features for count in tiles))
        except BadSample as error:
            self.skip(error)
        for note in encoded.notes:
            advice = ADVICE[note].format(cut=len(encoded), length=encoded.length)
            self.events.notes.append((note, f"{origin}: {advice}"))
        work = Work(encoded=encoded, folder=folder, origin=origin)
        return {"__key__": sample["__key__"], "__restore_key__": sample["__restore_key__"], "work": work}

    def skip(self, error: BadSample) -> None:
        self.bad += 1
        allowed = self.data.max_skip_share * max(self.total, PATIENCE)
        if self.bad > allowed:
            limit = f"data.max_skip_share={self.data.max_skip_share}"
            share = f"{self.bad} of {self.total} samples so far are bad, more than {limit} allows; the last: "
            raise DataError(f"{share if self.data.max_skip_share else ''}{error}") from None
        self.events.skipped.append((error.reason, str(error)))
        raise SkipSample from None

    @stateless
    def postencode_sample(self, sample: dict) -> dict:
        work = sample["work"]
        try:
            decoded = [media.tiles(ref, work.folder, work.origin, self.tower, self.data) for ref in work.encoded.images]
        except BadSample as error:
            self.skip(error)
        for ref, (_, notes) in zip(work.encoded.images, decoded, strict=True):
            where = f"{work.origin}, image {ref.name[:80]!r}"
            self.events.notes += [(note, f"{where}: {ADVICE[note]}") for note in notes]
        return sample | {"pixels": [pixels for pixels, _ in decoded]}

    def build_cook_crude_sample(self, dataset, **kwargs):
        for source in find(dataset, WebdatasetSampleLoaderDataset):
            source.join_readers = [GuardedReader(reader) for reader in source.join_readers]
        return super().build_cook_crude_sample(dataset, **kwargs)

    def build_batch(self, dataset, *, packing_buffer_size=None, worker_config, **kwargs):
        if packing_buffer_size is None:
            return super().build_batch(dataset, worker_config=worker_config, **kwargs)
        return CarryOverPacking(
            dataset,
            buffer_size=packing_buffer_size,
            pre_packer=self.select_rows,
            sample_encoder=self.postencode_sample,
            sample_encoder_stateless=True,
            final_packer=self.pack_selected_samples,
            final_packer_stateless=True,
            worker_config=worker_config,
        )

    def select_rows(self, samples: list[dict]) -> tuple[list[list[dict]], list[dict]]:
        rows, rest = select_rows([len(sample["work"].encoded) for sample in samples], self.data.seq_length)
        return [[samples[index] for index in row] for row in rows], [samples[index] for index in rest]

    @stateless
    def pack_selected_samples(self, samples: list[dict]) -> dict:
        if not samples:  # all of them turned out bad
            raise SkipSample
        made = pack(*self.arguments(samples), self.data.seq_length, self.encoder.tokenizer.pad_id, self.pixel_shape)
        return self.deliver(made)

    @stateless
    def batch(self, samples: list[dict]) -> dict:
        made = pad(*self.arguments(samples), self.pad_multiple, self.encoder.tokenizer.pad_id, self.pixel_shape)
        return self.deliver(made)

    def arguments(self, samples: list[dict]):
        encoded = [sample["work"].encoded for sample in samples]
        return encoded, [pixels for sample in samples for pixels in sample["pixels"]]

    def deliver(self, made: Batch | None) -> dict:
        events, self.events = self.events, Events()
        return {"__key__": "", "__restore_key__": (), "batch": made and to_wire(made), "events": events}


class GuardedReader:
    """A tar reader whose failures become bad samples: one damaged spot must not end the run or cost its neighbours."""

    def __init__(self, reader):
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int):
        try:
            return self.reader[index]
        except (ValueError, OSError, EOFError, tarfile.TarError, AssertionError, struct.error) as error:
            message = f"{self.reader}: sample {index} cannot be read ({error}); write the shard again"
            bad = json.dumps({"bad": ["corrupt shard", message]}).encode()
            key = ("Webdataset", index)
            return FilteredSample(__key__=str(index), __shard__="", __restore_key__=key, __sources__=(), json=bad)


def find(dataset, kind):
    """The data sets of a class in a stack of Energon's wrappers."""
    while dataset is not None:
        if isinstance(dataset, kind):
            yield dataset
        dataset = getattr(dataset, "dataset", None)


def read_record(sample: dict) -> tuple[dict, str, dict[str, bytes]]:
    """(record, origin, image members) of a crude sample: a line of an index, or the files of one key in a tar."""
    content = sample.get("json")
    members = {key: value for key, value in sample.items() if key.rpartition(".")[2].lower() in MEMBER_TYPES}
    origin = f"{sample.get('__shard__', '')} sample {sample['__key__']}"
    if content is None:
        raise BadSample("not a record", f"{origin}: no .json member; prepare the shards with tools/prepare_data.py")
    if isinstance(content, bytes):
        try:
            content = json.loads(content.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise BadSample("invalid JSON", f"{origin}: not valid JSON ({error}); write the shard again") from None
    if "bad" in content:
        raise BadSample(*content["bad"])
    if "row" in content and "record" in content:
        return content["record"], f"{content['file']} row {content['row']}", members
    return content, origin, members


def _with_members(sample, members: dict[str, bytes]):
    """Attach the tar's image members: by name where the record names them, else in their order."""
    if len(members) == len(sample.images) and not all(ref.name in members for ref in sample.images):
        members = dict(zip((ref.name for ref in sample.images), (members[key] for key in sorted(members)), strict=True))
    missing = [ref.name for ref in sample.images if ref.name not in members]
    if missing:
        raise BadSample("missing image", f"{sample.origin}: {missing[0]!r} is not in the shard; write the shard again")
    return replace(
        sample, images=tuple(ImageRef(name=r.name, data=members[r.name], frame=r.frame) for r in sample.images)
    )
