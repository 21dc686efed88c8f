"""What becomes of one picture, where its own size decides that; batches carry the grids to the model."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """How many visual tokens a picture has, and how they lie."""

    tokens: int
    # Empty: of a modality whose own tower has no grids. Native resolution: rows and columns of patches. Tiles with an end of
    # line: rows and columns of tiles (0, 0: there is the overview alone), rows and columns of features that are kept of them,
    # and those that they are reduced to, if they are.
    grid: tuple[int, ...]
