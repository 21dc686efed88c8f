"""A folder whose matrices are stored in the format of compressed-tensors, read as if they were not: by its own library.

Each matrix is computed when it is read, never all of them at once. What rounding has taken stays lost.
"""

import importlib.util
from functools import lru_cache, partial
from pathlib import Path

from megatron_moellava.config import ConfigError
from megatron_moellava.conversion.quantised import PACKAGE
from megatron_moellava.conversion.tensors import Tensor, loaded

KEY, METHOD = "quantization_config", "compressed-tensors"
SCALE = ".weight_scale"
FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
# Megatron's fused matrices are read in pieces, head by head in turn: those of an attention are kept so long.
REMEMBERED = 4


def dequantised(tensors: dict[str, Tensor], config: dict, source: Path) -> tuple[dict[str, Tensor], dict, str]:
    """(tensors, config, format) with whole matrices in the dtype of their scales; format "": nothing was quantised.

    Raises ConfigError for what is not compressed-tensors', or has more than one kind of matrix.
    """
    settings = config.get(KEY)
    if settings is None:
        return tensors, config, ""
    if (method := settings.get("quant_method")) != METHOD:
        raise ConfigError(
            f"{source}: {KEY}.quant_method={method!r} cannot be read, only {METHOD!r}; import the model as it was before"
        )
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(
            f"{source} is quantised, and reading it needs the package {METHOD}; pip install 'megatron-moellava[compressed]'"
        )
    scheme = _scheme(settings, source)
    names = [name.removesuffix(SCALE) for name in tensors if name.endswith(SCALE)]
    parts = {name: _parts(name, tensors, scheme) for name in names}
    whole = lru_cache(maxsize=REMEMBERED)(lambda name: _whole(tensors, parts[name], scheme))
    matrices = {f"{name}.weight": _matrix(tensors, parts[name], partial(whole, name)) for name in names}
    stored = {file for files in parts.values() for file in files.values()}
    kept = {name: tensor for name, tensor in tensors.items() if name not in stored}
    return kept | matrices, {key: value for key, value in config.items() if key != KEY}, scheme.format


def _scheme(settings: dict, source: Path):
    """The library's description of how every quantised matrix is stored."""
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    try:
        config = QuantizationConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{source}: {KEY} says nothing to compressed-tensors: {error.errors()[0]['msg']}") from None
    schemes = list(config.config_groups.values())
    formats = sorted({str(scheme.format or config.format) for scheme in schemes})
    if len(schemes) != 1 or formats[0] not in FORMATS:
        raise ConfigError(
            f"{source}: {KEY} has {len(schemes)} kind(s) of matrices, in the format {' and '.join(formats)}; one kind can be "
            f"read, in one of {', '.join(FORMATS)}; import the model as it was before"
        )
    return schemes[0].model_copy(update={"format": formats[0]})


def _parts(name: str, tensors: dict[str, Tensor], scheme) -> dict[str, str]:
    """What the library calls the parts of a matrix -> their names in the files."""
    from compressed_tensors.compressors import BaseCompressor

    parts = BaseCompressor.get_value_from_registry(scheme.format).compression_param_names(scheme)
    return {part: f"{name}.{part}" for part in parts if f"{name}.{part}" in tensors}


def _matrix(tensors: dict[str, Tensor], parts: dict[str, str], make) -> Tensor:
    packed = "weight_shape" in parts
    shape = tuple(_read(tensors[parts["weight_shape"]]).tolist()) if packed else tensors[parts["weight"]].shape
    return Tensor(shape, tensors[parts["weight_scale"]].dtype, make=make)


def _whole(tensors: dict[str, Tensor], parts: dict[str, str], scheme):
    """A matrix in the dtype of its scales."""
    from compressed_tensors.compressors import BaseCompressor

    stored = {part: _read(tensors[file]) for part, file in parts.items()}
    return BaseCompressor.get_value_from_registry(scheme.format).decompress(stored, scheme)["weight"]


def _read(tensor: Tensor):
    return loaded(tensor).view(tensor.shape)
