"""Running the scripts of examples/ with a Python that only writes down what it is asked."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.helpers.paths import REPO


def validate_only(script: str, folder: Path, stub: Path, **variables: str):
    """`VALIDATE_ONLY=1 bash examples/SCRIPT` in `folder`; returns (result, the words that Python got)."""
    asked = folder / "asked"
    environment = {"PATH": os.environ["PATH"], "REPO": str(REPO), "VALIDATE_ONLY": "1", "PYTHON": str(stub)}
    environment |= {"ASKED": str(asked), **variables}
    command = [shutil.which("bash"), str(REPO / "examples" / script)]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    return result, asked.read_text().split("\0")[:-1] if asked.exists() else []
