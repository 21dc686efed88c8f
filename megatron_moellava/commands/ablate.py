"""Run a declared grid of the three-stage recipe over several seeds, and say what it shows.

moellava ablate examples/ablations/topk.yaml --jobs 2            run (or continue) the grid, then table and plot
moellava ablate examples/ablations/topk.yaml --list              its runs, numbered, and which are finished
moellava ablate examples/ablations/topk.yaml --cell $SLURM_ARRAY_TASK_ID    one of them, with what it needs
moellava ablate examples/ablations/*.yaml --report               tables of what is finished; trains nothing
moellava ablate examples/ablations/*.yaml --docs docs/measurements/ablations.md          the same as a document
    --data docs/measurements/data/ablations.jsonl                from results that are kept there, without their runs too

Results go to RUNS/<grid>/: results.jsonl, table.md, plot.png, and curves.png where the grid asks for it. Runs that share
their first stages share them, a finished one is never repeated, and the same command continues. Exit codes: 0, 1 something
failed, 2 the grid is wrong, 85 interrupted.
"""

import argparse
import shlex
import sys
from pathlib import Path

from megatron_moellava.commands.program import add_machine_options, choose_machine, command_parser

DOCS_HEAD = """# Ablations

Made by `moellava ablate --docs` from the results of the grids in `examples/ablations/`; nothing here is written by hand, and a
run that has not been made is not mentioned. Numbers are mean ± standard deviation over seeds. Differences are paired: the
same seed shares weights, stages 1 and 2 and the order of the data. Where cells have different numbers of seeds, compare the
differences, which are of the seeds that both have, and not the means. p is a two-sided paired t-test without correction for
the number of comparisons; "p, Holm" is corrected for all findings of the first table together. The models are the
quickstart's, a million parameters on a CPU: a direction that shows here need not show at the paper's size, and the reverse.

```bash
moellava ablate examples/ablations/topk.yaml --jobs 2               # run or continue a grid
moellava ablate examples/ablations/*.yaml --list                    # every run, numbered, and what is left of it
sbatch --array=0-8 --wrap 'moellava ablate examples/ablations/topk.yaml --cell $SLURM_ARRAY_TASK_ID'
sbatch examples/ablations.sh                                               # stage III at the paper's size
```

A grid is a YAML file: steps that every cell goes through, and the settings that each cell changes. Cells share what they
have in common; a finished step is never repeated. `--steps-scale 0.1` shortens every training, for a first look.
"""

