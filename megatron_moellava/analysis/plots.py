"""Pictures of routing. Shapes: L decoder layers, M modalities (text, image, ...), E experts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def plot_expert_load(
    counts_LME: np.ndarray,
    moe_layers: Sequence[int],
    path: Path,
    title: str,
    modalities: Sequence[str] = ("text", "image"),
) -> None:
    """One stacked bar per MoE layer and modality: the share of its routed tokens that each expert takes.

    Every bar sums to 1; the dashed lines are perfect balance.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    experts = counts_LME.shape[-1]
    shares_LME = counts_LME / counts_LME.sum(axis=-1, keepdims=True).clip(min=1)
    figure, panels = plt.subplots(1, len(modalities), figsize=(4.2 * len(modalities) + 1.2, 4), sharey=True)
    colors = plt.get_cmap("tab10")
    for modality, (panel, name) in enumerate(zip(panels, modalities, strict=True)):
        bottom = np.zeros(len(moe_layers))
        for expert in range(experts):
            share = shares_LME[list(moe_layers), modality, expert]
            bars = panel.bar(
                range(len(moe_layers)), share, bottom=bottom, color=colors(expert % 10), label=f"expert {expert}"
            )
            panel.bar_label(
                bars, [f"{value:.0%}" if value > 0.06 else "" for value in share], label_type="center", color="w"
            )
            bottom += share
        for line in range(1, experts):
            panel.axhline(line / experts, color="k", linewidth=0.8, linestyle="--", alpha=0.5)
        panel.set_title(f"{name} tokens ({int(counts_LME[:, modality].sum()):,} choices)")
        panel.set_xticks(range(len(moe_layers)), [str(layer) for layer in moe_layers])
        panel.set_xlabel("MoE layer")
    panels[0].set_ylabel("share of the choices")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
