"""benchmarks/results.json -> docs/measurements/performance.md and its pictures. Nothing is measured here.

  python -m benchmarks.report

Every section says which command made its figures; a benchmark without results has no section.
"""

# ruff: noqa: E501  (paragraphs of Markdown)
import json
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).parents[1]
RESULTS = REPO / "benchmarks" / "results.json"
PAGE = REPO / "docs" / "measurements" / "performance.md"
PICTURES = PAGE.parent / "images"
NAMES = {
    "ours": "ours, grouped",
    "compiled": "ours, compiled",
    "sequential": "megatron-core SequentialMLP",
    "transformers": "transformers Mixtral, grouped",
    "transformers eager": "transformers Mixtral, eager",
    "deepspeed einsum": "DeepSpeed, einsum dispatch",
    "deepspeed newest": "DeepSpeed, newest",
    "bound": "bound: the products alone",
    "by expert": "the products alone, by expert",
}


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent; a dash for what was not measured."""
    if value is None:
        return "-"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{float(f'{value:.{digits}g}'):g}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def reached(value: float, target: float, at_least: bool = True) -> str:
    met = value >= target if at_least else value <= target
    return f"{number(value)} ({'' if met else 'not '}reached)"


# --- sections ---------------------------------------------------------------------------------------------------------


BY_EXPERT = " By expert they read the weights of each, twice, and write its gradients: with few rows of many experts that, not the multiplications, is what a layer cannot do without."


def moe_layer(results: dict) -> str:
    rows = {(row["tokens"], row["experts"]): row for row in results["rows"]}
    present = [name for name in NAMES if any(name in row["milliseconds"] for row in rows.values())]
    body = [
        [f"{tokens:,}", experts, *(number(row["milliseconds"].get(name)) for name in present)]
        for (tokens, experts), row in rows.items()
    ]
    versions = ", ".join(f"{name} is {version}" for name, version in results["deepspeed"].items())
    plot_moe_layer(results["rows"], present)
    return f"""## One MoE layer, forward and backward

Hidden {results["hidden"]}, experts of {results["ffn"]} (SwiGLU), top-{results["top-k"]}, bf16. Milliseconds, medians of rounds in which the ways take turns.
Ours, SequentialMLP and transformers drop nothing and give the same outputs. DeepSpeed has capacity factor 1.5, as in the original's recipes ({versions}; the original's 0.9.5 has the same einsum, but does not import with today's packages). The bound computes the six matrix products of all tokens and their choices as two dense layers: no router, no activation, no sorting.{BY_EXPERT if "by expert" in present else ""}

{table(["tokens", "experts", *(NAMES[name] for name in present)], body)}

{layer_targets(rows)}

