"""How large pictures are cut into tiles, as data: the grids that a picture may have, and what is done to very many features."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """One value of `Tower.tiling`."""

    name: str
    source: str
    grids: tuple[tuple[int, int], ...]  # columns x rows; among equals the first, as in transformers
    # With ends of lines: a picture with more features than so many tiles have is reduced to about that, by interpolation.
    max_tiles: int | None = None
    single_only: bool = False  # only the picture of a sample with one picture is tiled

    def pinpoints(self, size: int, wide_first: bool = False) -> list[list[int]]:
        """The grids in pixels, as configs have them: [height, width] in transformers, [width, height] in LLaVA's own."""
        found = [[rows * size, columns * size] for columns, rows in self.grids]
        return [pair[::-1] for pair in found] if wide_first else found


TILINGS = {
    tiling.name: tiling
    for tiling in (
        Tiling(
            name="next",
            source="https://huggingface.co/llava-hf/llava-v1.6-mistral-7b-hf/blob/main/config.json",
            grids=((2, 1), (1, 2), (2, 2), (1, 3), (3, 1)),
        ),
        Tiling(
            name="onevision",
            source="https://huggingface.co/llava-hf/llava-onevision-qwen2-7b-ov-hf/blob/main/config.json",
            grids=tuple((columns, rows) for rows in range(1, 7) for columns in range(1, 7)),
            max_tiles=9,
            single_only=True,
        ),
    )
}
