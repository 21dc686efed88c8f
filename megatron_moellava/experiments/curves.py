"""What a run's log files say about it: the loss it ends at, and how calmly it got there. Free of torch."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

WINDOW = 30  # steps before, whose median is the expected loss
SPIKE = 2.0  # times that median, and
MARGIN = 0.1  # nats above it: small losses differ more from batch to batch
LAST = 0.1  # share of the steps whose mean is the final loss


def read_lines(file: Path) -> list[dict]:
    """Complete lines, later ones of the same iteration last (a run that was continued repeats some)."""
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text().split("\n")[:-1] if line]
    return list({row["iteration"]: row for row in rows}.values())


def curve_numbers(folder: Path) -> dict[str, float]:
    """Numbers of a finished (or diverged) run, from steps.jsonl and routing.jsonl."""
    steps = read_lines(folder / "steps.jsonl")
    losses = [row["loss"] for row in steps]
    numbers: dict[str, float] = {
        "steps": len(steps),
        "final_loss": final_loss(losses),
        "peak_loss": max((loss for loss in losses if math.isfinite(loss)), default=math.nan),
        "loss_spikes": loss_spikes(losses),
        "skipped_steps": sum(row.get("skipped", 0.0) > 0 for row in steps),
        "largest_gradient": max(
            (row["grad_norm"] for row in steps if math.isfinite(row["grad_norm"])), default=math.nan
        ),
        "train_minutes": sum(row["step_seconds"] for row in steps) / 60,
    }
    return numbers | routing_numbers(read_lines(folder / "routing.jsonl"))


def sample_length(steps: Sequence[dict]) -> float:
    """Mean tokens of a sample that was trained on, padding not counted; 0 without steps."""
    samples = sum(row["samples"] for row in steps)
    return sum(row["tokens_per_second"] * row["step_seconds"] for row in steps) / samples if samples else 0.0


def final_loss(losses: Sequence[float]) -> float:
    """Mean of the last losses of a run (share `LAST`); NaN when there are none."""
    last = losses[-max(1, round(len(losses) * LAST)) :]
    return statistics.fmean(last) if last else math.nan


def loss_spikes(losses: Sequence[float]) -> int:
    """Steps whose loss is far above what the steps before make one expect, or not finite; a run of them counts once.

    >>> 30 steps at 1.0, then 3.0 3.0 1.0 -> 1
    """
    spikes, inside = 0, False
    for number, loss in enumerate(losses):
        before = [value for value in losses[max(0, number - WINDOW) : number] if math.isfinite(value)]
        expected = statistics.median(before) if len(before) >= WINDOW // 2 else math.inf
        is_high = not math.isfinite(loss) or loss > max(SPIKE * expected, expected + MARGIN)
        spikes += is_high and not inside
        inside = is_high
    return spikes


def routing_numbers(records: Sequence[dict]) -> dict[str, float]:
    """Of the last quarter of the observations: busiest expert over the mean, lowest entropy, idle experts; drops."""
    if not records:
        return {}
    late = records[-max(1, len(records) // 4) :]
    layers = [layer for record in late for layer in record["layers"]]
    last = late[-1]["layers"]
    asked = [[kept + lost for kept, lost in zip(layer["choices"], layer["dropped"], strict=True)] for layer in last]
    dropped, total = sum(sum(layer["dropped"]) for layer in layers), sum(sum(layer["choices"]) for layer in layers)
    return {
        "max_load": statistics.fmean(max(layer["max_load"] for layer in record["layers"]) for record in late),
        "worst_max_load": max(layer["max_load"] for record in records for layer in record["layers"]),
        "router_entropy": statistics.fmean(layer["entropy"] for layer in layers),
        "dead_experts": sum(count * len(counts) < 0.01 * sum(counts) for counts in asked for count in counts),
        "dropped_share": dropped / max(dropped + total, 1),
    }
