"""What the quickstart asks and shows of the names benchmark: answers, the tower's ceiling, costs of every run, the table."""

import json
from pathlib import Path


def ask_names(trainer, run, out: Path, name: str) -> dict:
    """Held-out questions about names to the trained model; {"score", "answered"}, and OUT/name/names_predictions.jsonl."""
    import torch.distributed as dist

    from megatron_moellava.evaluation.quickstart.names import score_names
    from megatron_moellava.experiments.stage import ask_closed

    data = out / "data"
    rows = read_lines(data / "names_test.jsonl")
    answered = ask_closed(trainer, run, rows, data / "images").answered
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
    from megatron_moellava.evaluation.quickstart.metrics import QuestionOnlyBaseline, questions_of
    from megatron_moellava.evaluation.quickstart.names import paired_bits, score_names

    asked = {name: result["names"] for name, result in results.items() if "names" in result}
    train = questions_of(json.loads((out / "data" / "names.json").read_text()))
    questions = [{key: row[key] for key in ("question", "answer", "type")} for row in asked["dense"]["answered"]]
    saved, error = paired_bits(asked["stage3"]["answered"], asked["dense"]["answered"])
    exact = {name: asked[name]["score"]["exact"] for name in asked}
    return {
        "question_only_baseline": score_names(QuestionOnlyBaseline(train).predict(questions)),
        "tower_ceiling": json.loads((out / "ceiling" / "ceiling.json").read_text()),
        "results": {name: one["score"] for name, one in asked.items()},
        "moe_minus_dense": {"exact": exact["stage3"] - exact["dense"], "bits_saved": saved, "standard_error": error},
        "example": example_of(asked["stage3"]["answered"]),
    }


def example_of(answered: list[dict]) -> dict:
    """A held-out picture that the model names in English, the surest first; any other where there is none."""
    from megatron_moellava.evaluation.quickstart.metrics import normalise

    def rank(row: dict) -> tuple[bool, bool, float]:
        return normalise(row["prediction"]) != normalise(row["answer"]), row["type"] != "name en", row["loss"]

    best = min(answered, key=rank)
    return {key: best[key] for key in ("image", "question", "answer", "prediction")}


def print_names_table(summary: dict, titles: dict[str, str], out: Path) -> None:
    """Both benchmarks beside what a token costs in every run."""
    names, costs = summary["names"], summary["costs"]
    easy = {name: f"{score['accuracy']:.1f}" for name, score in summary["results"].items()}
    baseline, ceiling = names["question_only_baseline"], names["tower_ceiling"]
    easy_baseline = f"{summary['question_only_baseline']['accuracy']:.1f}"
    rows = [("question-only baseline", easy_baseline, f"{baseline['exact']:.1f}", "", "", "")]
    for name in ("stage2", "names", "dense", "stage3"):
        score = names["results"].get(name)
        cost = costs[name]
        rows.append(
            (
                titles[name],
                easy[name],
                f"{score['exact']:.1f}" if score else "",
                f"{score['bits_per_fact']:.2f}" if score else "",
                f"{cost['flops_per_token'] / 1e6:.2f}",
                f"{cost['activated'] / 1e6:.2f} / {cost['total'] / 1e6:.2f}",
            )
        )
    rows.append(("the tower's own retrieval (ceiling)", "", f"{ceiling['exact']:.1f}", "", "", ""))
    heads = ("", "easy-VQA %", "names exact %", "bits/fact", "MFLOPs/token", "M params (act. / all)")
    widths = (11, 14, 10, 13, 22)
    print()
    for row in (heads, *rows):
        print(f"{row[0]:40}" + "".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths, strict=True)))
    gap = names["moe_minus_dense"]
    print(
        f"\nMoE against dense on names, at equal FLOPs per token: {gap['exact']:+.1f} % exact, "
        f"{gap['bits_saved']:.2f} ± {gap['standard_error']:.2f} bits per fact saved"
    )
    example = names["example"]
    print(f"try: make chat ARGS='--image {out}/data/images/{example['image']}'   then: {example['question']}")
