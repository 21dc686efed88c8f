"""Sample numbers -> records -> tokens -> pixels -> Batch. Runs in the loader's worker processes.

A bad sample is an event that travels to the main process with its batch; there it meets `data.max_skip_share`.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_moellava.data import media
from megatron_moellava.data.batch import Batch, pack, pad, to_wire
from megatron_moellava.data.encode import IGNORE_INDEX, EncodedSample
from megatron_moellava.data.encoder import Encoder
from megatron_moellava.data.images import FIRST_FRAME
from megatron_moellava.data.pair_rows import parse_pair
from megatron_moellava.data.pairs import EncodedPair, pack_pairs, pair_of
from megatron_moellava.data.regions import CUT
from megatron_moellava.data.sample import BadSample, parse_record
from megatron_moellava.data.sources import Reader
from megatron_moellava.data.teacher_logits import Taught, TeacherLogits

ADVICE = {
    "truncated": "cut at {cut} of {length} tokens; shorten the row, or raise data.max_sample_length",
    "tokenization mismatch, sample masked": "the original's label algorithm fails here and nothing of it is trained; "
    "use data.label_mode=spans",
    "leading answer dropped": "it begins with an answer, which is dropped; begin with a human turn",
    "empty answer among others": "an answer is empty and not trained; fill it or remove the turn",
    "question without an answer": "it ends with a question, which is read and not trained; add its answer or remove it",
    "`<image>` without a picture": "it has no picture, so `<image>` is text; name the picture in `image` if there is one",
    "placeholder of a modality without a picture": "it has no picture, so the placeholder is text; name the picture",
    "alpha dropped": "transparency is dropped; paste the image onto the background it should have",
    "12-bit image scaled": "12-bit levels are scaled to 8 bits (divided by 16); store it with 8 bits to control how",
    "16-bit image scaled": "16-bit levels are scaled to 8 bits (divided by 256); store it with 8 bits to control how",
    "32-bit image scaled": "32-bit levels are scaled to 8 bits (divided by 2^24, signed ones by 2^23); store it with 8",
    "float levels clipped": "float levels are taken as 0 to 255 and clipped, as in Pillow; store it with 8 bits",
    FIRST_FRAME: "only its first frame is used; name it in `video` to use several",
    "LAB colours converted": "LAB becomes sRGB; store it as RGB to control how",
    "YCbCr colours converted": "YCbCr becomes RGB as in Pillow; store it as RGB to control how",
    "HSV colours converted": "HSV becomes RGB as in Pillow; store it as RGB to control how",
    "EXIF rotation applied": "it is turned as its EXIF data ask; the original ignores them",
    "CMYK colours converted": "CMYK becomes RGB as in Pillow; store it as RGB to control how",
    "palette colours converted": "palette colours become RGB; store it as RGB",
    CUT: "a box reaches over the edge of what the tower sees of the picture, and is cut there; correct it",
    "image of one pixel": "an image of a single pixel is used as it is; is it a placeholder?",
}


@dataclass(kw_only=True, slots=True)
class Events:
    """What happened to the samples of one micro-batch."""

    seen: int = 0
    skipped: list[tuple[str, str, int]] = field(default_factory=list)  # (reason, message, sample number)
    notes: list[tuple[str, str]] = field(default_factory=list)  # (kind, message): used all the same


class Pipeline:
    """A torch data set whose items are micro-batches. `measured[n]`: tokens of sample n that its row counts on, or None.

    `pairs`: the rows are pairs of answers; `reference_R2[n]`: the log-probabilities of those of row n, -inf where there are
    none, or None before they are known. `teacher`: what a teacher says of each row's labels, or None without one.
    """

    def __init__(self, reader: Reader, encoder: Encoder, tower, data, *, pad_multiple: int, measured=None, pairs=False):
        self.reader, self.encoder, self.tower, self.data = reader, encoder, tower, data
        self.pad_multiple, self.measured, self.pairs = pad_multiple, measured, pairs
        self.reference_R2: np.ndarray | None = None
        self.teacher: TeacherLogits | None = None
        self.pixel_shape = tower.pixel_shape
        self.apart = tuple(item.name for item in data.modalities if item.is_apart)

    def __getitem__(self, numbers: list[int]) -> dict:
        """{"batch": Batch or None if no sample can be used, "events"}"""
        events = Events(seen=len(numbers))
        made = [(number, *sample) for number in numbers if (sample := self._sample(number, events)) is not None]
        encoded, pixels = [sample for _, sample, *_ in made], [pixels for _, _, found, _ in made for pixels in found]
        batch = self._batch(encoded, pixels, [number for number, *_ in made])
        if batch is not None:
            batch = replace(batch, rows=[number for number, *_ in made], **_of_teacher([taught for *_, taught in made]))
        return {"batch": batch and to_wire(batch), "events": events}

    def encode(self, number: int) -> tuple[EncodedSample | EncodedPair, str, str]:
        """(tokens and labels, image folder, origin). Raises BadSample."""
        record, origin, folder, members = self.reader.read(number)
        limits: dict = {"max_images": self.data.max_images, "ignore_keys": self.data.ignore_keys}
        limits["modalities"] = self.data.modalities
        limits["frames"] = partial(media.frame_texts, folder=folder, where=origin, data=self.data)
        if self.pairs:
            pair = [self.reader.with_members(one, members) for one in parse_pair(record, origin=origin, **limits)]
            pair = [media.write_regions(one, folder, self.tower, self.data) for one in pair]
            whole = replace(self.encoder, long_samples="skip")  # cut answers would be compared by what is left of them
            made = [media.encoded(whole, one, folder, origin, self.tower, self.data) for one in pair]
            return pair_of(*made, origin=origin, seq_length=self.data.seq_length), folder, origin
        parsed = self.reader.with_members(parse_record(record, origin=origin, **limits), members)
        parsed = media.write_regions(parsed, folder, self.tower, self.data)
        return media.encoded(self.encoder, parsed, folder, origin, self.tower, self.data), folder, origin

    def _sample(
        self, number: int, events: Events
    ) -> tuple[EncodedSample | EncodedPair, list[np.ndarray], Taught | None] | None:
        try:
            encoded, folder, origin = self.encode(number)
            if self.reference_R2 is not None and not np.isfinite(self.reference_R2[number]).all():
                raise BadSample(
                    "no reference",
                    f"{origin}: could not be read when the reference's log-probabilities were computed; remove their file "
                    "(preference.log_probs) to compute them again",
                )
            if self.measured is not None and len(encoded) != self.measured[number]:
                raise BadSample(
                    "changed during the run",
                    f"{origin}: {len(encoded)} tokens, but {self.measured[number]} when the run began; start it again",
                )
            taught = self._taught(number, encoded, origin)
            read = encoded.chosen if isinstance(encoded, EncodedPair) else encoded  # a pair shares pictures and notes
            decoded = media.pixels_of(read, folder, origin, self.tower, self.data)
        except BadSample as error:
            events.skipped.append((error.reason, str(error), number))
            return None
        for note in read.notes:
            events.notes.append((note, f"{origin}: {ADVICE[note].format(cut=len(read), length=read.length)}"))
        for ref, (_, notes) in zip(read.images, decoded, strict=True):
            events.notes += [(note, f"{origin}, {ref.key} {ref.name[:80]!r}: {ADVICE[note]}") for note in notes]
        return encoded, [pixels for pixels, _ in decoded], taught

    def _taught(self, number: int, encoded: EncodedSample | EncodedPair, origin: str) -> Taught | None:
        if self.teacher is None:
            return None
        assert isinstance(encoded, EncodedSample), "pairs have a reference, and no teacher"
        return self.teacher.read(number, encoded.labels_S[encoded.labels_S != IGNORE_INDEX], origin)

    def _batch(self, encoded: list, pixels: list[np.ndarray], numbers: list[int]) -> Batch | None:
        if not encoded:
            return None
        if self.pairs:
            return pack_pairs(
                encoded,
                numbers,
                pixels,
                self.reference_R2,
                seq_length=self.data.seq_length,
                pad_id=self.encoder.tokenizer.pad_id,
                shape=self.pixel_shape,
                apart=self.apart,
            )
        pad_id = self.encoder.tokenizer.pad_id
        if self.data.packing:
            return pack(encoded, pixels, self.data.seq_length, pad_id, self.pixel_shape, self.apart)
        return pad(encoded, pixels, self.pad_multiple, pad_id, self.pixel_shape, self.apart)


def _of_teacher(taught: list) -> dict[str, Any]:
    """Fields of the batch whose samples' labels these are of."""
    if not taught or taught[0] is None:
        return {}
    ids, log_probs = (torch.from_numpy(np.concatenate(part)) for part in zip(*taught, strict=True))
    return {"teacher_ids_TK": ids, "teacher_log_probs_TC": log_probs}
