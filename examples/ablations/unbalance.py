"""Make a LLaVA JSON lopsided: of the rows whose tag names one of some question types, only a share is kept."""

import argparse
import json
import random
from pathlib import Path

from megatron_moellava.commands.program import number


def unbalanced(rows: list[dict], types: set[str], keep: float, seed: int) -> list[dict]:
    draw = random.Random(seed)
    return [row for row in rows if not types & set(row.get("tag", "").split("+")) or draw.random() < keep]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", nargs="+", required=True, help="question types that become rare")
    parser.add_argument("--keep", type=number(float, above=0, most=1), default=0.1, help="share of their rows (0.1)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = json.loads(args.data.read_text())
    kept = unbalanced(rows, set(args.types), args.keep, args.seed)
    args.out.write_text(json.dumps(kept))
    print(f"kept {len(kept):,} of {len(rows):,} rows")


if __name__ == "__main__":
    main()
