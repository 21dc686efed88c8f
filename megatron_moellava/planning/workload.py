"""How much there is to train: the published data of each stage, in samples and tokens.

Rows are the recipes' (docs/measurements/fidelity.md). Image tokens follow from the tower and the data settings
(`pictures.py`). Text tokens per sample are estimates: of the 665k mix from its published counts
(`data/length_distribution.py`), of the others from the kind of their conversations.
"""

import math
from dataclasses import dataclass

from megatron_moellava.config import DataConfig
from megatron_moellava.costs.layout import Layout
from megatron_moellava.costs.stage_work import Load
from megatron_moellava.data.length_distribution import PROMPT_TOKENS, SOURCES
from megatron_moellava.planning.pictures import Shown, of_pictures, of_video
from megatron_moellava.towers import Tower
from megatron_moellava.towers.branches import branches_of_data


def _mean_text_tokens() -> float:
    rows = sum(source[0] for source in SOURCES.values())
    return PROMPT_TOKENS + sum(source[0] * source[1] for source in SOURCES.values()) / rows


def _images_per_sample() -> float:
    return sum(source[0] * source[3] for source in SOURCES.values()) / sum(source[0] for source in SOURCES.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class StageData:
    """One epoch of one stage."""

    name: str
    samples: int
    text_tokens: float  # mean per sample, prompt included
    images: float  # pictures, mean per sample
    global_batch_size: int  # samples per step of the original's recipe
    shows: int = 1  # samples that share a picture, which is encoded once: the two answers of a pair
    videos: float = 0.0  # mean per sample
    video_seconds: float = 60.0  # of a video
    image_size: tuple[int, int] = (640, 480)  # width, height of a picture in pixels: COCO's most frequent

    def shown(self, tower: Tower, settings: DataConfig) -> Shown:
        """What the tower and the language model see of the mean sample's pictures and videos under a run's settings.

        A tower that takes videos alone sees one in the place of each picture.
        """
        if tower.takes_videos:
            return of_video(self.video_seconds, tower, settings).times(self.images + self.videos)
        found, together = Shown(), math.ceil(self.images)  # pictures share a sample's budget
        if together:
            found += of_pictures([self.image_size] * together, tower, settings).times(self.images / together)
            apart = sum(branch.seen_by(tower).num_features for branch in branches_of_data(settings))
            found += Shown(tokens=self.images * apart)  # with each picture comes one of every modality that is apart
        if self.videos:
            found += of_video(self.video_seconds, tower, settings).times(self.videos)
        return found


STAGE_DATA = {
    1: StageData(name="LLaVA-PT 558k", samples=558_128, text_tokens=25, images=1.0, global_batch_size=256),
    2: StageData(name="Hybrid-FT 964k", samples=964_000, text_tokens=200, images=0.95, global_batch_size=128),
    3: StageData(
        name="LLaVA-FT mix 665k",
        samples=665_298,
        text_tokens=_mean_text_tokens(),
        images=_images_per_sample(),
        global_batch_size=128,
    ),
    # Stage 4: a sample is an answer behind its prompt (docs/tutorials/preferences.md); 5,733 pairs, 32 a step.
    4: StageData(name="RLHF-V 5.7k pairs", samples=11_466, text_tokens=170, images=1.0, global_batch_size=64, shows=2),
}
PACKED_FILL = 0.97  # share of a packed row's positions that hold tokens (docs/measurements/performance.md, Data)
PADDED_FILL = 0.85  # share of a padded batch's positions, batches grouped by length


def mean_load(layout: Layout, data: StageData) -> Load:
    """Packed rows are full and hold several samples; padded rows are as long as the longest of their batch."""
    shown = data.shown(layout.tower, layout.run.data)
    whole = data.text_tokens + shown.tokens
    length = min(whole, layout.run.data.seq_length)
    images = shown.images * (length / whole)  # what is cut off is not encoded
    reach = shown.squares / (shown.images * layout.tower.num_patches) if shown.squares else None
    rows = layout.run.training.micro_batch_size
    pictures, modalities = data.images * (length / whole), len(layout.branches)
    if layout.run.data.packing:
        samples = layout.tokens * PACKED_FILL / length
        images = samples * images / data.shows
        apart = (samples * pictures / data.shows,) * modalities
        return Load(tokens=layout.tokens, length=length, images=images, samples=samples, reach=reach, apart=apart)
    padded = min(length / PADDED_FILL, layout.run.data.seq_length)
    return Load(
        tokens=rows * padded,
        length=padded,
        images=rows * images,
        samples=rows,
        reach=reach,
        apart=(rows * pictures,) * modalities,
    )


def full_load(layout: Layout) -> Load:
    """Text rows of `seq_length`, as language-model benchmarks have them."""
    return Load(
        tokens=layout.tokens,
        length=layout.run.data.seq_length,
        images=0.0,
        samples=layout.run.training.micro_batch_size,
    )