CLAIMS_HEAD = """## What held

"Held" and "the reverse" are differences with p < 0.05 after correction; the noise is the standard deviation of the paired
difference between seeds. With three seeds a difference must be 2.5 times its noise to have p < 0.05 by itself, so that only
large ones are told.

"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of `moellava ablate`."""
    parser = command_parser("ablate", __doc__)
    parser.add_argument("grids", nargs="+", type=Path, metavar="GRID.yaml")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/ablations"), help="all runs and results (runs/ablations)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="instead of the grid's")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="multiplies the steps of every training (1)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1), one thread each")
    parser.add_argument("--processes", type=int, default=1, help="processes of each training (1)")
    parser.add_argument("--list", action="store_true", help="number every run of the grid")
    parser.add_argument("--cell", type=int, metavar="N", help="only run number N of --list")
    parser.add_argument("--only", nargs="+", default=[], metavar="CELL", help="only these cells, by name")
    parser.add_argument("--shell", type=int, metavar="N", help="settings of run number N for examples/ablations.sh")
    parser.add_argument("--report", action="store_true", help="tables and plots of what is finished")
    parser.add_argument("--docs", type=Path, metavar="FILE.md", help="write the report of all grids as a document")
    parser.add_argument(
        "--data", type=Path, metavar="FILE.jsonl", help="with --docs: keep results there, and use those it has"
    )
    parser.add_argument("--node", default="", help=argparse.SUPPRESS)
    add_machine_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run, list or report grids and return the exit code."""
    args = parse_arguments(arguments)
    choose_machine(args)  # the runs inherit it
    from megatron_moellava.config import ConfigError, MoELlavaError
    from megatron_moellava.experiments.grid import load_grid

    try:
        for option in ("jobs", "processes", "steps_scale"):
            if (value := getattr(args, option)) <= 0:
                raise ConfigError(f"--{option.replace('_', '-')} {value} must be greater than 0")
        if args.data and not args.docs:
            raise ConfigError("--data keeps the results of a document: it needs --docs FILE.md")
        if args.data and args.steps_scale != 1:
            raise ConfigError(
                "--data keeps results of whole runs, and --steps-scale shortens them: leave one of them out"
            )
        grids = [load_grid(path, seeds=args.seeds, steps_scale=args.steps_scale) for path in args.grids]
        for name in args.only:
            if not any(name in grid.cells for grid in grids):
                raise ConfigError(
                    f"--only {name} is no cell; cells are {', '.join(c for grid in grids for c in grid.cells)}"
                )
        if args.node:
            return run_one_node(args, grids)
        if args.list:
            return list_runs(args, grids)
        if args.shell is not None:
            return print_shell(args, grids)
        if args.docs:
            return write_document(args, grids)
        code = 0 if args.report else run_grids(args, grids)
        for grid in grids:
            print(write_grid(args, grid))
        return code
    except MoELlavaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def chosen_runs(args, grids) -> list:
    """(grid, cell, seed) in the order of --list."""
    runs = [(grid, cell, seed) for grid in grids for cell, seed in grid.runs() if not args.only or cell in args.only]
    if args.cell is None:
        return runs
    return [number_of(runs, args.cell, "--cell")]


def number_of(runs: list, number: int, option: str):
    """Run `number` of a grid's list; ConfigError, naming `option`, where there is no such run."""
    from megatron_moellava.config import ConfigError

    if not 0 <= number < len(runs):
        raise ConfigError(f"{option} {number} must lie between 0 and {len(runs) - 1}; --list shows the runs")
    return runs[number]


def run_grids(args, grids) -> int:
    """Run what is not yet finished, save results after every node, and return the scheduler's exit code."""
    from megatron_moellava.experiments.schedule import Scheduler, node_command

    shared = [*map(str, args.grids), "--runs", str(args.runs), "--steps-scale", str(args.steps_scale)]
    shared += ["--seeds", *map(str, args.seeds)] if args.seeds else []
    start = node_command(shared, args.processes)
    runs = chosen_runs(args, grids)
    chains = [grid.chain(cell, seed) for grid, cell, seed in runs]
    scheduler = Scheduler(grids[0], args.runs, start, jobs=args.jobs, say=lambda text: print(text, flush=True))
    code = scheduler.run(chains, after=lambda: save_results(args, grids))
    save_results(args, grids)
    return code


def save_results(args, grids) -> None:
    """Write each grid's results.jsonl from what is finished so far."""
    from megatron_moellava.experiments.results import collect, write_results

    for grid in grids:
        write_results(args.runs / grid.name, collect(grid, args.runs))


def run_one_node(args, grids) -> int:
    """Run the node that `--node` names in this process; it is how the scheduler starts one."""
    from megatron_moellava.experiments.nodes import run_node

    for grid in grids:
        for cell, seed in grid.runs():
            for node in grid.chain(cell, seed):
                if node.name == args.node:
                    run_node(grid, args.runs, node)
                    return 0
    raise AssertionError(f"{args.node} is in none of the grids")


def list_runs(args, grids) -> int:
    """Print every run with its number for `--cell` and how much of it is left."""
    from megatron_moellava.experiments.nodes import finished

    for number, (grid, cell, seed) in enumerate(chosen_runs(args, grids)):
        chain = grid.chain(cell, seed)
        left = [node for node in chain if node.kind != "given" and finished(args.runs, node) is None]
        state = "finished" if finished(args.runs, chain[-1]) is not None else f"{len(left)} of {len(chain)} steps left"
        print(f"{number:4}  {grid.name}  {cell}  seed {seed}  {state}")
    return 0