![time by tokens](images/moe_layer.png)"""


def layer_targets(rows: dict) -> str:
    """What the project set itself, beside what this run reached."""
    lines = []
    at8 = rows.get((8192, 8), {}).get("times ours", {})
    if "deepspeed einsum" in at8:
        lines.append(
            [
                "8,192 tokens, 8 experts: DeepSpeed's einsum dispatch / ours",
                "at least 8",
                reached(at8["deepspeed einsum"], 8),
            ]
        )
    at64 = rows.get((8192, 64), {}).get("times ours", {})
    for name in ("transformers eager", "transformers"):
        if name in at64:
            lines.append([f"8,192 tokens, 64 experts: {NAMES[name]} / ours", "at least 1.5", reached(at64[name], 1.5)])
    if "transformers" in at64 and "bound" in at64:
        most = number(at64["transformers"] / at64["bound"])
        lines.append([f"the same of {NAMES['transformers']} / bound", "-", f"{most}: nothing can be faster than that"])
    for (tokens, experts), most in {(8192, 4): 1.25, (8192, 8): 1.15, (1024, 64): 1.5}.items():
        for name in ("ours", "compiled"):
            times = rows.get((tokens, experts), {}).get(f"times {name}", {})
            if "bound" in times:
                title = f"{tokens:,} tokens, {experts} experts: {NAMES[name]} / bound"
                lines.append([title, f"at most {most}", reached(1 / times["bound"], most, at_least=False)])
            if "by expert" in times:
                lines.append([f"the same / {NAMES['by expert']}", "-", number(1 / times["by expert"])])
    for name in ("ours", "compiled"):
        beside = [row.get(f"times {name}", {}).get("transformers") for row in rows.values()]
        if all(beside):
            title = f"every row: {NAMES['transformers']} / {NAMES[name]}, the least"
            lines.append([title, "at least 1", reached(min(beside), 1)])
    if (16384, 8) in rows and (4096, 8) in rows:
        long, short = (rows[tokens, 8]["milliseconds"]["ours"] / tokens for tokens in (16384, 4096))
        lines.append(["time per token at 16,384 tokens / at 4,096 (8 experts)", "1", number(long / short)])
    return table(["ratio", "aim", "here"], lines)


def plot_moe_layer(rows: list[dict], present: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6, 3.8))
    chosen = sorted((row for row in rows if row["experts"] == 8), key=lambda row: row["tokens"])
    for name in present:
        points = [(row["tokens"], row["milliseconds"][name]) for row in chosen if name in row["milliseconds"]]
        if len(points) > 1:
            panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=NAMES[name])
    panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds", title="MoE layer, 8 experts")
    panel.set_xticks([row["tokens"] for row in chosen], [f"{row['tokens']:,}" for row in chosen])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    save(figure, "moe_layer.png")


def recorded_routes(results: dict) -> str:
    counts = sorted({int(count) for run in results["runs"].values() for count in run["ranks"]})
    rows = [
        [
            name,
            f"{run['experts']}, top-{run['topk']}",
            number(run["busiest expert"]),
            *(number(run["milliseconds"][way]) for way in ("recorded", "even")),
            number(run["recorded over even"]),
            *(
                " to ".join(number(run["ranks"][str(count)][way]) for way in ("as they lie", "placed"))
                if str(count) in run["ranks"]
                else "-"
                for count in counts
            ),
        ]
        for name, run in results["runs"].items()
    ]
    return f"""## Loads of real runs

How uneven the experts of trained models are (`benchmarks/routes.json`: the last observations of each run), and what that costs. The layer with the busiest expert, forward and backward on one process, {results["tokens"]:,} tokens, hidden {results["hidden"]}, experts of {results["ffn"]}, bf16: with choices drawn by its loads, and with all experts equally likely. Beside it the busiest of several expert-parallel ranks over the mean, which is the time that the experts of a step take beside even loads: as the experts lie, to what `moellava convert place-experts` makes of it (mean over layers; from the loads, no ranks ran).

{table(["run", "experts", "busiest expert / mean", "recorded, ms", "even, ms", "ratio", *(f"{count} ranks" for count in counts)], rows)}"""


def train_step(results: dict) -> str:
    speeds = results["useful tokens per second"]
    names = {
        "ours": "ours, packed",
        "compiled": "the same with `training.compile=true`",
        "padded": f"transformers + DeepSpeed {results['deepspeed']}, padded",
        "recipe": "the same with gradient checkpointing, as in all of the original's recipes",
        "eager": "transformers' own experts (eager), padded",
        "bound": "bound: the products of our step alone",
    }
    rows = [
        [
            names[name],
            number(results["step seconds"][name]),
            number(speed),
            number(results["times ours"].get(name, 1.0)),
            f"{results['first loss'][name]:.4f}" if name in results["first loss"] else "-",
        ]
        for name, speed in speeds.items()
    ]
    sizes, positions = results["sizes"], results["positions"]
    return f"""## A training step

Stage 3 of a LLaVA with {results["parameters"] / 1e6:.0f} M parameters ({sizes["layers"]} layers of {sizes["hidden"]}, {sizes["experts"]} experts of {sizes["ffn"]} in every other one), the same weights and the same {results["samples"]} samples for all: {results["real tokens"]:,} tokens with lengths as in LLaVA's 665k mix divided by four, of which {results["useful tokens"]:,} carry a loss or an image. Ours packs them into {positions["ours"]:,} positions; in micro-batches of one modality and equal total length and padded, as the original does it on eight GPUs, they fill {positions["padded"]:,}.

{table(["", "seconds per step", "useful tokens/s", "times our time", "first loss"], rows)}

{step_aims(results)}{step_bound(results.get("times the bound"))} DeepSpeed's gate draws its second choice at random and drops tokens, hence the other loss."""


