"""What the experts of tower and projector make expert-parallel ranks send each other, for one micro-batch of one rank.

Rows go to their experts with their weights, and come back; gradients take the same ways back where somebody wants them.
An even router is assumed, of whose rows the share (EP - 1) / EP leaves the rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_moellava.costs.flops import ways
from megatron_moellava.costs.sharding import Sharding

WEIGHT_BYTES = 4  # of a row's routing weight: fp32 in every precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """The MoE layers of one part of the model that see the same rows."""

    part: str
    layers: int
    rows: float  # copies of tokens that this rank hands out in each layer
    inputs: int  # channels that go to an expert
    outputs: int  # and come back
    to_inputs: bool  # whether gradients of the inputs are wanted
    to_outputs: bool  # whether there is a backward pass

    def forward(self, element: int) -> float:
        """Bytes handed out in the forward pass, those that stay on the rank included; `element`: bytes of an activation."""
        return self.layers * self.rows * ((self.inputs + self.outputs) * element + WEIGHT_BYTES)

    def backward(self, element: int) -> float:
        """Bytes of the backward pass likewise."""
        channels = self.outputs * self.to_outputs + self.inputs * self.to_inputs
        return self.layers * self.rows * (channels * element + WEIGHT_BYTES * self.to_outputs)


def vision_exchanges(
    sharding: Sharding, images: float, reach: float | None = None, apart: Sequence[float] | None = None
) -> Iterator[Exchange]:
    """Of towers and projectors over `images`, and over those of each modality that is apart (see `flops.py`). Tensor-parallel
    ranks divide the rows."""
    of_tower, of_projector = (sharding.run.mixtures.get(part) for part in ("tower", "projector"))
    to_tower = "tower" in sharding.backpropagates
    for tower, count, _ in ways(sharding, images, reach, apart):
        if of_tower is not None:
            yield Exchange(
                part="tower",
                layers=len(sharding.model.tower_moe_layers),
                rows=count * tower.num_rows / sharding.tp * of_tower.moe_router_topk,
                inputs=tower.hidden_size,
                outputs=tower.hidden_size,
                to_inputs=to_tower,
                to_outputs=to_tower,
            )
        if of_projector is not None:
            yield Exchange(
                part="projector",
                layers=1,
                rows=count * tower.num_features / sharding.tp * of_projector.moe_router_topk,
                inputs=tower.projector_input_size,
                outputs=sharding.backbone.hidden_size,
                to_inputs=to_tower,
                to_outputs=to_tower or "projector" in sharding.backpropagates,
            )
