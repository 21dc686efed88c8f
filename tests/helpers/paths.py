"""Where things lie in a clone of this project."""

from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
GOLDEN = REPO / "tests" / "golden"  # recordings of the original and the assets they were made with
ASSETS = GOLDEN / "assets"  # tokenizers, towers and images