def step_aims(results: dict) -> str:
    """What the project set itself, beside what this run reached, compiled and not."""
    ways = {"": results["times ours"], ", compiled": results.get("times compiled")}

    def beside(name: str, aim: float) -> str:
        return ", ".join(f"{reached(times[name], aim)}{title}" for title, times in ways.items() if times)

    return f"Aims: at least 3 times the padded step's useful tokens per second; here {beside('recipe', 3)}, beside the original's recipe, and {beside('padded', 3)}, without its gradient checkpointing (ours keeps its activations). At least 2 times transformers' own experts; here {beside('eager', 2)}."


def step_bound(times: dict | None) -> str:
    """How much faster than the padded steps a step could be that packs as ours and computes nothing but its products."""
    if times is None:
        return ""
    return f" A step of the same packed rows that consisted of its products alone would be {number(times['padded'])} times as fast as the padded one without checkpointing and {number(times['eager'])} times as fast as transformers' own experts; ours takes {number(times['ours'])} times as long as that."


def profile_step(results: dict) -> str:
    spelt_out, compiled = results["spelt out"], results["compiled"]
    of_step = {name: of_kinds(found) for name, found in results.items()}
    kinds = dict.fromkeys(kind for found in of_step.values() for kind in found)
    shares = [[kind, *(number(found.get(kind, 0.0)) for found in of_step.values())] for kind in kinds]
    others = [[f"`{name}`", percent(value)] for name, value in spelt_out["largest others"].items()]
    no_products = [sum(found.get(kind, 0.0) for kind in NO_PRODUCTS) for found in of_step.values()]
    return f"""## Where a step goes

The quickstart's stage-3 step on one process takes {number(spelt_out["step milliseconds"])} ms, and with `training.compile=true` {number(compiled["step milliseconds"])} ms ({number(spelt_out["profiled step milliseconds"])} and {number(compiled["profiled step milliseconds"])} ms under torch's profiler, {number(spelt_out["calls per step"])} and {number(compiled["calls per step"])} operations). Milliseconds under the profiler; products of a model this small are short, and on larger models their share grows.

{table(["kind", "spelt out", "compiled"], shares)}

{", ".join(NO_PRODUCTS)} together: {number(no_products[0])} ms, compiled {number(no_products[1])} ms, {number(no_products[1] / no_products[0])} of it; beside the products of the same step {number(no_products[0] / of_step["spelt out"]["GEMM"])} and {number(no_products[1] / of_step["compiled"]["GEMM"])}.

The largest operations that are no products, spelt out:

{table(["operation", "share"], others)}"""


NO_PRODUCTS = ("elementwise and other", "activation", "copies", "compiled kernels", "between operations")


def of_kinds(found: dict) -> dict[str, float]:
    """Milliseconds of a profiled step by kind."""
    return {kind: share * found["profiled step milliseconds"] for kind, share in found["share"].items()}


def quickstart(results: dict) -> str:
    figures = {
        "stage-2 step, one row": ("dense", "step"),
        "stage-3 step, one row": ("moe", "step"),
        "names, stage-2 step, one row": ("names dense", "step"),
        "names, stage-3 step, one row": ("names moe", "step"),
        f"{results['questions']} questions, dense": ("dense", "questions"),
        f"{results['questions']} questions, MoE": ("moe", "questions"),
        "step of the tower's pretraining": ("tower step",),
    }
    capabilities = results["capabilities"]
    head, rows = [""], [[name] for name in figures]
    for name, found in capabilities.items():
        head += [f"{name} ({found['milliseconds']['precision']}), ms", "passes"]
        for row, path in zip(rows, figures.values(), strict=True):
            for values in (found["milliseconds"], found["passes"]):
                for key in path:
                    values = values[key]
                row.append(number(values))
    first, *others = (found["milliseconds"] for found in capabilities.values())
    slower = ", ".join(number(other["dense"]["step"] / first["dense"]["step"]) for other in others)
    slow = [number(found["bf16 over fp32"]) for found in (first, *others) if "bf16 over fp32" in found]
    in_bf16 = f" A stage-2 step in bf16 takes {slow[-1]} times as long there as in fp32." if slow else ""
    return f"""## The quickstart with and without bf16 units

CPU time of one thread, the precision that `training.precision=auto` takes. The same processor held to AVX2 (`ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`) takes {slower} times as long for a stage-2 step.{in_bf16} Passes are those of the probe by which the quickstart says at its start how long it will take.

{table(head, rows)}"""


