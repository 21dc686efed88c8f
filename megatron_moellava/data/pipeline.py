"""Sample numbers -> records -> tokens -> pixels -> Batch. Runs in the loader's worker processes.

A bad sample is an event that travels to the main process with its batch; there it meets `data.max_skip_share`.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np

from megatron_moellava.data import media
from megatron_moellava.data.batch import Batch, pack, pad, to_wire
from megatron_moellava.data.encode import EncodedSample
from megatron_moellava.data.encoder import Encoder
from megatron_moellava.data.images import FIRST_FRAME
from megatron_moellava.data.regions import CUT
from megatron_moellava.data.sample import BadSample, parse_record
from megatron_moellava.data.sources import Reader

ADVICE = {
    "truncated": "cut at {cut} of {length} tokens; shorten the row, or raise data.max_sample_length",
    "tokenization mismatch, sample masked": "the original's label algorithm fails here and nothing of it is trained; "
    "use data.label_mode=spans",
    "leading answer dropped": "it begins with an answer, which is dropped; begin with a human turn",
    "empty answer among others": "an answer is empty and not trained; fill it or remove the turn",
    "question without an answer": "it ends with a question, which is read and not trained; add its answer or remove it",
    "`<image>` without a picture": "it has no picture, so `<image>` is text; name the picture in `image` if there is one",
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
    """A torch data set whose items are micro-batches. `measured[n]`: tokens of sample n that its row counts on, or None."""

    def __init__(self, reader: Reader, encoder: Encoder, tower, data, *, pad_multiple: int, measured=None):
        self.reader, self.encoder, self.tower, self.data = reader, encoder, tower, data
        self.pad_multiple, self.measured = pad_multiple, measured
        self.pixel_shape = tower.pixel_shape

    def __getitem__(self, numbers: list[int]) -> dict:
        """{"batch": Batch or None if no sample can be used, "events"}"""
        events = Events(seen=len(numbers))
        made = [sample for number in numbers if (sample := self._sample(number, events)) is not None]
        batch = self._batch([encoded for encoded, _ in made], [pixels for _, found in made for pixels in found])
        return {"batch": batch and to_wire(batch), "events": events}

    def encode(self, number: int) -> tuple[EncodedSample, str, str]:
        """(tokens and labels, image folder, origin). Raises BadSample."""
        record, origin, folder, members = self.reader.read(number)
        limits: dict = {"max_images": self.data.max_images, "ignore_keys": self.data.ignore_keys}
        limits["frames"] = partial(media.frame_texts, folder=folder, where=origin, data=self.data)
        parsed = self.reader.with_members(parse_record(record, origin=origin, **limits), members)
        parsed = media.write_regions(parsed, folder, self.tower, self.data)
        return media.encoded(self.encoder, parsed, folder, origin, self.tower, self.data), folder, origin

    def _sample(self, number: int, events: Events) -> tuple[EncodedSample, list[np.ndarray]] | None:
        try:
            encoded, folder, origin = self.encode(number)
            if self.measured is not None and len(encoded) != self.measured[number]:
                raise BadSample(
                    "changed during the run",
                    f"{origin}: {len(encoded)} tokens, but {self.measured[number]} when the run began; start it again",
                )
            decoded = media.pixels_of(encoded, folder, origin, self.tower, self.data)
        except BadSample as error:
            events.skipped.append((error.reason, str(error), number))
            return None
        for note in encoded.notes:
            events.notes.append((note, f"{origin}: {ADVICE[note].format(cut=len(encoded), length=encoded.length)}"))
        for ref, (_, notes) in zip(encoded.images, decoded, strict=True):
            events.notes += [(note, f"{origin}, image {ref.name[:80]!r}: {ADVICE[note]}") for note in notes]
        return encoded, [pixels for pixels, _ in decoded]

    def _batch(self, encoded: list[EncodedSample], pixels: list[np.ndarray]) -> Batch | None:
        if not encoded:
            return None
        if self.data.packing:
            return pack(encoded, pixels, self.data.seq_length, self.encoder.tokenizer.pad_id, self.pixel_shape)
        return pad(encoded, pixels, self.pad_multiple, self.encoder.tokenizer.pad_id, self.pixel_shape)
