"""The quickstart: three-stage MoE-tuning on real pictures and questions, on a CPU, in minutes.

  python examples/quickstart/run.py                          one process
  torchrun --nproc-per-node 2 examples/quickstart/run.py parallel.expert_model_parallel_size=2

Makes the data, a tiny language model and a tiny pretrained tower; runs stage 1 (projector), stage 2 (projector and
language model), the upcycling to experts, stage 3 (MoE), and the dense model continued for as long; asks the held-out
questions after each. Then a smaller model learns names, of which there are more than it can hold: dense, and upcycled to
experts. Every step is what the tools do (moellava convert, moellava train). Results: OUT/summary.json, curves.png, names.png,
expert_load.png; TensorBoard logs below OUT.

The same command goes on after Ctrl-C, a kill or a power cut, and ends as if there had been none: what is done is not done
again, training continues from its newest checkpoint. --fresh begins anew.
"""

import argparse
import ctypes
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from megatron_moellava.commands.program import COUNT, add_machine_options, choose_machine, number

sys.path.insert(0, str(Path(__file__).parent))
import plans
from models import TOWER_STEPS
from parts import Part, Parts, digest_of_sources
from speed import Speed, said_time

HERE = Path(__file__).parent
QUESTIONS = 2000  # after each run, of the 9,673 that easy-VQA holds out: the standard error of 99 % is 0.2
BLANKED = 800  # about so many of them are asked once more, with and without their pictures


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset",
        choices=tuple(plans.PLANS),
        default="names",
        help="names (default): easy-VQA, and names with a model of their own; fast: easy-VQA; full: easy-VQA, digits",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="default: runs/quickstart")
    parser.add_argument("--backbone", default="llama-tiny", help="llama-tiny (default) or phi-2-tiny")
    parser.add_argument("--seed", type=int, default=1, help="of the weights and the order of the data")
    parser.add_argument("--prepare-only", action="store_true", help="make data and starting weights, then stop")
    parser.add_argument(
        "--steps-scale",
        type=number(float, above=0),
        default=1.0,
        help="multiplies the steps of every run, for a quick look",
    )
    parser.add_argument(
        "--questions", type=COUNT, default=QUESTIONS, help=f"held-out questions to ask after each run ({QUESTIONS})"
    )
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever OUT already has")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="for every run, as in moellava train"
    )
    add_machine_options(parser)
    return parser.parse_intermixed_args()