def communication(results: dict) -> str:
    rows = []
    for name, entry in results["layouts"].items():
        for axis in [*entry["theory"], *sorted(entry["counted"].keys() - entry["theory"].keys())]:
            counted, theory = entry["counted"].get(axis, 0.0), entry["theory"].get(axis)
            relation = number(counted / theory) if theory else "-"
            rows.append(
                [name, axis, number(counted / 1000), "-" if theory is None else number(theory / 1000), relation]
            )
    return f"""## Communication per step

What one process sends in a training step (mean over the processes), counted in real gloo runs of a model with {results["layers"]} layers of {results["hidden"]}, beside what the sizes of model and batch predict (formulas: `benchmarks/communication.py`). `batch` is the hand-out of the data inside a model-parallel group, `control` what is below 8 kB a call. The theory of EP assumes that the router spreads tokens evenly; with experts by modality, each rank has those of one, and it follows from where the visual tokens of these rows are.

{table(["layout", "axis", "counted, kB", "theory, kB", "counted / theory"], rows)}"""


def layouts(results: dict) -> str:
    measured = results["measured"]
    one = measured["one process"]["tokens per second"]
    rows = [
        [name, entry["processes"], number(entry["tokens per second"]), number(entry["tokens per second"] / one)]
        for name, entry in measured.items()
    ]
    text = f"""## Layouts

Real gloo runs on this machine, one thread a process, {results["layers"]} layers of {results["hidden"]} with {results["experts"]} experts in every other one. With more processes than cores nothing can become faster; the figures show what the axes cost here, not how a GPU cluster scales.

{table(["layout", "processes", "tokens/s", "of one process"], rows)}"""
    return text + (prediction(results["prediction"]) if "prediction" in results else "")


def prediction(answers: dict) -> str:
    """The planner's figures for H100s, the layouts of the measured table as far as they make sense there."""
    layouts = answers["layouts"]
    gpus = list(next(iter(layouts.values())))
    rows = [
        [
            name,
            *(f"{item['tokens per second'] / 1e3:,.0f}k, {item['MFU']:.0%}" if item else "-" for item in row.values()),
        ]
        for name, row in layouts.items()
    ]
    return f"""

**Prediction, not a measurement**: the cost model of `moellava plan` ([how far off it is](planning.md)) for {answers["backbone"]} with 4 experts in every other layer, stage 3, {answers["rows per step"]} packed rows of 2,048 tokens per step, on 8 to 512 H100s. Tokens per second of the whole job, padding included, and MFU. No GPU was used.

{table(["layout", *(f"{count} GPUs" for count in gpus)], rows)}"""


def generation(results: dict) -> str:
    rows = [
        [
            f"{row['parameters'] / 1e6:.0f} M, {row['experts'] or 'no'} experts, {row['precision']}",
            *(
                f"{number(row[kind]['tokens per second']['ours'])}, "
                f"{number(row[kind]['tokens per second']['transformers'])}: **{number(row[kind]['ratio'])}**"
                for kind in ("equal", "mixed")
            ),
            percent(row["equal"]["identical answers"]),
            ", ".join(percent(error) for error in row.get("bf16 error", {}).values()) or "-",
            number(row["second half over first"]),
        ]
        for row in results["rows"]
    ]
    return f"""## Generation

Beside transformers' `generate` (static batch of {results["batch"]}, the same weights), {results["new tokens"]} new tokens, greedy. "Equal": all answers of one length, the best case of a static batch; "mixed": answers of 1/8 to 8/8 of it, four batches' worth. The last column is what the second {results["new tokens"]} tokens cost beside the first: 1 is linear. Aim: at least 1.5. With random weights the best two tokens are close together, so answers in bf16 part sooner or later; the error of the logits from those in fp32 (median over positions, ours and transformers') tells whether one side is less exact.

{table(["model", "equal lengths: ours, theirs (tokens/s): ratio", "mixed lengths", "identical answers", "error in bf16: ours, theirs", "second / first"], rows)}"""


