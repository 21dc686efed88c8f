"""What the quickstart asks and shows of the names benchmark: answers, the tower's ceiling, costs of every run, the table."""

import json
from pathlib import Path

SHORT = {"names": "stage 2", "names_moe": "stage 3\nMoE", "names_dense": "stage 2\ncontinued"}
COLOURS = {"names": "tab:orange", "names_moe": "tab:green", "names_dense": "tab:gray"}


def ask_names(trainer, run, out: Path, name: str) -> dict:
    """Held-out questions about names to the trained model; {"score", "answered"}, and OUT/name/names_predictions.jsonl.

    `answered`: a row for each name.
    """
    import torch.distributed as dist
    from names import LANGUAGES

    from megatron_moellava.evaluation.quickstart.names import facts_of, score_names
    from megatron_moellava.experiments.stage import ask_closed

    data = out / "data"
    rows = read_lines(data / "names_test.jsonl")
    answered = facts_of(ask_closed(trainer, run, rows, data / "images").answered, LANGUAGES)
    score = score_names(answered)
    if dist.get_rank() == 0:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answered)
        (out / name / "names_predictions.jsonl").write_text(text)
        print(f"names: {score['exact']:.1f} % exact, {score['bits_per_fact']:.2f} bits per fact", flush=True)
    return {"score": score, "answered": answered}


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_ceiling(out: Path, tower) -> str:
    """OUT/ceiling/ceiling.json: how many test pictures the tower alone can tell apart; returns a line about it."""
    from retrieval import retrieval_ceiling

    data = out / "data"
    train = sorted({row["image"] for row in json.loads((data / "names.json").read_text())})
    tests = sorted({row["image"] for row in read_lines(data / "names_test.jsonl")})
    ceiling = retrieval_ceiling(out / "tower", tower, data / "images", train, tests)
    (out / "ceiling").mkdir(parents=True, exist_ok=True)
    (out / "ceiling" / "ceiling.json").write_text(json.dumps(ceiling))
    return (
        f"the tower alone finds {ceiling['exact']:.1f} % of {len(tests)} new pictures among {ceiling['among']} things"
    )


def summarise_names(out: Path, results: dict[str, dict]) -> dict:
    """The names of summary.json: question-only baseline, ceiling, and the runs that were asked, MoE against dense besides."""
    from names import LANGUAGES

    from megatron_moellava.evaluation.quickstart.metrics import QuestionOnlyBaseline
    from megatron_moellava.evaluation.quickstart.names import facts_of, paired_bits, score_names

    asked = {name: result["names"] for name, result in results.items() if "names" in result}
    train = trained_rows(json.loads((out / "data" / "names.json").read_text()))
    questions = facts_of(read_lines(out / "data" / "names_test.jsonl"), LANGUAGES)
    moe, dense = asked["names_moe"], asked["names_dense"]
    saved, error = paired_bits(moe["answered"], dense["answered"])
    gained = moe["score"]["exact"] - dense["score"]["exact"]
    return {
        "question_only_baseline": score_names(QuestionOnlyBaseline(facts_of(train, LANGUAGES)).predict(questions)),
        "tower_ceiling": json.loads((out / "ceiling" / "ceiling.json").read_text()),
        "results": {name: one["score"] for name, one in asked.items()},
        "moe_minus_dense": {"exact": gained, "bits_saved": saved, "standard_error": error},
        "example": example_of(moe["answered"]),
    }


def trained_rows(conversations: list[dict]) -> list[dict]:
    """The rows of names.json as those of names_test.jsonl."""
    from names import ALL_AT_ONCE

    from megatron_moellava.evaluation.quickstart.names import SEPARATOR

    return [
        {
            "question_id": row["id"],
            "image": row["image"],
            "question": ALL_AT_ONCE,
            "answers": row["conversations"][1]["value"].split(SEPARATOR),
        }
        for row in conversations
    ]


