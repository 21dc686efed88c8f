"""Which decoder layers are MoE layers: the named placements of the original, and lists of layers."""

from megatron_moellava.config import ConfigError


def moe_layers(placement: str | tuple[int, ...], num_layers: int, field: str = "moe.placement") -> tuple[int, ...]:
    """Layers that become MoE, of 4: first_half (0, 1), second_half (2, 3), sparse (0, 2), dense (0, 1, 2, 3), or a list.

    Raises ConfigError, which names the `field`, for an unknown name, an empty list, a layer twice, or one that the model does
    not have.
    """
    half = num_layers // 2
    named = {
        "first_half": range(half),
        "second_half": range(half, num_layers),
        "sparse": range(0, num_layers, 2),
        "dense": range(num_layers),
    }
    if isinstance(placement, str):
        if placement not in named:
            raise ConfigError(
                f"{field}={placement!r} is unknown; use {', '.join(named)} or a list of layers such as [0, 2]"
            )
        return tuple(named[placement])
    outside = [layer for layer in placement if not 0 <= layer < num_layers]
    if outside or not placement or len(set(placement)) != len(placement):
        raise ConfigError(f"{field}={list(placement)} must name different layers between 0 and {num_layers - 1}")
    return tuple(sorted(placement))


def moe_layer_freq(placement: str | tuple[int, ...], num_layers: int) -> list[int]:
    """Megatron-Core's form: 1 for a MoE layer, 0 for a dense one; "sparse" of 4 layers -> [1, 0, 1, 0]."""
    layers = moe_layers(placement, num_layers)
    return [int(layer in layers) for layer in range(num_layers)]
