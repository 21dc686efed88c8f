"""Distributed checkpoints without arbitrary unpickling.

torch reads `.metadata`, and every object that is not a tensor, with a plain `pickle.load`: a checkpoint from somewhere
else could run any code. `guard` puts readers in place that know the few classes such a file needs and refuse the rest.
"""

import functools
import pickle
from types import SimpleNamespace
from typing import Any, BinaryIO

from megatron_moellava.config import CheckpointError

ALLOWED = {  # what torch and Megatron-Core write into .metadata: records of names, shapes and places
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}


class RestrictedUnpickler(pickle.Unpickler):
    """Rebuilds the classes of ALLOWED and torch's dtypes; CheckpointError for any other name."""

    def find_class(self, module: str, name: str) -> Any:
        """The class `name` of `module`; CheckpointError unless it is allowed."""
        import torch

        if name in ALLOWED.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise CheckpointError(
            f".metadata of a checkpoint asks for {module}.{name}, which no checkpoint needs: it is damaged or was made to "
            "run code here; do not load it"
        )


def restricted_load(file: BinaryIO) -> Any:
    """`pickle.load` of a checkpoint's `.metadata`. CheckpointError when it is damaged or asks for other than data."""
    try:
        return RestrictedUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f".metadata of a checkpoint is damaged ({error}); restore the checkpoint") from None


@functools.cache
def guard() -> None:
    """Make every reader of distributed checkpoints in this process a careful one.

    Raises CheckpointError for more than plain data.
    """
    import torch
    from torch.distributed.checkpoint import default_planner, filesystem

    def load_bytes(self, read_item, value) -> None:
        name = read_item.dest_index.fqn
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{name} of a checkpoint is more than plain data, do not load it: {error}") from None
        if self.flatten_state_dict:
            default_planner.set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded

    filesystem.pickle = SimpleNamespace(load=restricted_load, dump=pickle.dump)  # type: ignore[assignment]
    default_planner.DefaultLoadPlanner.load_bytes = load_bytes  # type: ignore[method-assign]
