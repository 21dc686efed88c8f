"""What a checkpoint says of itself: `run.json`, sealed by a checksum of its own content.

The one reader and the one writer of the file, for training and conversions alike. A reader never sees a file that is
not what was written: reading checks the seal.
"""

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_type_hints

from megatron_moellava.checkpoint.folders import RUN_FILE, newest_checkpoint, write_durably
from megatron_moellava.checkpoint.integrity import DamagedCheckpoint
from megatron_moellava.config import CheckpointError, current_names

FORMAT = 1
ANEW = "copy it anew, or use another checkpoint"


# Fields of a run that change what its weights compute or how a prompt for them is made: they stay with the weights.
TRAINED_WITH = {
    "model": ("scale_multimodal_embeddings",),
    "training": ("precision",),
    "data": (
        "tokenizer",
        "template",
        "label_mode",
        "image_aspect_ratio",
        "image_grid",
        "max_image_tokens",
        "max_sample_image_tokens",
        "enlarge_images",
        "modalities",
        "box_format",
        "video_frames",
        "video_fps",
        "video_times",
        "video_pooling",
        "seq_length",
        "max_sample_length",
        "length_counts",
        "max_images",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDescription:
    """The content of run.json. Fields with a default may be missing from files of older versions and of conversions."""

    format: int = FORMAT
    iteration: int  # optimizer steps done; 0: a conversion
    stage: int | None = None  # the last one trained; 0: start of stage 1
    consumed_samples: int = 0
    optimizer_steps: int | None = None  # updates made; None: no optimizer state, training cannot resume here
    world_size: int | None = None  # None: a conversion
    data_parallel_size: int | None = None
    model: dict  # costs.shapes.model_from_json makes backbone, tower and experts of it
    config: dict | None = None  # the whole run; None: a conversion
    loss_scale: dict = field(default_factory=dict)  # of a run in fp16 (training/loss_scale.py); empty: there is none
    provenance: dict = field(default_factory=dict)  # of the weights: what was done to what
    validation: dict = field(default_factory=dict)  # {loss, iteration} of the best one so far; empty: there was none
    preference: dict = field(default_factory=dict)  # of stage 4: {"reference": its seal, "shift": mean reward so far}
    distillation: dict = field(default_factory=dict)  # {"teacher": digest of its logits}; empty: there is none
    # {"lora": LoraConfig's fields, "base": {"folder", "seal"}}: the checkpoint holds what was trained, no more
    adapter: dict | None = None
    sha256: dict = field(default_factory=dict)  # {file below the folder: digest}; empty: an older version wrote none
    checksum: str | None = None  # the seal: of everything above; None: an older version wrote none


def read_description(checkpoint: Path) -> RunDescription:
    """The description of an iteration folder.

    Raises DamagedCheckpoint when the file is not what was written, CheckpointError when another version wrote it.
    """
    path = Path(checkpoint) / RUN_FILE
    content = _read(path)
    if "checksum" in content and content["checksum"] != _checksum(content):
        raise DamagedCheckpoint(f"{path} differs from what was written; {ANEW}")
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {content.get('format')!r}, this version reads {FORMAT}; upgrade, or {ANEW}"
        )
    hints = get_type_hints(RunDescription)
    unknown = sorted(content.keys() - hints.keys())
    if unknown:  # in a file without a seal it may be the seal's own name that is damaged
        error = CheckpointError if "checksum" in content else DamagedCheckpoint
        raise error(f"{path} has unknown fields {', '.join(unknown)}; upgrade if a newer version wrote it, or {ANEW}")
    missing = [name for name in ("iteration", "model") if name not in content]
    if missing:
        raise DamagedCheckpoint(f"{path} lacks {', '.join(missing)}; {ANEW}")
    wrong = [f"{name}={value!r}" for name, value in content.items() if not isinstance(value, hints[name])]
    if wrong:
        raise DamagedCheckpoint(f"{path} is damaged: {', '.join(wrong)[:200]}; {ANEW}")
    for section in ("config", "model"):  # fields of a run have today's names, whatever they had when it was written
        if content.get(section):
            content[section] = current_names(content[section])
    return RunDescription(**content)


# Not in a file that has nothing to say there: versions that do not know these fields read it.
LATER = ("loss_scale", "preference", "distillation", "adapter")


def write_description(checkpoint: Path, description: RunDescription) -> None:
    """Write run.json with its seal; the last act of a save, since it makes the folder a complete checkpoint."""
    content = {item.name: getattr(description, item.name) for item in fields(description) if item.name != "checksum"}
    for name in LATER:
        if not content[name]:
            del content[name]
    content["checksum"] = _checksum(content)
    write_durably(Path(checkpoint) / RUN_FILE, json.dumps(content, indent=1).encode())


def trained_with(description: RunDescription) -> dict[str, dict]:
    """{section: {field: value}} of `TRAINED_WITH`, so far as it is known: from the run, or from a conversion's provenance."""
    said = description.config or description.provenance.get("trained_with") or {}
    found = {}
    for section, names in TRAINED_WITH.items():
        fields = said.get(section) or {}
        found[section] = {name: fields[name] for name in names if name in fields}
    return {section: fields for section, fields in found.items() if fields}


CARRIED = ("hf_config", "generation_config", "trained_with")  # stand in the new provenance themselves


def converted(run: RunDescription, operation: str, **more) -> dict:
    """The provenance of weights that a conversion makes of those of `run`; `more`: what else it says of itself."""
    carried = {name: run.provenance.get(name) for name in CARRIED} | {"trained_with": trained_with(run)}
    return {"operation": operation, **more, **carried, "parent": parent_of(run, CARRIED)}


def parent_of(run: RunDescription, carried: tuple[str, ...]) -> dict:
    """What the weights of `run` come from, for the provenance of what is made of them: its own provenance less the keys
    `carried` on, and what it learned from (names, not places; nothing for a conversion)."""
    parent = {key: value for key, value in run.provenance.items() if key not in carried}
    sources = ((run.config or {}).get("data") or {}).get("sources") or ()
    if not sources:
        return parent
    names = [Path(source["path"]).name for source in sources]
    return parent | {"data": names, "iteration": run.iteration, "consumed_samples": run.consumed_samples}


def described_model(path: Path) -> dict | None:
    """The `model` section of a checkpoint's run.json (the newest of a run's folder); None for other folders."""
    found = newest_checkpoint(path)
    return read_description(found).model if found else None


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: the checkpoint is incomplete; {ANEW}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {ANEW}") from None
    except ValueError as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error}); {ANEW}") from None
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{path} is damaged (not a JSON object); {ANEW}")
    return content


def _checksum(content: dict) -> str:
    sealed = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()
