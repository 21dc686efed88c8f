"""How far the frozen tower can tell the things apart: the most that the names benchmark can give with it.

Every test picture looks for the training picture whose features are the most similar (cosine of the mean over patches, without
what all pictures have in common). A name is right when that picture shows the same thing: no model that sees only these
features can be expected to be right more often.
"""

from collections.abc import Sequence
from pathlib import Path

BATCH = 128  # pictures at a time


def retrieval_ceiling(tower_folder: Path, tower, images: Path, train: Sequence[str], tests: Sequence[str]) -> dict:
    """{"exact": percent of the `tests` pictures that find their own thing, "pictures": how many, "among": things}.

    `train`, `tests`: pictures below `images`; the thing is the file's name up to the last hyphen.
    """
    import torch
    from transformers import CLIPVisionModel

    model = CLIPVisionModel.from_pretrained(tower_folder).eval()
    known_KD, sought_TD = (_features(model, tower, images, names) for names in (train, tests))
    common_D = known_KD.mean(dim=0)
    known_KD, sought_TD = (
        torch.nn.functional.normalize(features - common_D, dim=1) for features in (known_KD, sought_TD)
    )
    nearest_T = (sought_TD @ known_KD.T).argmax(dim=1).tolist()
    right = sum(thing_of(train[found]) == thing_of(test) for test, found in zip(tests, nearest_T, strict=True))
    return {"exact": 100.0 * right / len(tests), "pictures": len(tests), "among": len({*map(thing_of, train)})}


def thing_of(image: str) -> str:
    """`"names/train/1F431-0.png"` -> `"1F431"`"""
    return Path(image).stem.rsplit("-", 1)[0]


def _features(model, tower, images: Path, names: Sequence[str]):
    """Mean of the patch features [N, D] that the projector would get."""
    import numpy as np
    import torch

    from megatron_moellava.data.images import open_image, preprocess

    parts = []
    for start in range(0, len(names), BATCH):
        pictures = [open_image(str(images / name), "names")[0] for name in names[start : start + BATCH]]
        pixels = torch.from_numpy(np.stack([preprocess(picture, tower, "pad") for picture in pictures]))
        with torch.no_grad():
            hidden = model(pixels, output_hidden_states=True).hidden_states[tower.num_used_layers]
        parts.append(hidden[:, int(tower.drop_first_feature) :].mean(dim=1))
    return torch.cat(parts)
