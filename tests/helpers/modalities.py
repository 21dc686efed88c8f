"""Records of modalities, and files for them."""

from pathlib import Path

import numpy as np
from PIL import Image

from megatron_moellava.config import Channel, Modality

DEPTH = Modality(  # millimetres, 0: not measured
    name="depth",
    levels="uint16",
    scale=0.001,
    missing=(0,),
    channels=(Channel(black=8, white=0.5, curve="reciprocal"),),
)
THERMAL = Modality(  # hundredths of a kelvin
    name="thermal", levels="float", scale=0.01, offset=-273.15, channels=(Channel(black=-20, white=120),)
)


def write_pictures(folder: Path, count: int = 2) -> None:
    """depth/N.png and thermal/N.tif."""
    for number in range(count):
        draw = np.random.default_rng(number)
        for name in ("depth", "thermal"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        depth = draw.integers(0, 9000, (30 + number, 40)).astype(np.uint16)
        Image.fromarray(depth).save(folder / "depth" / f"{number}.png")
        kelvin = draw.uniform(260, 380, (24, 32)).astype(np.float32) * 100
        Image.fromarray(kelvin).save(folder / "thermal" / f"{number}.tif")
