"""The pictures of a routing analysis, each for any number of layers, experts and choices.

Every function draws on a matplotlib figure of its own and returns it; `save` writes it. Shapes: L MoE layers, E experts,
G groups of tokens, P pathways.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from megatron_moellava.analysis.pathways import Pathways
from megatron_moellava.analysis.routing import Picture
from megatron_moellava.analysis.similarity import Similarity
from megatron_moellava.data.quantities import PLAIN
from megatron_moellava.routing.token_groups import MODALITIES

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

GROUP_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")
DROPPED = (0.6, 0.6, 0.6)
MOST_PANELS = 8  # of one picture; more layers are thinned out evenly


def expert_colours(experts: int) -> list:
    """A colour for each expert, told apart as well as matplotlib can."""
    if experts <= 10:
        return [plt.get_cmap("tab10")(e) for e in range(experts)]
    if experts <= 20:
        return [plt.get_cmap("tab20")(e) for e in range(experts)]
    return [plt.get_cmap("hsv")(e / experts) for e in range(experts)]


def save(figure: Figure, path: Path) -> None:
    """Write the figure (format from the suffix) and close it; matplotlib would keep it in memory."""
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def spread(count: int, most: int = MOST_PANELS) -> list[int]:
    """All of 0 .. count - 1, or `most` of them from first to last: spread(5, 3) -> [0, 2, 4]."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def group_colour(number: int) -> str:
    """Of a modality by its number: text, image, further ones."""
    return GROUP_COLOURS[number % len(GROUP_COLOURS)]


def modality_preference(
    choices_MLE: np.ndarray, layers: Sequence[int], modalities: Sequence[str] = MODALITIES
) -> Figure:
    """One panel per expert: of its tokens in each layer, the share of each modality.

    Modalities count alike, however many tokens of them there are, as in the original's figure 4.
    """
    totals_ML1 = choices_MLE.sum(axis=2, keepdims=True).clip(min=1)
    shares_MLE = choices_MLE / totals_ML1
    shares_MLE = shares_MLE / shares_MLE.sum(axis=0).clip(min=1e-30)
    experts = choices_MLE.shape[2]
    columns = min(experts, 4)
    figure, panels = _grid(math.ceil(experts / columns), columns, width=3.2, height=2.4)
    for expert, panel in enumerate(panels[:experts]):
        places, bottom_L = np.arange(len(layers)), np.zeros(len(layers))
        for number, name in enumerate(modalities):
            share_L = shares_MLE[number, :, expert]
            panel.bar(places, share_L, bottom=bottom_L, color=group_colour(number), label=name)
            bottom_L = bottom_L + share_L
        for line in range(1, len(modalities)):
            panel.axhline(line / len(modalities), color="k", linestyle="--", linewidth=0.8)
        panel.set(title=f"expert {expert}", ylim=(0, 1), xticks=places, xlabel="MoE layer")
        panel.set_xticklabels([str(layer) for layer in layers])
    panels[0].legend(fontsize=8, loc="lower left")
    alike = " and ".join([", ".join(modalities[:-1]), modalities[-1]])
    figure.suptitle(f"Modality preference: who an expert's tokens are ({alike} weighted alike)")
    figure.tight_layout()
    return figure


def load_by_type(record: dict) -> Figure | None:
    """One panel per question type: the share of its text tokens that each expert takes, layer by layer."""
    layers = record["layers"]
    types = sorted({name for layer in layers for name in layer["groups"] if name.startswith("type:")})
    if not types:
        return None
    columns = min(len(types), 3)
    figure, panels = _grid(math.ceil(len(types) / columns), columns, width=4.0, height=2.8)
    for panel, name in zip(panels, types, strict=False):
        counts_LE = np.array(
            [layer["groups"].get(name, {"choices": [0] * record["num_experts"]})["choices"] for layer in layers]
        )
        _stacked(panel, counts_LE, [layer["layer"] for layer in layers])
        panel.set(
            title=f"{name.removeprefix('type:')} ({layers[0]['groups'].get(name, {'tokens': 0})['tokens']:,} tokens)"
        )
    _legend(figure, record["num_experts"])
    figure.suptitle("Load by question type (text tokens)")
    figure.tight_layout()
    return figure


def _stacked(panel, counts_LE: np.ndarray, layers: Sequence[int]) -> None:
    shares_LE = counts_LE / counts_LE.sum(axis=1, keepdims=True).clip(min=1)
    bottom_L = np.zeros(len(layers))
    for expert, colour in enumerate(expert_colours(counts_LE.shape[1])):
        panel.bar(range(len(layers)), shares_LE[:, expert], bottom=bottom_L, color=colour)
        bottom_L += shares_LE[:, expert]
    panel.set(ylim=(0, 1), xticks=range(len(layers)), xlabel="MoE layer")
    panel.set_xticklabels([str(layer) for layer in layers])


