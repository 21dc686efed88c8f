"""What the quickstart leaves behind: a table, summary.json, and two pictures."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

from names_report import plot_names, print_names_table, running_mean, summarise_names

SHORT = {
    "stage1": "stage 1",
    "stage2": "stage 2",
    "stage3": "stage 3\nMoE",
    "dense": "stage 2\ncontinued",
}
COLOURS = {
    "stage1": "tab:blue",
    "stage2": "tab:orange",
    "stage3": "tab:green",
    "dense": "tab:gray",
}
PACKAGES = ("torch", "megatron-core", "megatron-energon", "transformers", "sentencepiece")


def write_report(out: Path, arguments, plan: dict, titles: dict, results: dict, seconds: dict) -> None:
    """summary.json, the pictures and the tables on the screen."""
    import numpy as np

    from megatron_moellava.analysis.plots import plot_expert_load

    steps = {name: read_steps(out / name) for name in plan}
    summary = summarise(out, arguments, plan, results, seconds, steps)
    if arguments.preset == "names":
        summary["names"] = summarise_names(out, results)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    plot_curves(steps, summary, titles, out / "curves.png")
    if "names" in summary:
        plot_names(out, steps, summary, titles)
    moe = results["stage3"]
    plot_expert_load(
        np.array(moe["expert_load"]), moe["moe_layers"], out / "expert_load.png", "Where the held-out tokens go"
    )
    print_table(summary, titles)
    if "names" in summary:
        print_names_table(summary, titles, out)
    names = ["names.png"] if "names" in summary else []
    print("\n" + "  ".join(f"{out}/{file}" for file in ("summary.json", "curves.png", *names, "expert_load.png")))
    print(f"tensorboard --logdir {out}")


def read_steps(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "steps.jsonl").open()]


def summarise(out: Path, arguments, plan: dict, results: dict, seconds: dict, steps: dict) -> dict:
    from megatron_moellava import __version__
    from megatron_moellava.evaluation.quickstart.metrics import QuestionOnlyBaseline, compare_blanked, questions_of
    from megatron_moellava.evaluation.quickstart.metrics import score_quickstart as score

    answered, blanked, every = (results["stage3"][name] for name in ("answered", "blanked", "blanked_every"))
    train = questions_of(json.loads((out / "data" / "conversations.json").read_text()))
    baseline = QuestionOnlyBaseline(train).predict(answered)
    return {
        "preset": arguments.preset,
        "backbone": arguments.backbone,
        "seed": arguments.seed,
        "overrides": arguments.overrides,
        "question_only_baseline": score(baseline),
        "results": {name: results[name]["score"] for name in plan if "score" in results[name]},
        "blanked_pictures": compare_blanked(answered[::every], blanked, baseline[::every]),
        "costs": {name: results[name]["cost"] for name in plan},
        "moe_minus_dense": results["stage3"]["score"]["accuracy"] - results["dense"]["score"]["accuracy"],
        "expert_load": {"moe_layers": results["stage3"]["moe_layers"], "choices": results["stage3"]["expert_load"]},
        "seconds": seconds | {"total": round(sum(seconds.values()), 1)},
        "tokens_per_second": {name: round(tokens_per_second(rows)) for name, rows in steps.items()},
        "steps": {name: len(rows) for name, rows in steps.items()},
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "processor": platform.machine(),
            "python": platform.python_version(),
        },
        "versions": {"megatron-moellava": __version__} | {name: version(name) for name in PACKAGES},
    }


def tokens_per_second(rows: list[dict]) -> float:
    """Real tokens per second of all steps but the first, which pays for warming up."""
    rest = rows[1:] or rows
    tokens = sum(row["tokens_per_second"] * row["step_seconds"] for row in rest)
    return tokens / sum(row["step_seconds"] for row in rest)


def plot_curves(steps: dict, summary: dict, titles: dict, path: Path) -> None:
    """The loss of the three stages (and of the dense continuation) and the held-out accuracy after each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), width_ratios=(1.6, 1))
    first = {"stage1": 0}
    first["stage2"] = len(steps["stage1"])
    first["stage3"] = first["dense"] = first["stage2"] + len(steps["stage2"])
    for name in summary["results"]:
        rows = steps[name]
        x = [first[name] + row["iteration"] for row in rows]
        line = {"color": COLOURS[name], "label": titles[name], "linewidth": 1.5}
        left.plot(x, running_mean([row["loss"] for row in rows]), **line)
    left.set(
        xlabel="optimizer step", ylabel="loss per trained token", yscale="log", title="training loss (running mean)"
    )
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, fontsize="small", frameon=False)
    names = list(summary["results"])
    scores = [summary["results"][name]["accuracy"] for name in names]
    bars = right.bar([SHORT[name] for name in names], scores, color=[COLOURS[name] for name in names])
    right.bar_label(bars, [f"{score:.1f}" for score in scores])
    baseline = summary["question_only_baseline"]["accuracy"]
    right.axhline(baseline, color="k", linestyle="--", linewidth=1)
    right.set(xlabel=f"dashed line: question-only baseline {baseline:.1f}", title="held-out accuracy, easy-VQA")
    right.set(ylim=(0, 109), ylabel="held-out questions right, %")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_table(summary: dict, titles: dict) -> None:
    rows = {"question-only baseline": summary["question_only_baseline"]}
    rows |= {titles[name]: score for name, score in summary["results"].items()}
    types = list(summary["question_only_baseline"]["types"])
    widths = {name: max(12, len(name) + 2) for name in types}
    print(
        f"\n{'held-out questions right, %':42}{'all':>8}"
        + "".join(f"{name:>{width}}" for name, width in widths.items())
        + f"{'exist. F1':>12}"
    )
    for title, score in rows.items():
        cells = "".join(f"{score['types'][name]['accuracy']:{width}.1f}" for name, width in widths.items())
        f1 = score["existence"]["f1"] if score["existence"] else float("nan")
        print(f"{title:42}{score['accuracy']:8.1f}{cells}{f1:12.1f}")
    blanked = summary["blanked_pictures"]
    print(f"{'stage 3 with blank pictures':42}{blanked['blanked']:8.1f}")
    times = ", ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items())
    print(f"\ntime: {times}")
