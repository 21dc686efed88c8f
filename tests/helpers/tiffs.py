"""TIFF files of kinds that Pillow reads and cannot write."""

import struct

import numpy as np


def twelve_bits(levels: np.ndarray) -> bytes:
    """A TIFF of 12-bit greys, which Pillow reads and cannot write."""
    high, low = levels.astype(np.uint16).reshape(-1, 2).T
    packed = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], axis=1).astype(np.uint8)
    return raw_tiff(packed.tobytes(), levels.shape, 12, 1)


def raw_tiff(data: bytes, shape: tuple[int, int], bits: int, photometric: int) -> bytes:
    """`photometric`: 0, white is zero; 1, black is zero."""
    height, width = shape
    entries = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: height,
        279: len(data),
    }
    table = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in entries.items()
    )
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(entries)) + table + bytes(4)