def confidence(record: dict, modalities: Sequence[str] = MODALITIES) -> Figure:
    """Entropy of the routers, and the mean probability of the first and the second expert, by layer and modality."""
    figure, panels = _grid(1, 3, width=4.0, height=3.0)
    names = {
        "entropy": "entropy / log(experts)",
        "top1": "probability of the first",
        "top2": "probability of the second",
    }
    layers = record["layers"]
    for panel, (key, title) in zip(panels, names.items(), strict=True):
        for number, group in enumerate(modalities):
            values = [layer["groups"].get(group, {}).get(key, np.nan) for layer in layers]
            panel.plot(range(len(layers)), values, marker="o", color=group_colour(number), label=group)
        panel.set(title=title, ylim=(0, 1), xticks=range(len(layers)), xlabel="MoE layer")
        panel.set_xticklabels([str(layer["layer"]) for layer in layers])
    panels[0].legend()
    figure.tight_layout()
    return figure


def pathways(found: dict[str, Pathways], layers: Sequence[int], experts: int) -> Figure:
    """The most frequent pathways of each modality as lines over the layers, as wide as they are frequent."""
    figure, panels = _grid(1, len(found), width=max(4.0, 0.5 * len(layers) + 2), height=0.5 * experts + 2)
    for panel, (name, ways) in zip(panels, found.items(), strict=True):
        shares_P = ways.shares()
        for rank in reversed(range(len(shares_P))):
            shift = (rank - len(shares_P) / 2) * 0.03  # so that lines on top of each other can be told apart
            colour = plt.get_cmap("viridis")(rank / max(len(shares_P) - 1, 1))
            width = 1 + 10 * shares_P[rank] / shares_P.max()
            label = f"{shares_P[rank]:.1%}" if rank < 5 else None
            panel.plot(
                range(len(layers)), ways.experts_PL[rank] + shift, color=colour, linewidth=width, alpha=0.75, label=label,
                solid_capstyle="round", marker="o", markersize=3,
            )  # fmt: skip
        panel.set(
            title=f"{name}: {len(shares_P)} of {ways.distinct:,} pathways, {shares_P.sum():.0%} of {ways.tokens:,} tokens",
            xticks=range(len(layers)),
            yticks=range(experts),
            xlabel="MoE layer",
            ylabel="expert",
            ylim=(-0.6, experts - 0.4),
        )
        panel.title.set_fontsize(10)
        panel.set_xticklabels([str(layer) for layer in layers])
        if len(shares_P):
            handles, labels = panel.get_legend_handles_labels()  # drawn from the rarest to the most frequent
            panel.legend(
                handles[::-1], labels[::-1], fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=5
            )
    figure.suptitle("Most frequent token pathways (first choices)")
    figure.tight_layout()
    return figure


def principal_pathways(found: dict[str, np.ndarray], layers: Sequence[int], experts: int) -> Figure:
    """The original's figure 6: quantised principal components, the first two in colour."""
    figure, panels = _grid(1, len(found), width=max(4.0, 0.5 * len(layers) + 2), height=0.5 * experts + 2)
    colours = ("tab:red", "tab:blue")
    for panel, (name, experts_PL) in zip(panels, found.items(), strict=True):
        for component in reversed(range(len(experts_PL))):
            colour, width = (colours[component], 3.0) if component < 2 else ("lightgray", 1.5)
            panel.plot(range(len(layers)), experts_PL[component], color=colour, linewidth=width, marker="o")
        panel.set(title=name, xticks=range(len(layers)), yticks=range(experts), xlabel="MoE layer", ylabel="expert")
        panel.set_xticklabels([str(layer) for layer in layers])
    figure.suptitle("Principal components of the first choices, as the original draws pathways")
    figure.tight_layout()
    return figure


def coactivation(pairs_LEE: np.ndarray, layers: Sequence[int]) -> Figure:
    """How often two experts share a token; the diagonal is an expert's own share of the tokens."""
    title = "Co-activation: share of the tokens that go to both experts (diagonal: to this one)"
    return _matrices(pairs_LEE, layers, title, "viridis", (0, max(float(pairs_LEE.max()), 1e-9)), "{:.0%}")