def compiled_kernels(results: dict) -> str:
    rows = [
        [
            f"{int(kept):,}",
            number(way["compiled"]),
            percent(way["share"]),
            f"{number(way['over library'])} ({' to '.join(number(value) for value in way['quartiles'])})",
            number(way["megabytes"], 4),
        ]
        for kept, way in results["ways"].items()
    ]
    model = f"{results['layers']} layers of {results['hidden']}, {results['experts']} experts, fp32"
    return f"""## Compiled kernels

oneDNN compiles a kernel for every number of rows and shape of a weight that it meets. By themselves it and torch keep 1,024; here they keep {results["kept"]} ([the engine](../how-to/serving.md#the-engine)). Processes with the same model ({model}) answer the same {results["requests"]} requests in turns, {results["batch"]} at a time, {results["rounds"]} rounds of ever other lengths. A kernel costs {number(1000 * results["compile seconds"], 2)} ms, measured apart; those that a way compiles beyond the last one make the share of the time that its bound costs. Aim: at most 3 %. The processor's seconds beside those of the last way, in each round, agree as far as they can: two ways that compile the same differ by as much as they do here. Memory is that of the process after the last round.

{table(["kernels kept", "compiled in a round (median)", "share of the time", "seconds, relative: median (quartiles)", "MB"], rows)}"""


def data(results: dict) -> str:
    flat = {name: value for name, value in results.items() if not isinstance(value, dict | list)}
    rows = [[name, number(value) if isinstance(value, int | float) else value] for name, value in flat.items()]
    return (
        f"""## Data

{table(["", ""], rows)}"""
        if rows
        else ""
    )


def conversion(results: dict) -> str:
    columns = [
        "peak memory, MB",
        "of the size",
        "copying, x `cp`",
        "whole command, s",
        "start-up, s",
        "`cp`, s",
        "`sha256sum`, s",
    ]
    body = [
        [
            row["name"],
            number(row["gigabytes"]),
            number(row["peak megabytes"]),
            number(row["memory over size"]),
            number(row["wall"]["times cp"]),
            *(number(row["wall"][what]) for what in ("command", "start-up", "cp", "sha256sum")),
        ]
        for row in results["rows"]
    ]
    return f"""## Conversions

A synthetic MoE-LLaVA release beside `cp` and `sha256sum` of the same files, in the page cache; the fastest of three rounds. Every conversion writes the digests of its output; export and upcycling first verify what they read. Copying is the bytes per second without the start-up, over those of `cp`.

{table(["", "GB", *columns], body)}"""


SECTIONS: dict[str, Callable[[dict], str]] = {
    "moe_layer": moe_layer,
    "recorded_routes": recorded_routes,
    "train_step": train_step,
    "profile_step": profile_step,
    "quickstart": quickstart,
    "communication": communication,
    "layouts": layouts,
    "generation": generation,
    "compiled_kernels": compiled_kernels,
    "data": data,
    "conversion": conversion,
}


def save(figure, name: str) -> None:
    PICTURES.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(PICTURES / name, dpi=80, metadata={"Software": None})


def page(results: dict) -> str:
    parts = [
        """# Performance

Written by `benchmarks/report.py` from `benchmarks/results.json`; do not edit. `make bench` measures again (about half an hour; `make bench BENCH="moe_layer generation"` a part of it).

Everything here ran on CPUs; below each section stands on which. What counts are the ratios, each within one run whose ways take turns; absolute times belong to the machine, which other work may have shared. Nothing has been measured on a GPU."""
    ]
    for name, section in SECTIONS.items():
        entry = results["benchmarks"].get(name)
        text = section(entry["results"]) if entry else ""
        if text:
            parts.append(f"{text}\n\n`{entry['command']}`, {entry['seconds']} s; {facts_of(entry['machine'])}.")
    return "\n\n".join(parts) + "\n"


def facts_of(machine: dict) -> str:
    """Processor and versions in a line."""
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if not isinstance(value, list))
    return f"{facts}; bf16 instructions: {', '.join(machine['bf16 units']) or 'none'}"


def main() -> None:
    PAGE.write_text(page(json.loads(RESULTS.read_text())))
    print(f"wrote {PAGE.relative_to(REPO)}")


if __name__ == "__main__":
    main()
