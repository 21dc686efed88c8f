"""docs/reference/commands.md is what the commands say today."""

import subprocess
import sys

import pytest

from megatron_moellava.commands.program import COMMANDS
from tests.helpers.paths import REPO

PAGE = REPO / "docs/reference/commands.md"


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 12), reason="argparse lays out usage lines differently in other releases"
)
def test_the_page_is_current():
    done = subprocess.run(
        [sys.executable, "-m", "megatron_moellava.commands.reference"], capture_output=True, text=True, cwd=REPO
    )
    assert done.stdout == PAGE.read_text(), f"python -m megatron_moellava.commands.reference > {PAGE.relative_to(REPO)}"


def test_every_command_has_its_section():
    assert all(f"\n## moellava {name}\n" in PAGE.read_text() for name in COMMANDS)