def similarity(found: Similarity) -> Figure:
    """Distance of every expert from its origin, and of the experts of a layer from each other."""
    figure, panels = _grid(1, 2, width=4.6, height=3.2)
    _heat(panels[0], found.from_origin_LE, "magma", (0, None), "{:.3f}")
    panels[0].set(title="|expert - origin| / |origin|", xlabel="expert", ylabel="MoE layer")
    panels[0].set_yticks(range(len(found.layers)), [str(layer) for layer in found.layers])
    if found.cosine_LEE is not None:
        off = ~np.eye(found.cosine_LEE.shape[1], dtype=bool)
        panels[1].boxplot(
            [matrix[off] for matrix in found.cosine_LEE], tick_labels=[str(layer) for layer in found.layers]
        )
        panels[1].axhline(0, color="k", linewidth=0.8, linestyle="--")
        panels[1].set(title="cosine between the moves of two experts", xlabel="MoE layer")
    else:
        panels[1].set_axis_off()
    figure.suptitle(f"Experts after training; origin: {found.origin}")
    figure.tight_layout()
    return figure


def siblings(found: Similarity) -> Figure:
    """|W_e - W_f| / |W_0| of the experts of each layer."""
    top = max(float(found.between_LEE.max()), 1e-9)
    return _matrices(
        found.between_LEE, found.layers, "Distance of the experts from each other", "magma", (0, top), "{:.2f}"
    )


def overlay(picture: Picture, layers: Sequence[int], experts: int) -> Figure:
    """The picture as the model sees it, and over it the first choice of each visual token, layer by layer."""
    shown = spread(len(layers))
    columns = len(shown) + 1
    figure, panels = _grid(1, columns, width=2.1, height=2.3)
    panels[0].imshow(picture.pixels_HWC)
    panels[0].set_title("picture" if picture.modality == PLAIN else picture.modality, fontsize=9)
    height, width = picture.pixels_HWC.shape[:2]
    colours = ListedColormap([DROPPED, *(colour[:3] for colour in expert_colours(experts))])
    for panel, index in zip(panels[1:], shown, strict=True):
        panel.imshow(picture.pixels_HWC, alpha=0.45)
        grid = token_grid(picture.first_LF[index], picture.columns)
        panel.imshow(
            grid + 1,
            cmap=colours,
            vmin=0,
            vmax=experts,
            alpha=0.6,
            extent=(0, width, height, 0),
            interpolation="nearest",
        )
        panel.set_title(f"layer {layers[index]}", fontsize=9)
    for panel in panels:
        panel.set_axis_off()
    _legend(figure, experts)
    figure.suptitle(picture.question[:90], fontsize=9)
    return figure


def token_grid(first_F: np.ndarray, columns: int = 0) -> np.ndarray:
    """Visual tokens in lines of `columns`, or as a square; features that lack the first one (SigLIP as the original uses it)
    get an empty corner."""
    if columns:
        return first_F.reshape(-1, columns)
    side = math.ceil(math.sqrt(len(first_F)))
    return np.concatenate([np.full(side * side - len(first_F), -1), first_F]).reshape(side, side)


def _grid(rows: int, columns: int, width: float, height: float):
    figure, panels = plt.subplots(rows, columns, figsize=(width * columns, height * rows + 0.4), squeeze=False)
    flat = list(panels.flat)
    return figure, flat


def _matrices(values_LEE: np.ndarray, layers: Sequence[int], title: str, cmap: str, span, text: str) -> Figure:
    shown = spread(len(layers))
    columns = min(len(shown), 4)
    figure, panels = _grid(math.ceil(len(shown) / columns), columns, width=3.0, height=2.8)
    for panel, index in zip(panels, shown, strict=False):
        _heat(panel, values_LEE[index], cmap, span, text)
        panel.set_title(f"layer {layers[index]}", fontsize=10)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def _heat(panel, values: np.ndarray, cmap: str, span, text: str) -> None:
    drawn = panel.imshow(values, cmap=cmap, vmin=span[0], vmax=span[1], aspect="auto")
    panel.set_xticks(range(values.shape[1]))
    panel.set_yticks(range(values.shape[0]))
    if values.shape[1] > 8:
        return
    middle = (drawn.norm.vmin + drawn.norm.vmax) / 2
    for (row, column), value in np.ndenumerate(values):
        colour = "k" if value > middle else "w"
        panel.text(column, row, text.format(value), ha="center", va="center", fontsize=8, color=colour)


def _legend(figure: Figure, experts: int) -> None:
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in expert_colours(experts)]
    figure.legend(
        handles, [f"expert {e}" for e in range(experts)], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8
    )