def print_shell(args, grids) -> int:
    """The last two steps of a run, for a script that starts them itself."""
    from megatron_moellava.config import current_names
    from megatron_moellava.experiments.nodes import overrides_of

    grid, cell, seed = number_of(chosen_runs(args, grids), args.shell, "--shell")
    chain = grid.chain(cell, seed)
    upcycle: dict = next((node.settings for node in chain if node.kind == "upcycle"), {})
    moe = current_names(upcycle).get("moe") or {}
    flags = {
        "--num-experts": moe.get("num_moe_experts"),
        "--topk": moe.get("moe_router_topk"),
        "--moe-ffn-hidden-size": moe.get("moe_ffn_hidden_size"),
        "--placement": moe.get("placement"),
    }
    flags |= {"--noise": upcycle.get("noise_std"), "--router-scale": upcycle.get("router_scale")}
    flags |= {"--drop": upcycle.get("drop"), "--select": upcycle.get("select"), "--seed": seed}
    words = [part for flag, value in flags.items() if value is not None for part in (flag, str(value))]
    overrides = [
        *overrides_of({"moe": moe}),
        *overrides_of(chain[-1].settings.get("set") or {}),
        f"training.seed={seed}",
    ]
    name = cell if len(grid.seeds) == 1 else f"{cell}-seed{seed}"
    print(f"NAME={shlex.quote(name)}")
    print(f"UPCYCLE=({shlex.join(words)})")
    print(f"SETTINGS=({shlex.join(overrides)})")
    return 0


def write_grid(args, grid) -> str:
    """Table and plot of a grid; returns the table."""
    from megatron_moellava.experiments.results import collect, write_results
    from megatron_moellava.experiments.tables import report

    rows = collect(grid, args.runs)
    folder = args.runs / grid.name
    write_results(folder, rows)
    if not rows:
        return f"{grid.title}: nothing is finished yet"
    drawn = draw(args, grid, rows, folder)
    (folder / "table.md").write_text(report(grid, rows, *drawn))
    return report(grid, rows)


def draw(args, grid, rows, folder: Path, prefix: str = "") -> list[str]:
    """The pictures of a grid; returns their file names."""
    from megatron_moellava.experiments.tables import plot, plot_curves

    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{prefix}plot.png"]
    plot(grid, rows, folder / names[0])
    curves = folder / f"{prefix}curves.png"
    if grid.curves and any("node" in row for row in rows):  # of kept results the runs may be gone: the picture stays
        plot_curves(grid, rows, args.runs, curves)
    if grid.curves and curves.exists():
        names.append(curves.name)
    return names


def write_document(args, grids) -> int:
    """Write the report of all grids as one Markdown file, its pictures beside it in images/."""
    from megatron_moellava.experiments.tables import claims_table, report

    results = [(grid, rows) for grid, rows in results_of(args, grids) if rows]
    claims = claims_table(results)
    parts = [DOCS_HEAD, *([CLAIMS_HEAD + claims + "\n"] if claims else [])]
    for grid, rows in results:
        drawn = draw(args, grid, rows, args.docs.parent / "images", f"ablation_{grid.name}_")
        parts.append(report(grid, rows, *(f"images/{name}" for name in drawn)))
    if not results:
        parts.append("No grid has been run yet.\n")
    args.docs.parent.mkdir(parents=True, exist_ok=True)
    args.docs.write_text("\n".join(parts))
    print(f"wrote {args.docs}")
    return 0


def results_of(args, grids) -> list[tuple]:
    """(grid, rows) of what is finished below --runs, and with --data of what is kept there, which is written anew."""
    from megatron_moellava.experiments.results import collect, with_kept, write_rows

    rows = [row for grid in grids for row in collect(grid, args.runs)]
    if args.data:
        rows = with_kept(rows, args.data)
        args.data.parent.mkdir(parents=True, exist_ok=True)
        write_rows(args.data, [{key: value for key, value in row.items() if key != "node"} for row in rows])
    return [(grid, [row for row in rows if row["grid"] == grid.name and row["cell"] in grid.cells]) for grid in grids]
