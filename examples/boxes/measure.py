"""The measured result of the tutorial on boxes: a page of docs/measurements, from data that are in the repository.

  python examples/boxes/measure.py --runs runs/boxes     take what the tutorial's commands left there into the data, then write
  python examples/boxes/measure.py                       write the page from the data alone

The data: docs/measurements/data/boxes.json, the scores of `moellava evaluate` with pictures and with blank ones, and what the
run was. `--runs` holds stage2/, eval/ and blank/.
"""

import argparse
import json
import os
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs" / "measurements"
DATA, PAGE = "data/boxes.json", "boxes.md"
ASKED = {"pictures": "eval", "blank pictures": "blank"}  # what is shown -> folder of the scores
TASK = "boxes"
SHOWN = ("IoU@0.25", "IoU@0.75", "mean IoU", "pointing", "answers with a box")  # beside IoU@0.5
KEPT = ("value", "standard_error", "count", "details")  # of a record

HEAD = """# Boxes

The [tutorial](../tutorials/boxes.md), run as it stands: the quickstart's language model and frozen tower, trained for {steps}
steps of stage 2 on 8,000 compositions of shapes whose boxes are exactly known, and asked for each of the {count} shapes of 400
others. "Blank" shows the same model grey pictures of the same size: what it answers unseeing. Errors are those of a bootstrap
over pictures.

```bash
python examples/boxes/measure.py --runs runs/boxes       # this page, from `data/boxes.json`
```
"""


def gather(runs: Path) -> dict:
    """The scores below `runs`, and what the run was. FileNotFoundError where a step of the tutorial is missing."""
    steps = [json.loads(line) for line in (runs / "stage2" / "steps.jsonl").read_text().splitlines()]
    scores = {shown: _record(runs / folder / TASK / "scores.json") for shown, folder in ASKED.items()}
    return {
        "steps": steps[-1]["iteration"],
        "samples": sum(step["samples"] for step in steps),
        "final_loss": round(sum(step["loss"] for step in steps[-50:]) / len(steps[-50:]), 4),
        "training_minutes": round(sum(step["step_seconds"] for step in steps) / 60, 1),
        "cores": len(os.sched_getaffinity(0)),
        "scores": scores,
    }


def _record(path: Path) -> dict:
    record = json.loads(path.read_text())
    return {name: record[name] for name in KEPT}


def page(data: dict) -> str:
    """The whole page."""
    scores = data["scores"]
    rows = [_row(shown, scores[shown]) for shown in ASKED]
    seen, unseen = (scores[shown] for shown in ASKED)
    return "\n".join(
        [
            HEAD.format(steps=data["steps"], count=seen["count"]),
            f"| shown, % of the answers | IoU@0.5 | {' | '.join(SHOWN)} |",
            "|---" * (2 + len(SHOWN)) + "|",
            *rows,
            "",
            f"With the picture {seen['value']:.1f} % of the boxes are right, without it {unseen['value']:.1f} %. The tower "
            "sees 6 x 6 patches, so a shape is one to three patches wide, and its edges lie inside of them.",
            "",
            f"One run of {data['steps']} steps ({data['samples']:,} conversations; loss of the last 50 steps "
            f"{data['final_loss']:.3f}), {data['training_minutes']:.0f} minutes on a machine with {data['cores']} cores "
            "that others used as well.",
            "",
        ]
    )


def _row(shown: str, scores: dict) -> str:
    found = [f"{scores['value']:.1f} ± {scores['standard_error']:.1f}"]
    found += [f"{scores['details'][name]:.1f}" for name in SHOWN]
    return f"| {' | '.join([shown, *found])} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="what the tutorial's commands left")
    runs = parser.parse_args().runs
    file = DOCS / DATA
    if runs:
        file.write_text(json.dumps(gather(runs), indent=1) + "\n")
    (DOCS / PAGE).write_text(page(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
