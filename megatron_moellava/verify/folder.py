"""A folder of recordings on disk: which files it has, and its batches as the batches of this program.

Shapes: B rows, S positions (images expanded), N images, C channels, H and W pixels.
"""

import pickle
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from megatron_moellava.config import DataError
from megatron_moellava.data.batch import Batch, pad
from megatron_moellava.data.encode import IMAGE_TOKEN, EncodedSample, expand
from megatron_moellava.hf_config import read_json

READ = ("inputs.pt", "names.json", "moe_layers.json", "train.pt", "generate.pt", "weights.json")
DATA = ("conversations.json", "dataset.pt", "sampler_schedule.json", "scoring.json")  # in data/
MARKS = ("inputs.pt", "names.json", "moe_layers.json")


@dataclass(frozen=True)
class Folder:
    """One backbone's recordings. Assets (towers, tokenizers) and conversations are looked for here and one level up."""

    path: Path

    def has(self, name: str) -> bool:
        """Whether the folder has the file or folder `name`."""
        return (self.path / name).exists()

    def has_checkpoint(self, name: str) -> bool:
        """Whether folder `name` has weights beside its config.json."""
        return any(file.suffix in (".safetensors", ".bin") for file in (self.path / name).glob("*"))

    def load(self, name: str):
        """A .pt file or a .json file. DataError when it cannot be read."""
        file = self.path / name
        if name.endswith(".json"):
            return read_json(file)
        try:
            return torch.load(file, weights_only=True, map_location="cpu")
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise DataError(
                f"{file} cannot be read ({type(error).__name__}: {error}); record or copy it again"
            ) from error

    @cached_property
    def inputs(self) -> dict:
        """The recorded batches by name."""
        return self.load("inputs.pt")

    def beside(self, name: str) -> Path | None:
        """`name` in this folder or in the one above."""
        return next((place / name for place in (self.path, self.path.parent) if (place / name).exists()), None)

    def tower_of(self, checkpoint: str) -> str | None:
        """The tower that a checkpoint's config.json names, if the assets hold it; None: a published one.

        Raises DataError for a test tower without its file.
        """
        name = read_json(self.path / checkpoint).get("mm_image_tower")
        assets = self.beside(f"assets/{name}")
        if assets is None and str(name).endswith("-tiny"):
            raise DataError(f"{self.path}: {checkpoint}/ has the tower {name}, but assets/{name} is not there; add it")
        return str(assets) if assets else None

    def left_out(self, checkpoints: tuple[str, ...]) -> list[str]:
        """What a reader of the table should know is not in it."""
        present = [name for name in checkpoints if self.has_checkpoint(name)]
        wanted = ["inputs.pt", "names.json", "moe_layers.json", "train.pt", *(f"{name}.pt" for name in present)]
        wanted += ["generate.pt"] if "moe" in present else []
        found = [f"{name} is not there" for name in wanted if not self.has(name)]
        found += [f"{name} is empty" for name in wanted if self.has(name) and not self.load(name)]
        found += [f"data/{name} is not there" for name in DATA if self.beside(f"data/{name}") is None]
        read = {*READ, *DATA, *(f"{name}.pt" for name in checkpoints)}
        others = [
            item for place in (self.path, self.path / "data", self.path.parent / "data") for item in place.glob("*")
        ]
        unread = sorted({item.name for item in others if item.suffix in (".pt", ".json") and item.name not in read})
        return found + [f"{name}: no case reads it" for name in unread]


def find_folders(path: Path) -> list[Folder]:
    """`path` itself if it holds recordings, else those below it. DataError when there are none."""
    places = [path] if is_recording(path) else sorted(item for item in path.glob("*/") if is_recording(item))
    if not places:
        raise DataError(f"{path} holds no recordings ({', '.join(MARKS)}), nor does a folder in it; give one that does")
    return [Folder(place) for place in places]


def is_recording(path: Path) -> bool:
    """Whether `path` holds a backbone's recordings."""
    return any((path / mark).exists() for mark in MARKS)


def to_batch(recorded: dict, num_features: int, multiple: int = 1) -> Batch:
    """A recorded batch of token ids, expanded and right-padded to the longest row, rounded up to a `multiple`.

    In the original every row takes at least one image: a row of text brings a zero image that it throws away.
    """
    samples, pixels, images = [], [], iter(recorded["images"])
    for row, real in enumerate(recorded["attention_mask"]):
        ids, labels = recorded["input_ids"][row][real].tolist(), recorded["labels"][row][real].tolist()
        wanted = ids.count(IMAGE_TOKEN)
        taken = [next(images).numpy()[None] for _ in range(max(wanted, 1))]
        pixels += taken[:wanted]
        samples.append(sample_of(ids, labels, num_features, f"row {row}"))
    shape = tuple(recorded["images"][0].shape)
    return pad(samples, pixels, multiple, 0, shape)


def sample_of(ids: list[int], labels: list[int], num_features: int, name: str) -> EncodedSample:
    """A recorded row as a sample: each image token expanded to `num_features` visual tokens."""
    features = (num_features,) * ids.count(IMAGE_TOKEN)
    tokens_S, labels_S, _, _ = expand(ids, labels, (), features, seq_length=1 << 30)
    return EncodedSample(id=name, tag="", tokens_S=tokens_S, labels_S=labels_S)


def prompt_batch(ids: list[int], pixels_NCHW: torch.Tensor, num_features: int, multiple: int) -> Batch:
    """One row without labels."""
    sample = sample_of(ids, [-100] * len(ids), num_features, "prompt")
    return pad([sample], [pixels_NCHW.numpy()], multiple, 0, tuple(pixels_NCHW.shape[1:]))
