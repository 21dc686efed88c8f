"""Versions: of Python, of what the package needs, and of what it uses where it is there. Nothing is imported."""

import importlib.metadata
import platform
import re
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_moellava import __version__
from megatron_moellava.doctor.findings import Finding, Level
from megatron_moellava.machine import engine_found, installed_version, is_installed

PART = "versions"
PACKAGE = "megatron-moellava"
NEEDED_PYTHON = (3, 12)  # what megatron-core 0.19 asks for
# Module -> (what it is, what is missing without it).
OPTIONAL = {
    "apex": ("apex", "the optimizer is Transformer Engine's or torch's"),
    "fused_weight_gradient_mlp_cuda": (
        "apex's gradient kernel",
        "no gradient accumulation in the output layer's product",
    ),
    "deep_ep": ("DeepEP", "moe.moe_token_dispatcher_type=flex is refused"),
    "fastapi": ("the demo's packages", "`moellava serve` does not start: pip install 'megatron-moellava[demo]'"),
    "emerging_optimizers": (
        "emerging-optimizers",
        "optimizer.optimizer=muon is refused: pip install 'megatron-moellava[muon]'",
    ),
}


def versions() -> Iterator[Finding]:
    """Of Python and of every package that setup.py names; what is missing or of another version is a problem."""
    python = tuple(map(int, platform.python_version_tuple()[:2]))
    yield Finding(
        part=PART,
        name="Python",
        found=platform.python_version(),
        meaning="" if python >= NEEDED_PYTHON else f"at least {'.'.join(map(str, NEEDED_PYTHON))} is needed",
        level="ok" if python >= NEEDED_PYTHON else "problem",
    )
    yield Finding(part=PART, name=PACKAGE, found=__version__)
    requirements = [Requirement(text) for text in _requires()]
    if not requirements:
        yield Finding(
            part=PART,
            name="requirements",
            found="unknown",
            meaning=f"{PACKAGE} runs from its sources and is not installed, so nothing says which versions it needs",
            level="note",
        )
    yield from (needed(requirement, installed_version(requirement.name)) for requirement in requirements)


def needed(requirement: Requirement, version: str | None) -> Finding:
    """A package that must be there, and the version that is."""
    name, wanted = canonicalize_name(requirement.name), str(requirement.specifier)
    if version is None:
        return Finding(part=PART, name=name, found="missing", meaning=f"pip install '{requirement}'", level="problem")
    if not requirement.specifier.contains(version, prereleases=True):
        meaning = f"tested with {wanted}; pip install '{requirement}'"
        return Finding(part=PART, name=name, found=version, meaning=meaning, level="problem")
    return Finding(part=PART, name=name, found=version, meaning=f"as {wanted}")


def optional() -> Iterator[Finding]:
    """What a run can do without, and what it does then."""
    engine = engine_found()
    levels: dict[str, tuple[str, str, Level]] = {
        "none": ("missing", "on a GPU: no FP8, modules of Megatron-Core and torch instead of fused ones", "note"),
        "half": ("half installed", "its extension for torch is missing (a failed build?): it is not used", "note"),
        "whole": (installed_version("transformer-engine") or "installed", "used on GPUs", "ok"),
    }
    found, meaning, level = levels[engine]
    yield Finding(part=PART, name="Transformer Engine", found=found, meaning=meaning, level=level)
    for module, (name, without) in OPTIONAL.items():
        there = is_installed(module)
        yield Finding(part=PART, name=name, found="installed" if there else "missing", meaning="" if there else without)


def _requires() -> list[str]:
    """What the installed package asks for, without its extras."""
    try:
        listed = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [text for text in listed if not re.search(r";\s*extra\b", text)]
