"""What setup.py asks for, read without running setup()."""

import ast
import re

from tests.helpers.paths import REPO


def setup_lists() -> tuple[list[str], dict[str, list[str]]]:
    """INSTALL_REQUIRES and EXTRAS_REQUIRE."""
    values = {}
    for node in ast.parse((REPO / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign):
            values[ast.unparse(node.targets[0])] = ast.literal_eval(node.value)
    return values["INSTALL_REQUIRES"], values["EXTRAS_REQUIRE"]


def name_of(requirement: str) -> str:
    """`megatron-core~=0.19.2` -> megatron-core."""
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def all_requirements() -> dict[str, str]:
    """{name: requirement}, extras included."""
    install, extras = setup_lists()
    return {name_of(item): item for group in (install, *extras.values()) for item in group}
