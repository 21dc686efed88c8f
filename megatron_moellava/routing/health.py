"""Routing that goes wrong, in words: experts that take everything, and experts that nobody asks.

Works on the plain numbers of `routing.records.routing_record`, so that a training step and an analysis judge alike.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_moellava.config import Component

NEARLY_ALL = 0.95  # of the tokens at one expert, though others are free
FAR_ABOVE = 4.0  # times the mean load
DEAD = 0.01  # of the mean load
FEW = 200  # choices per expert below which an idle expert is no sign

ADVICE = {
    "collapse": (
        "balance the routers: raise moe.moe_aux_loss_coeff (0.01 to 0.1), or, with moe.router=megatron, set "
        "moe.moe_router_enable_expert_bias=true; if the router's entropy is near 0 as well, lower optimizer.lr or raise "
        "optimizer.lr_warmup_fraction, and, with moe.router=megatron, set moe.moe_z_loss_coeff=0.001"
    ),
    "dead": (
        "it learns nothing: raise moe.moe_aux_loss_coeff, or, with moe.router=megatron, set "
        "moe.moe_router_enable_expert_bias=true, which also brings back an expert that is long idle"
    ),
}

# Of the experts of tower and projector.
VISION_ADVICE = (
    "balance the routers: raise {component}_moe.moe_aux_loss_coeff (0.1 is CuMo's) or {component}_moe.moe_z_loss_coeff; the "
    "losses have an effect only where training.trains has {component}"
)


@dataclass(frozen=True, slots=True)
class Anomaly:
    """One expert of one layer (both from 0) that takes too much or nothing, in words."""

    kind: str  # a key of ADVICE
    layer: int
    expert: int
    text: str

    @property
    def key(self) -> tuple[str, int, int]:
        """The same for the same fault at another time."""
        return self.kind, self.layer, self.expert


def find_anomalies(record: dict) -> list[Anomaly]:
    """Every collapsed layer and dead expert of an observation."""
    found: list[Anomaly] = []
    for layer in record["layers"]:
        asked = [kept + lost for kept, lost in zip(layer["choices"], layer["dropped"], strict=True)]
        fair = layer.get("fair") or [sum(asked) / len(asked)] * len(asked)
        found += _of_layer(layer["layer"], asked, fair, layer["tokens"], record["topk"])
    return found


def _of_layer(layer: int, asked: Sequence[int], fair: Sequence[float], tokens: int, topk: int) -> Iterable[Anomaly]:
    """`fair`: the load of each expert if all were as busy as they can be alike."""
    total = sum(asked)
    if len(asked) <= topk:  # every expert takes every token
        return
    for expert, count in enumerate(asked):
        if fair[expert] < FEW:  # too few were seen
            continue
        load = count / fair[expert]
        if load >= FAR_ABOVE or count >= NEARLY_ALL * tokens > fair[expert]:
            text = (
                f"layer {layer}: expert {expert} takes {count / tokens:.0%} of the tokens, {load:.1f} x the mean load"
            )
            yield Anomaly("collapse", layer, expert, text)
        if load < DEAD:
            yield Anomaly(
                "dead", layer, expert, f"layer {layer}: expert {expert} is dead ({count:,} of {total:,} choices)"
            )


def advise(found: Sequence[Anomaly], component: Component = "language") -> list[str]:
    """One line for each kind of anomaly: what, and what to do. `component`: the part of the model whose routers these are."""
    lines = []
    known = ADVICE if component == "language" else {kind: VISION_ADVICE.format(component=component) for kind in ADVICE}
    for kind, advice in known.items():
        texts = [anomaly.text for anomaly in found if anomaly.kind == kind]
        if texts:
            lines.append(f"{'; '.join(texts)}. Advice: {advice}")
    return lines


class RoutingHealthMonitor:
    """Says what is new since the last observation, so that an anomaly is not repeated every time."""

    def __init__(self, component: Component = "language") -> None:
        self.component = component
        self.known: set[tuple[str, int, int]] = set()

    def __call__(self, record: dict) -> list[str]:
        """Lines of advice about anomalies that the last record did not have."""
        found = find_anomalies(record)
        new = [anomaly for anomaly in found if anomaly.key not in self.known]
        self.known = {anomaly.key for anomaly in found}
        return advise(new, self.component)
