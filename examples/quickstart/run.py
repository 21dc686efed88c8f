"""The quickstart: three-stage MoE-tuning on a published benchmark, on a CPU, in minutes.

  python examples/quickstart/run.py                          one process
  torchrun --nproc-per-node 2 examples/quickstart/run.py parallel.expert_model_parallel_size=2

Makes the data, a tiny language model and a tiny pretrained tower; runs stage 1 (projector), stage 2 (projector and
language model), the upcycling to experts, stage 3 (MoE), and the dense model continued for as long; asks the held-out
questions after each. Every step is what the tools do (moellava convert, moellava train). Results: OUT/summary.json,
curves.png, expert_load.png; TensorBoard logs below OUT.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).parent
# Optimizer steps and peak learning rate of each run, and what it starts from.
PLAN = {
    "stage1": {"stage": 1, "from": "start", "steps": 50, "lr": 3e-3, "data": "captions.json"},
    "stage2": {"stage": 2, "from": "stage1", "steps": 1200, "lr": 2e-3, "data": "conversations.json"},
    "stage3": {"stage": 3, "from": "upcycled", "steps": 280, "lr": 1e-3, "data": "conversations.json"},
    "dense": {"stage": 2, "from": "stage2", "steps": 280, "lr": 1e-3, "data": "conversations.json"},
}
TITLES = {
    "stage1": "stage 1: projector",
    "stage2": "stage 2: projector + language model",
    "stage3": "stage 3: MoE",
    "dense": "stage 2 continued for as long (dense)",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset",
        choices=("names", "fast", "full"),
        default="names",
        help="easy-VQA and names (default); easy-VQA alone; easy-VQA and digits",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="default: runs/quickstart")
    parser.add_argument("--backbone", default="llama-tiny", help="llama-tiny (default) or phi-2-tiny")
    parser.add_argument("--seed", type=int, default=1, help="of the weights and the order of the data")
    parser.add_argument("--prepare-only", action="store_true", help="make data and starting weights, then stop")
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, help="multiplies the steps of every run, for a quick look"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="for every run, as in moellava train"
    )
    return parser.parse_intermixed_args()


@dataclass(slots=True)
class Quickstart:
    """One quickstart on this rank; rank 0 makes what only one process can make."""

    arguments: argparse.Namespace
    seconds: dict[str, float] = field(default_factory=dict)
    results: dict[str, dict] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.arguments.out

    @property
    def has_names(self) -> bool:
        return self.arguments.preset == "names"

    @property
    def plan(self) -> dict[str, dict]:
        from plans import with_names

        return with_names(PLAN) if self.has_names else PLAN

    @property
    def titles(self) -> dict[str, str]:
        from plans import TITLES as WITH_NAMES

        return TITLES | WITH_NAMES if self.has_names else TITLES

    def timed(self, name: str, action) -> None:
        started = time.perf_counter()
        action()
        self.seconds[name] = round(time.perf_counter() - started, 1)

    def run(self) -> None:
        from megatron_moellava import parallel

        say(f"=== quickstart: preset {self.arguments.preset}, seed {self.arguments.seed}, results in {self.out} ===")
        self.timed("data", lambda: on_first_rank(self.make_data))
        self.check()
        self.timed("models", lambda: on_first_rank(self.make_models))
        if self.arguments.prepare_only:
            return
        for name, plan in self.plan.items():
            if plan["from"] == "upcycled":
                self.timed("upcycle", lambda: on_first_rank(self.upcycle))
            self.timed(name, lambda name=name, plan=plan: self.train(name, plan))
        if parallel.is_main_process():
            self.report()

    # --- making -----------------------------------------------------------------------------------------------------

    def make_data(self) -> None:
        from make_data import write_quickstart

        write_quickstart(self.out / "data", preset=self.arguments.preset)
        for name in ("models", "start", "upcycled", *self.plan):  # a run that was cut short starts again
            shutil.rmtree(self.out / name, ignore_errors=True)

    def make_models(self) -> None:
        from models import write_language_model, write_tower

        from megatron_moellava.backbones import get_backbone
        from megatron_moellava.conversion.imports import import_checkpoint
        from megatron_moellava.towers import get_tower

        data, models, seed = self.out / "data", self.out / "models", self.arguments.seed
        backbone = get_backbone(self.arguments.backbone)
        say(f"--- a random {backbone.name} and a tower pretrained on the captions of the train images")
        write_language_model(models / "language_model", backbone, data / "tokenizer.model", seed)
        tower = get_tower("clip-tiny")
        write_tower(models / "tower", tower, data / "captions.json", data / "images", seed)
        import_checkpoint(
            models / "language_model", save=self.out / "start", tower=str(models / "tower"), dtype="bfloat16", seed=seed
        )
        if self.has_names:
            from names_report import write_ceiling

            say(write_ceiling(self.out, tower))

    def upcycle(self) -> None:
        from plans import EXPERTS

        from megatron_moellava.config import MoEConfig
        from megatron_moellava.conversion.upcycle import upcycle_checkpoint

        moe = MoEConfig(**(EXPERTS if self.has_names else {}))
        source = "names" if self.has_names else "stage2"
        which = "every" if self.has_names else "every other"
        say(f"--- upcycling: the FFN of {which} layer copied into {moe.num_moe_experts} experts, new routers")
        upcycle_checkpoint(self.out / source, save=self.out / "upcycled", moe=moe, seed=self.arguments.seed)

    # --- training and asking ----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Every run must be able to work before minutes go into the first one."""
        from megatron_moellava.validation.run import validate_run

        for name, plan in self.plan.items():
            model = {"model.backbone": self.arguments.backbone} | (
                {"moe.num_moe_experts": 4} if plan["stage"] == 3 else {}
            )
            validate_run(self.run_config(name, plan, model | {"checkpoint.load": None}))

    def run_config(self, name: str, plan: dict, more: dict | None = None):
        from megatron_moellava.validation.run import load_run

        data = self.out / "data"
        files = plan["data"] if isinstance(plan["data"], dict) else {plan["data"]: 1.0}
        images = str(data / "images")
        flags = {
            "training.stage": plan["stage"],
            "training.train_steps": max(2, round(plan["steps"] * self.arguments.steps_scale)),
            "training.seed": self.arguments.seed,
            "optimizer.lr": plan["lr"],
            "checkpoint.load": str(self.out / plan["from"]),
            "checkpoint.save": str(self.out / name),
            "data.sources": [
                {"path": str(data / file), "image_folder": images, "weight": weight} for file, weight in files.items()
            ],
            "data.tokenizer": str(data / "tokenizer.model"),
        }
        run = load_run(
            config=str(HERE / "quickstart.yaml"), flags=flags | (more or {}), overrides=self.arguments.overrides
        )
        if run.moe is None:  # the overrides are for every run, and a dense model has no experts to split
            run = replace(run, parallel=replace(run.parallel, expert_model_parallel_size=1))
        return run

    def train(self, name: str, plan: dict) -> None:
        from megatron_moellava.experiments.stage import train_stage

        run = self.run_config(name, plan)
        say(f"--- {self.titles[name]}")
        self.results[name] = self.ask(name, run, train_stage(run))

    def ask(self, name: str, run, trainer) -> dict:
        """Held-out accuracy of the trained model; for the MoE also with blanked pictures, and the expert load."""
        from names_report import ask_names, cost_of
        from plans import RUNS as NAMES_RUNS

        from megatron_moellava.experiments.stage import ask_closed

        started = time.perf_counter()
        rows = [json.loads(line) for line in (self.out / "data" / "test.jsonl").open()]
        answers = ask_closed(trainer, run, rows, self.out / "data" / "images", blank=run.moe is not None)
        model = trainer.chunks[0]
        cost = cost_of(run, model.backbone, model.tower)
        result = {"score": answers.score, "answered": answers.answered, "cost": cost}
        on_first_rank(lambda: write_jsonl(self.out / name / "predictions.jsonl", answers.answered))
        say(summary_line(answers.score, len(rows), time.perf_counter() - started))
        if self.has_names and name in NAMES_RUNS:
            result["names"] = ask_names(trainer, run, self.out, name)
        if answers.routing is not None:
            result |= {
                "expert_load": answers.routing.choices_LME.tolist(),
                "moe_layers": list(answers.routing.layers),
                "blanked": answers.blanked,
            }
        return result

    def report(self) -> None:
        from report import write_report

        write_report(self.out, self.arguments, self.plan, self.titles, self.results, self.seconds)


def summary_line(score: dict, count: int, seconds: float) -> str:
    types = ", ".join(f"{name} {part['accuracy']:.1f} %" for name, part in score["types"].items())
    existence = f", existence F1 {score['existence']['f1']:.1f}" if score["existence"] else ""
    return (
        f"held-out: {score['accuracy']:.1f} % of {count} questions right ({types}{existence}), asked in {seconds:.0f} s"
    )


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def say(text: str) -> None:
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def on_first_rank(action) -> None:
    """Rank 0 acts, the others wait."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        action()
    dist.barrier()


def main() -> int:
    arguments = parse_arguments()
    sys.path.insert(0, str(HERE))
    from megatron_moellava import parallel
    from megatron_moellava.config import MoELlavaError, ParallelConfig

    try:
        parallel.initialize(ParallelConfig(distributed_timeout_minutes=30), arguments.seed)
        Quickstart(arguments).run()
    except MoELlavaError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        parallel.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
