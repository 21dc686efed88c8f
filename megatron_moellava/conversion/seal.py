"""Digests for a checkpoint that an older version wrote without."""

from pathlib import Path

from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.checkpoint.verification import add_digests
from megatron_moellava.config import CheckpointError
from megatron_moellava.conversion.readers import open_megatron
from megatron_moellava.conversion.tensors import uncovered


def seal_checkpoint(path: Path) -> str:
    """Seal the newest checkpoint of a folder and return what to tell the user.

    Raises DamagedCheckpoint when it has digests that do not fit, CheckpointError when its tensors are not all there.
    """
    folder = require_checkpoint(path)
    torn = sorted(name for name, tensor in open_megatron(folder).items() if uncovered(tensor))
    if torn:
        raise CheckpointError(
            f"{folder} is incomplete, {len(torn)} tensors have gaps: {', '.join(torn[:5])}; copy it anew"
        )
    if not add_digests(folder):
        return f"{folder} has digests and a seal already, and all files fit them; nothing was changed"
    return (
        f"{folder} has digests and a seal now. They vouch for the bytes as they are at this moment; whether those are "
        "what was once written, nobody can tell"
    )
