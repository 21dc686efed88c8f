"""The kinds of projectors as data: what lies between a tower's features and the rows of the word embeddings.

All of them end in the same two layers (Linear, exact GELU, Linear, with biases); they differ in how many neighbouring
features become one row first.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectorKind:
    """One value of `Tower.projector`."""

    name: str
    source: str  # where it comes from
    shuffle: int  # features of shuffle x shuffle neighbouring patches are one row of the first layer, line after line


PROJECTORS = {
    kind.name: kind
    for kind in (
        ProjectorKind(name="mlp2x_gelu", source="LLaVA-1.5, arXiv 2310.03744", shuffle=1),
        # Pixel shuffle as InternVL 1.5 (arXiv 2404.16821) has it: a quarter of the visual tokens, four times as wide; the order
        # of channels is that of transformers' Lfm2Vl.
        ProjectorKind(name="pixel_shuffle", source="InternVL 1.5, arXiv 2404.16821", shuffle=2),
    )
}
