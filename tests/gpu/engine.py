"""Transformer Engine's own Python code on the pretended GPU, above a stand-in for its extension.

`make` puts its Python sources (a wheel without any library) and einops into .te-sources, which no other test sees. Nothing of
Transformer Engine is replaced but what calls a kernel: the extension for torch (`engine_extension.py`) and the launches
of its Triton kernels (`engine_permutation.py`).
"""

import functools
import importlib.machinery
import importlib.util
import os
import sys
import types

from tests.helpers.paths import REPO

SOURCES = REPO / ".te-sources"
IS_THERE = (SOURCES / "transformer_engine").is_dir()
WHY_NOT = "Transformer Engine's Python sources are not there: make .te-sources/.installed"
VARIABLES = {
    "NVTE_PROJECT_BUILDING": "1",  # import without the library
    "NVTE_TORCH_COMPILE": "0",
    "TRITON_INTERPRET": "1",  # no driver is asked for
}


def install_engine() -> None:
    """After `pretended.install()`, before megatron_moellava.platform is imported."""
    os.environ.update(VARIABLES)
    found = importlib.util.find_spec("transformer_engine")
    assert found is not None, "start Python with .te-sources on PYTHONPATH"
    sys.modules["transformer_engine_torch"] = _extension()
    common = _common()
    common.load_framework_extension = lambda framework: None
    sys.modules["transformer_engine.pytorch.onnx_extensions"] = _stub("transformer_engine.pytorch.onnx_extensions")
    import transformer_engine

    transformer_engine.common = common
    import transformer_engine.pytorch.triton.permutation as launches

    from tests.gpu import engine_permutation

    for name in engine_permutation.LAUNCHES:
        assert hasattr(launches, name), name
        setattr(launches, name, getattr(engine_permutation, name))


def _extension() -> types.ModuleType:
    from tests.gpu import engine_attention, engine_extension, engine_fp8

    module = _stub("transformer_engine_torch")
    for source in (engine_extension, engine_attention, engine_fp8):
        functions = {name: item for name, item in vars(source).items() if getattr(item, "is_of_the_extension", False)}
        module.__dict__.update(functions)
    return module


def _stub(name: str) -> types.ModuleType:
    """A module whose members are enumerations, or raise when they are called. Exports to ONNX want packages of their own."""
    from tests.gpu.engine_extension import missing

    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__getattr__ = functools.partial(missing, module)  # type: ignore[method-assign]
    return module


def _common() -> types.ModuleType:
    """Import transformer_engine.common first: transformer_engine itself loads the extension at once."""
    name, path = "transformer_engine.common", SOURCES / "transformer_engine/common"
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py", submodule_search_locations=[str(path)])
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