@dataclass(slots=True)
class Quickstart:
    """One quickstart on this rank; rank 0 makes what only one process can make."""

    arguments: argparse.Namespace
    parts: Parts
    results: dict[str, dict] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.arguments.out

    @property
    def has_names(self) -> bool:
        return self.arguments.preset == "names"

    @property
    def plan(self) -> dict[str, dict]:
        """The runs of the preset."""
        return plans.PLANS[self.arguments.preset]

    def backbone(self, plan: dict) -> str:
        """Of a run."""
        return plan.get("backbone", self.arguments.backbone)

    def steps(self, full: int) -> int:
        """Of a run that has `full` steps at --steps-scale 1."""
        return max(2, round(full * self.arguments.steps_scale))

    def run(self) -> None:
        from megatron_moellava import parallel

        options = self.arguments
        say(f"=== quickstart: preset {options.preset}, seed {options.seed}, results in {self.out} ===")
        data, *parts = self.plan_parts()
        self.parts.run(data)
        self.check()
        if seconds := sum(part.seconds for part in self.parts.left(parts)):
            say(said_time(seconds))
        for part in parts:
            self.results[part.name] = self.parts.run(part)
        if not options.prepare_only and parallel.is_main_process():
            self.report()

    def plan_parts(self) -> list[Part]:
        """In the order in which they need each other."""
        options, alone = self.arguments, first_rank_does
        speed = Speed.of_this_machine(self.precision())
        steps, scene = self.steps(TOWER_STEPS[options.preset]), [options.preset, digest_of_sources(HERE)]
        parts = [
            Part(name="data", settings=scene, action=alone(self.make_data)),
            Part(
                name="tower",
                settings=[options.seed, steps],
                action=alone(partial(self.make_tower, steps)),
                needs=["data"],
                goes_on=True,
                seconds=speed.tower(steps),
            ),
        ]
        for plan in self.plan.values():
            if (name := plan["from"]) in plans.STARTS:
                backbone = self.backbone(plan)
                make = alone(partial(self.make_start, name, backbone))
                parts.append(Part(name=name, settings=backbone, action=make, needs=["tower"]))
        if self.has_names:
            ceiling = Part(name="ceiling", settings=[], action=alone(self.measure_ceiling), needs=["data", "tower"])
            parts.append(ceiling)
        for name, plan in self.plan.items() if not options.prepare_only else ():
            if (copied := plan["from"]) in plans.UPCYCLED:
                source, make = plans.UPCYCLED[copied], alone(partial(self.upcycle, copied, experts(plan)))
                parts.append(Part(name=copied, settings=[], action=make, needs=[source]))
            steps = self.steps(plan["steps"])
            parts.append(
                Part(
                    name=name,
                    settings=[plan, steps, options.questions, options.overrides],
                    action=partial(self.train, name, plan),
                    needs=["data", plan["from"]],
                    goes_on=True,
                    seconds=speed.training(steps, self.num_questions(plan), plan),
                )
            )
        return parts

    def num_asked(self, plan: dict) -> int:
        """Held-out questions after a run."""
        return min(self.arguments.questions, plan.get("questions", self.arguments.questions))

    def num_questions(self, plan: dict) -> int:
        """How many are asked after a run, with those that are asked twice."""
        if plans.NAMES in plan["data"]:
            return plans.THINGS
        asked = self.num_asked(plan)
        return asked + (2 * min(asked, BLANKED) if plan["stage"] == 3 else 0)

    def precision(self) -> str:
        """In which the runs will compute."""
        from megatron_moellava import platform
        from megatron_moellava.machine import fastest_precision

        asked = [word.partition("=")[2] for word in self.arguments.overrides if word.startswith("training.precision=")]
        named = asked[-1] if asked else "auto"
        return fastest_precision(platform.machine())[0] if named == "auto" else named

    # --- making -----------------------------------------------------------------------------------------------------

    def make_data(self) -> None:
        from make_data import write_quickstart

        write_quickstart(self.out / "data", preset=self.arguments.preset)

    def make_tower(self, steps: int) -> None:
        from models import write_tower

        from megatron_moellava.towers import get_tower

        say("--- a tower, pretrained on the captions of the train images")
        data = self.out / "data"
        tower = get_tower("clip-tiny")
        write_tower(self.out / "tower", tower, data / "captions.json", data / "images", self.arguments.seed, steps)

    def make_start(self, name: str, backbone_name: str) -> None:
        from models import write_language_model

        from megatron_moellava.backbones import get_backbone
        from megatron_moellava.conversion.imports import import_checkpoint

        seed, backbone = self.arguments.seed, get_backbone(backbone_name)
        say(f"--- a random {backbone.name}, and a Megatron checkpoint of both")
        language_model, tower = self.out / plans.STARTS[name], str(self.out / "tower")
        write_language_model(language_model, backbone, self.out / "data" / "tokenizer.model", seed)
        import_checkpoint(language_model, save=self.out / name, tower=tower, dtype="bfloat16", seed=seed)

    def upcycle(self, name: str, moe) -> None:
        from megatron_moellava.conversion.upcycle import upcycle_checkpoint

        which = "every" if moe.placement == "dense" else "every other"
        say(f"--- upcycling: the FFN of {which} layer copied into {moe.num_moe_experts} experts, new routers")
        source = self.out / plans.UPCYCLED[name]
        upcycle_checkpoint(source, save=self.out / name, moe=moe, seed=self.arguments.seed)

    def measure_ceiling(self) -> None:
        from names_report import write_ceiling

        from megatron_moellava.towers import get_tower

        say(write_ceiling(self.out, get_tower("clip-tiny")))

    # --- training and asking ----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Every run must be able to work before minutes go into the first one.

        Without its folders: what lies there may be of other settings, and is removed before the run.
        """
        from megatron_moellava.validation.run import validate_run

        for name, plan in self.plan.items():
            moe = asdict(experts(plan)) if plan["stage"] == 3 else {}
            model = {"model.backbone": self.backbone(plan)} | {f"moe.{key}": value for key, value in moe.items()}
            validate_run(self.run_config(name, plan, model | {"checkpoint.load": None, "checkpoint.save": None}))

    def run_config(self, name: str, plan: dict, more: dict | None = None):
        from megatron_moellava.validation.run import load_run

        data = self.out / "data"
        images = str(data / "images")
        flags = {
            "training.stage": plan["stage"],
            "training.train_steps": self.steps(plan["steps"]),
            "training.seed": self.arguments.seed,
            "optimizer.lr": plan["lr"],
            "checkpoint.load": str(self.out / plan["from"]),
            "checkpoint.save": str(self.out / name),
            "data.sources": [
                {"path": str(data / file), "image_folder": images, "weight": weight}
                for file, weight in plan["data"].items()
            ],
            "data.tokenizer": str(data / "tokenizer.model"),
        }
        own = {"trains": "training.trains", "seq_length": "data.seq_length"}
        flags |= {option: plan[key] for key, option in own.items() if key in plan}
        run = load_run(
            config=str(HERE / "quickstart.yaml"), flags=flags | (more or {}), overrides=self.arguments.overrides
        )
        if run.moe is None:  # the overrides are for every run, and a dense model has no experts to split
            run = replace(run, parallel=replace(run.parallel, expert_model_parallel_size=1))
        return run

    def train(self, name: str, plan: dict) -> dict:
        from megatron_moellava.experiments.stage import train_stage

        run = self.run_config(name, plan)
        on_first_rank(partial(share_index, self.out, name))
        say(f"--- {plans.TITLES[name]}")
        return self.ask(name, run, train_stage(run))

    def ask(self, name: str, run, trainer) -> dict:
        """Held-out accuracy of the trained model; for the MoE also with blanked pictures, and the expert load."""
        from names_report import ask_names

        from megatron_moellava.experiments.cost import cost_of
        from megatron_moellava.experiments.stage import ask_closed

        cost = cost_of(run, trainer.chunks[0].backbone, trainer.chunks[0].tower)
        if plans.NAMES in self.plan[name]["data"]:
            return {"names": ask_names(trainer, run, self.out, name), "cost": cost}
        started = time.perf_counter()
        rows = [json.loads(line) for line in (self.out / "data" / "test.jsonl").open()]
        rows = spread(rows, self.num_asked(self.plan[name]))
        answers = ask_closed(trainer, run, rows, self.out / "data" / "images")
        result = {"score": answers.score, "answered": answers.answered, "cost": cost}
        on_first_rank(lambda: write_jsonl(self.out / name / "predictions.jsonl", answers.answered))
        say(summary_line(answers.score, len(rows), time.perf_counter() - started))
        if answers.routing is not None:
            every = max(1, len(rows) // BLANKED)
            blind = ask_closed(trainer, run, rows[::every], self.out / "data" / "images", blank=True)
            result |= {
                "expert_load": answers.routing.choices_LME.tolist(),
                "moe_layers": list(answers.routing.layers),
                "blanked": blind.blanked,
                "blanked_every": every,
            }
        return result

    def report(self) -> None:
        from report import write_report

        write_report(self.out, self.arguments, self.plan, plans.TITLES, self.results, self.parts.seconds)


def share_index(out: Path, name: str) -> None:
    """What runs find out about their data lies in one folder: those that learn from the same measure its samples once."""
    (out / "index").mkdir(parents=True, exist_ok=True)
    (out / name).mkdir(exist_ok=True)
    link = out / name / "data_index"
    if not link.exists():
        link.symlink_to("../index")


def experts(plan: dict):
    """Of a run of stage 3."""
    from megatron_moellava.config import MoEConfig

    return MoEConfig(**plan.get("moe", {}))


def summary_line(score: dict, count: int, seconds: float) -> str:
    types = ", ".join(f"{name} {part['accuracy']:.1f} %" for name, part in score["types"].items())
    existence = f", existence F1 {score['existence']['f1']:.1f}" if score["existence"] else ""
    return (
        f"held-out: {score['accuracy']:.1f} % of {count} questions right ({types}{existence}), asked in {seconds:.0f} s"
    )


def spread(rows: list[dict], count: int) -> list[dict]:
    """So many of the rows, at even distances: they lie image by image, and data set by data set."""
    count = min(count, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]


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


def first_rank_does(action):
    """`action` on rank 0, for which the others wait."""
    return lambda: on_first_rank(action)


def end_with_the_launcher() -> None:
    """Under torchrun, a killed launcher takes its processes along: left alone they would go on writing to OUT."""
    set_parent_death_signal = 1  # of <sys/prctl.h>
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def main() -> int:
    arguments = parse_arguments()
    choose_machine(arguments)
    end_with_the_launcher()
    import torch.distributed as dist

    from megatron_moellava import parallel
    from megatron_moellava.config import MoELlavaError, ParallelConfig
    from megatron_moellava.training.lock import lock_folder

    try:
        parallel.initialize(ParallelConfig(distributed_timeout_minutes=30), arguments.seed)
        lock = lock_folder(arguments.out, say)
        parts = Parts(arguments.out, dist.barrier, dist.get_rank() == 0, say)
        if arguments.fresh:
            parts.forget()
        Quickstart(arguments, parts).run()
    except MoELlavaError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        parallel.shutdown()
    if lock is not None:
        lock.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
