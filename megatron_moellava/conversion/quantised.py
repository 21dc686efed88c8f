"""Weight-only quantisation of an export in the format of compressed-tensors, by its own library; transformers reads it.

`fp8`: e4m3 with a scale for each row. `int4`: whole numbers with a scale for every 128 columns. Rounding is to the nearest; no
data is looked at. Attention and MLPs of the language model are quantised, routed experts included; embeddings, output layer,
routers, shared experts, tower and projector stay as they are.
"""

import importlib.util
import re
from dataclasses import dataclass
from functools import partial

from megatron_moellava.config import ConfigError
from megatron_moellava.conversion.recipes import Recipe, identity, made
from megatron_moellava.conversion.tensors import Tensor
from megatron_moellava.mapping import Shape

PACKAGE = "compressed_tensors"
GROUP = 128  # columns that share a scale of int4
# Mixtral's MLPs are `block_sparse_moe` in files, and `mlp` in memory.
QUANTISED = re.compile(r".*\.layers\.\d+\.(self_attn|mlp|block_sparse_moe)\.(.*\.)?\w+\.weight")
# Never: routers, which are in fp32 for good reasons, the coefficient of a residual MoE, and shared experts, since Qwen2-MoE's
# may be of zeros.
KEPT = re.compile(
    r".*(\.(mlp|block_sparse_moe)\.gate|\.coefficient|_norm|\.shared_expert(s|_gate)?(\.\w+)?)\.weight|.*vision_tower\..*"
)
IGNORED = [
    "re:.*lm_head",
    "re:.*vision_tower.*",
    "re:.*multi_modal_projector.*",
    "re:.*(mlp|block_sparse_moe)[.]gate$",
    "re:.*coefficient",
    "re:.*shared_expert.*",
]


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to store a matrix."""

    bits: int
    number: str  # of compressed-tensors' QuantizationType
    format: str
    group: int | None  # columns that share a scale; None: all of a row


KINDS = {"fp8": Kind(8, "float", "float-quantized", None), "int4": Kind(4, "int", "pack-quantized", GROUP)}


def check_quantised(kind: str) -> None:
    """ConfigError where the library is missing, before anything is written."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(
            f"--quantize {kind} needs the package compressed-tensors; pip install 'megatron-moellava[compressed]'"
        )


def quantised(
    recipes: list[Recipe], tensors: dict[str, Tensor], kind: str
) -> tuple[list[Recipe], dict[str, Tensor], dict]:
    """(recipes, tensors, `quantization_config` of config.json) with the language model's matrices quantised.

    Each is computed when it is written. ConfigError for a width that the groups do not divide, and for Qwen v1's own names.
    """
    found: list[Recipe] = []
    added: dict[str, Tensor] = {}
    wrong: list[str] = []
    for recipe in recipes:
        if not is_quantised(recipe.name, recipe.shape):
            found.append(recipe)
        elif KINDS[kind].group and recipe.shape[1] % GROUP:
            wrong.append(f"{recipe.name} has {recipe.shape[1]} columns")
        else:
            parts = _parts(recipe, tensors, KINDS[kind])
            added |= parts
            found += [identity(name, tensor) for name, tensor in parts.items()]
    if wrong:
        raise ConfigError(
            f"--quantize {kind} needs a multiple of {GROUP} columns; {wrong[0]} ({len(wrong)} in all); use fp8"
        )
    if not added:
        raise ConfigError(
            f"--quantize {kind}: this layout's names are none that it knows; export --layout transformers"
        )
    return found, tensors | added, _config(KINDS[kind])


def is_quantised(name: str, shape: Shape) -> bool:
    """Whether a tensor of an export is a matrix that is quantised; what is not must be in `IGNORED`, by its module's name."""
    return len(shape) == 2 and bool(QUANTISED.fullmatch(name)) and not KEPT.fullmatch(name)


def _scheme(kind: Kind):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = {"strategy": "group", "group_size": kind.group} if kind.group else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=kind.bits, type=kind.number, symmetric=True, dynamic=False, **strategy)
    return QuantizationScheme(targets=["Linear"], weights=args, format=kind.format)


def _config(kind: Kind) -> dict:
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    config = QuantizationConfig(
        config_groups={"group_0": _scheme(kind)},
        format=kind.format,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=IGNORED,
    )
    return config.model_dump(mode="json", exclude_none=True)


def _parts(recipe: Recipe, tensors: dict[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """The tensors that stand for a matrix, by name."""
    rows, columns = recipe.shape
    root = recipe.name.removesuffix("weight")
    scales = (rows, columns // kind.group if kind.group else 1)
    names: dict[str, tuple[tuple[int, ...], str]] = {"weight_scale": (scales, recipe.dtype)}
    if kind.format == "pack-quantized":
        names |= {"weight_packed": ((rows, columns * kind.bits // 32), "int32"), "weight_shape": ((2,), "int64")}
    else:
        names |= {"weight": ((rows, columns), "float8_e4m3fn")}
    return {
        root + name: Tensor(shape, dtype, make=partial(_compressed, recipe, tensors, kind, name))
        for name, (shape, dtype) in names.items()
    }


def _compressed(recipe: Recipe, tensors: dict[str, Tensor], kind: Kind, name: str):
    """One of the tensors that the library's compressor makes of a matrix."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = _scheme(kind)
    weight = made(recipe, tensors)
    groups = weight.float().unflatten(1, (-1, kind.group or weight.shape[1]))
    exact, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    scale = exact.to(weight.dtype)  # as it is stored
    compressor = BaseCompressor.get_value_from_registry(kind.format)
    found = compressor.compress({"weight": weight.float(), "weight_scale": scale.float()}, scheme)
    return scale if name == "weight_scale" else found[name]