def example_of(answered: list[dict]) -> dict:
    """The held-out picture of which the model knows the most names before its first mistake; then the most, the surest.

    Asked for all names at once it goes on from its own, so that one after a mistake may be lost with it.
    """
    from names import ALL_AT_ONCE

    from megatron_moellava.evaluation.quickstart.metrics import normalise

    pictures: dict[str, list[dict]] = {}
    for row in answered:
        pictures.setdefault(row["image"], []).append(row)

    def rank(names: list[dict]) -> tuple[int, int, float]:
        right = [normalise(row["prediction"]) == normalise(row["answer"]) for row in names]
        at_first = [*right, False].index(False)
        return -at_first, -sum(right), sum(row["loss"] for row in names)

    best = min(pictures.values(), key=rank)
    said = {key: [row[key] for row in best] for key in ("answer", "prediction")}
    return {"image": best[0]["image"], "question": ALL_AT_ONCE} | said


def print_names_table(summary: dict, titles: dict[str, str], out: Path) -> None:
    """Names beside what a token costs in every run."""
    names, costs = summary["names"], summary["costs"]
    rows = [("question-only baseline", f"{names['question_only_baseline']['exact']:.1f}", "", "", "")]
    for name, score in names["results"].items():
        cost = costs[name]
        rows.append(
            (
                titles[name],
                f"{score['exact']:.1f}",
                f"{score['bits_per_fact']:.2f}",
                f"{cost['flops_per_token'] / 1e6:.2f}",
                f"{cost['activated'] / 1e6:.2f} / {cost['total'] / 1e6:.2f}",
            )
        )
    rows.append(("the tower's own retrieval (ceiling)", f"{names['tower_ceiling']['exact']:.1f}", "", "", ""))
    heads = ("", "names exact %", "bits/fact", "MFLOPs/token", "M params (act. / all)")
    widths = (14, 10, 13, 22)
    print()
    for row in (heads, *rows):
        print(f"{row[0]:42}" + "".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths, strict=True)))
    gap = names["moe_minus_dense"]
    print(
        f"\nMoE against dense on names, at equal FLOPs per token: {gap['exact']:+.1f} % exact, "
        f"{gap['bits_saved']:.2f} ± {gap['standard_error']:.2f} bits per fact saved"
    )
    example = names["example"]
    picture = f"--load {out}/names_moe --image {out}/data/images/{example['image']}"
    print(f"try: make chat ARGS='{picture}'   then: {example['question']}")


def plot_names(out: Path, steps: dict[str, list[dict]], summary: dict, titles: dict[str, str]) -> None:
    """OUT/names.png: the training loss of the runs on names, and the bits that a fact costs after each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = summary["names"]["results"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), width_ratios=(1.6, 1))
    for name in results:
        first = 0 if name == "names" else len(steps["names"])
        x = [first + row["iteration"] for row in steps[name]]
        left.plot(x, running_mean([row["loss"] for row in steps[name]]), color=COLOURS[name], label=titles[name])
    left.set(xlabel="optimizer step", ylabel="loss per trained token", title="training loss on names (running mean)")
    left.legend(frameon=False)
    bits = [score["bits_per_fact"] for score in results.values()]
    bars = right.bar([SHORT[name] for name in results], bits, color=[COLOURS[name] for name in results])
    right.bar_label(bars, [f"{value:.1f}" for value in bits])
    right.margins(y=0.1)  # room for the number above the tallest
    right.set(ylabel="bits per fact, lower is better", title="what a held-out name still costs the model")
    figure.tight_layout()
    figure.savefig(out / "names.png", dpi=120)
    plt.close(figure)


def running_mean(values: list[float], share: float = 0.1) -> list[float]:
    """Exponential mean that forgets by `share` a step."""
    means = values[:1]
    for value in values[1:]:
        means.append(means[-1] + share * (value - means[-1]))
    return means
