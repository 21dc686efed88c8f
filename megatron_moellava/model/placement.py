"""Which decoder layers are MoE layers."""


def moe_layer_freq(placement: str | tuple[int, ...], num_layers: int) -> list[int]:
    """1 for a MoE layer, 0 for a dense one: "sparse" of 4 layers -> [1, 0, 1, 0]; (1, 3) -> [0, 1, 0, 1]."""
    half = num_layers // 2
    named = {
        "first_half": range(half),
        "second_half": range(half, num_layers),
        "sparse": range(0, num_layers, 2),
        "dense": range(num_layers),
    }
    chosen = set(named[placement] if isinstance(placement, str) else placement)
    return [int(layer in chosen) for layer in range(num_layers)]
