"""What quantised exports cost in answers: the quickstart's held-out questions, from bf16, fp8 and int4 weights.

  python -m benchmarks.quantised --run runs/quickstart [--limit 1000]     export, read back, ask; then write data and page
  python -m benchmarks.quantised --run runs/quickstart --models dense     one model; the data of the others stay
  python -m benchmarks.quantised                                          write the page from the data alone

Each kind goes the way of a user: exported (`--layout transformers`), imported again, evaluated by the same scorer. Computation
is in fp32 for all, so that only the weights differ. Data: docs/measurements/data/quantised.json, the answers of each kind that
differ from bf16's included; page: docs/measurements/quantised.md.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

from benchmarks.measure import say
from benchmarks.report import table
from megatron_moellava.commands.evaluate import main as evaluate
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.evaluation.quickstart.metrics import normalise

DOCS = Path(__file__).parents[1] / "docs" / "measurements"
DATA, PAGE = DOCS / "data" / "quantised.json", DOCS / "quantised.md"
EXACT = "bf16"
RUNS = {"stage3": "MoE, top-2 of 4", "dense": "dense"}
KINDS = {EXACT: None, "fp8": "fp8", "int4": "int4"}
HEAD = """# Quantised exports

Made from `data/quantised.json` by `python -m benchmarks.quantised`; `--run runs/quickstart` measures again. The quickstart's
checkpoints named below are exported with `--layout transformers --dtype bfloat16`, without and with `--quantize`, imported
again and asked the first {count:,} of easy-VQA's held-out questions, greedily, in fp32 over the rounded weights. "Changed"
counts the questions that are right with one and wrong with the other; a difference of accuracies over the same questions has
the standard error that follows from these counts alone."""
TAIL = """The model is tiny (4 layers of 128) and its task is solved, so that rounding shows only in questions at the edge; what
it costs a large model on open questions is not measured here. File sizes are of the whole export; tower, projector, embeddings
and output layer, which keep their dtype, are much of so small a model. No change in 1,000
questions still leaves room for 0.3 % (95 % confidence)."""


def measure_run(run: Path, name: str, limit: int) -> dict:
    """{kind: {right, bytes, changed: questions that became right, became wrong}}"""
    tokenizer, found, exact = run / "language_model", {}, {}
    for kind, quantize in KINDS.items():
        say(f"{name}, {kind}")
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            export_checkpoint(
                run / name,
                save=place / "export",
                layout="transformers",
                tokenizer=tokenizer,
                dtype="bfloat16",
                quantize=quantize,
            )
            import_checkpoint(place / "export", save=place / "run")
            size = sum(file.stat().st_size for file in (place / "export").glob("*.safetensors"))
            right = ask(place / "run", tokenizer, run / "data", place / "eval", limit)
        exact = exact or right
        better, worse = (
            [question for question, ok in right.items() if ok == now != exact[question]] for now in (True, False)
        )
        found[kind] = {"right": sum(right.values()), "bytes": size, "became_right": better, "became_wrong": worse}
    return found


def ask(checkpoint: Path, tokenizer: Path, data: Path, out: Path, limit: int) -> dict[str, bool]:
    """{question: whether the answer is right}"""
    command = ["--benchmark", "quickstart", "--precision", "fp32", "--limit", limit, "--out", out]
    command += ["--load", checkpoint, "--tokenizer", tokenizer, "--data", data, "--template", "short"]
    assert evaluate([str(part) for part in command]) == 0
    truth = {str(row["question_id"]): row["answer"] for row in map(json.loads, (data / "test.jsonl").open())}
    (file,) = out.glob("**/predictions.jsonl")
    said = {str(row["question_id"]): row["text"] for row in map(json.loads, file.open())}
    assert len(said) == limit
    return {question: normalise(text) == normalise(truth[question]) for question, text in said.items()}


def page(data: dict) -> str:
    """The page from the data."""
    count, rows = data["count"], []
    for run, kinds in data["runs"].items():
        for kind, row in kinds.items():
            share = row["right"] / count
            better, worse = len(row["became_right"]), len(row["became_wrong"])
            difference = 100 * (better - worse) / count
            error = 100 * math.sqrt(max(better + worse - (better - worse) ** 2 / count, 0)) / count
            rows.append(
                [
                    RUNS[run],
                    kind,
                    f"{row['bytes'] / kinds[EXACT]['bytes']:.2f}",
                    f"{100 * share:.2f} ± {100 * math.sqrt(share * (1 - share) / count):.2f}",
                    "" if kind == EXACT else f"{difference:+.2f} ± {error:.2f}",
                    "" if kind == EXACT else f"{better} right, {worse} wrong",
                ]
            )
    head = ["model", "weights", "file size, relative", "accuracy (%) ± standard error", "less bf16's", "changed to"]
    return "\n\n".join([HEAD.format(count=count), table(head, rows), TAIL]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished quickstart; none: write the page alone")
    parser.add_argument("--limit", type=int, default=1000, help="questions, the first ones (1000)")
    parser.add_argument("--models", nargs="+", choices=RUNS, default=list(RUNS), help="checkpoints of the run (all)")
    parsed = parser.parse_args()
    if parsed.run:
        data: dict = {"count": parsed.limit, "runs": {}}
        if set(parsed.models) < set(RUNS):
            data = json.loads(DATA.read_text())
            if data["count"] != parsed.limit:
                parser.error(f"the others were asked {data['count']} questions; give --limit {data['count']}")
        for name in parsed.models:
            data["runs"][name] = measure_run(parsed.run, name, parsed.limit)
            DATA.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(page(json.loads(DATA.read_text())))


if __name__ == "__main__":
    main()
