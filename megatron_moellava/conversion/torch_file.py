"""The file format of `torch.save`, so far as one tensor needs it: a zip archive whose records are stored, not packed.

Megatron's sharded checkpoints are such archives one after the other. Writing the frame here and streaming the bytes
into it keeps memory flat and is three times as fast as `torch.save` on a tensor in memory; `torch.load` reads the
result.
"""

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from zipfile import BadZipFile, ZipFile

from megatron_moellava.config import CheckpointError
from megatron_moellava.mapping import Shape

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "bfloat16": "BFloat16Storage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
ALIGNMENT = 64  # of a record's bytes, as torch aligns them
MAX_BYTES = (1 << 32) - (1 << 20)  # a plain zip archive ends at 4 GiB
LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"


class _Tensor:
    """Pickles as the call that rebuilds a contiguous tensor over storage "0"."""

    def __init__(self, shape: Shape, dtype: str) -> None:
        self.shape, self.dtype = shape, dtype

    def __reduce__(self):
        import torch

        strides = [1]
        for size in reversed(self.shape[1:]):
            strides.insert(0, strides[0] * size)
        # Annotated, not OrderedDict[str, object](): that instance would keep, and pickle, its parameters.
        hooks: OrderedDict[str, object] = OrderedDict()
        arguments = (_Storage(), 0, tuple(self.shape), tuple(strides[: len(self.shape)]), False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments


class _Storage:
    pass


def _pickled(shape: Shape, dtype: str, numel: int) -> bytes:
    import torch

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, _Storage):
                return ("storage", getattr(torch, STORAGES[dtype]), "0", "cpu", numel)
            return None

    out = io.BytesIO()
    Pickler(out, protocol=2).dump(_Tensor(shape, dtype))
    return out.getvalue()


def frame(shape: Shape, dtype: str, numel: int, nbytes: int) -> tuple[bytes, bytes]:
    """What stands before and after the tensor's bytes. The data's checksum is left 0: torch does not look at it."""
    assert nbytes < MAX_BYTES
    records = [
        ("data.pkl", _pickled(shape, dtype, numel)),
        ("byteorder", b"little"),
        ("data/0", None),
        ("version", b"3\n"),
    ]
    offset, parts, central = 0, [bytearray(), bytearray()], bytearray()
    for name, content in records:
        size, checksum = (nbytes, 0) if content is None else (len(content), zlib.crc32(content))
        path = f"archive/{name}".encode()
        padding = -(offset + 30 + len(path) + 4) % ALIGNMENT
        extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        fields = struct.pack("<HHHHHIII", 20, 0, 0, 0, 0x21, checksum, size, size)
        header = LOCAL + fields + struct.pack("<HH", len(path), len(extra)) + path + extra
        central += CENTRAL + struct.pack("<H", 20) + fields
        central += struct.pack("<HHHHHII", len(path), 0, 0, 0, 0, 0, offset) + path
        parts[int(name == "version")] += header + (content or b"")
        offset += len(header) + size
    end = END + struct.pack("<HHHHIIH", 0, 0, len(records), len(records), len(central), offset, 0)
    return bytes(parts[0]), bytes(parts[1] + central + end)


def data_offset(stream: io.IOBase, nbytes: int, where: str) -> int:
    """Where in an archive (from its own beginning) the bytes of its only tensor begin.

    Raises CheckpointError for an archive that is damaged or holds another number of bytes.
    """
    try:
        with ZipFile(stream) as archive:
            records = [item for item in archive.infolist() if "/data/" in item.filename]
    except BadZipFile:
        raise CheckpointError(f"{where} is damaged: not an archive of torch.save; copy the file again") from None
    if len(records) != 1 or records[0].file_size != nbytes:
        raise CheckpointError(f"{where} holds {[item.file_size for item in records]} bytes, expected one of {nbytes}")
    return record_offset(stream, records[0].header_offset)


def record_offset(stream: io.IOBase, header_offset: int) -> int:
    """Where a record's bytes begin: its header has two fields of variable length."""
    stream.seek(header_offset)
    header = stream.read(30)
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return header_offset + 30 + name_length + extra_length


class Window(io.RawIOBase):
    """The bytes [offset, offset + length) of an open file, as a file of its own."""

    def __init__(self, stream: io.IOBase, offset: int, length: int) -> None:
        self._stream, self._offset, self._length, self._position = stream, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = 0) -> int:
        self._position = position + (0, self._position, self._length)[whence]
        return self._position

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._length - self._position)
        self._stream.seek(self._offset + self._position)
        content = self._stream.read(left if count < 0 else min(count, left))
        self._position += len(content)
        return content
