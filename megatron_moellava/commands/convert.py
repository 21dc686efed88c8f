"""Convert checkpoints: Hugging Face, LLaVA-1.5 and MoE-LLaVA releases <-> Megatron; upcycle to MoE; look inside.

  moellava convert import vicuna-7b-v1.5 --tower clip-vit-large-patch14-336 --save runs/start     start of stage 1
  moellava convert import phi-2 --tower clip-vit-large-patch14-336 --projector mm_projector.bin --save runs/stage1
  moellava convert import MoE-LLaVA-Phi2-2.7B-4e --tower clip-vit-large-patch14-336 --save runs/released
  moellava convert upcycle runs/stage2 --num-experts 4 --placement sparse --save runs/moe         start of stage 3
  moellava convert add-modality runs/start --modality depth --tower depth_clip --save runs/start-depth
  moellava convert export runs/stage3 --layout transformers --tokenizer phi-2 --save exported
  moellava convert merge runs/lora --save runs/merged                  an adapter (training.lora) into its base
  moellava convert export runs/lora --adapter --save adapter           an adapter for `peft`; import --adapter reads one
  moellava convert average runs/stage3 --save runs/averaged            the averaged weights (optimizer.ema_decay) as the model
  moellava convert place-experts runs/stage3 --save runs/placed        experts change ranks, so that these are busy alike
  moellava convert inspect runs/moe
  moellava convert diff runs/stage2 runs/moe
  moellava convert seal runs/old                                       digests for an older version's

A Megatron checkpoint is a folder with iter_*/run.json and loads under any tensor, pipeline and expert parallelism. All
other folders are local downloads; nothing is fetched. Weights are copied unchanged, streamed, and every tensor is
accounted for before anything is written; an interrupted conversion leaves nothing that loads. What is read is first
compared with its digests (SHA-256 in run.json, or a SHA256SUMS file), and what is written gets some.
`moellava convert COMMAND --help` explains one command. Exit codes: 0 done; 1 differences found (diff); 2 error.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from megatron_moellava.commands.program import COUNT, command_parser, exit_code_of, number, while_somebody_reads

LAYOUTS = {
    "original": "MoE-LLaVA's own, dense or MoE (config.json, safetensors)",
    "transformers": "LlavaForConditionalGeneration; with a modelling file beside it where transformers has no such model",
    "llava": "LLaVA-1.5's own (dense Llama or Vicuna)",
    "language-model": "the language model alone",
    "tower": "the vision tower alone",
    "projector": "mm_projector.bin, as the original's stage 1 writes it",
    "gguf": "model.gguf and mmproj.gguf for llama.cpp",
}
QUANTIZE = ("fp8", "int4")
GGUF_TYPES = ("f32", "f16", "q8_0")
DTYPES = ("float32", "bfloat16", "float16")


def build_parser() -> argparse.ArgumentParser:
    """The parser of `moellava convert` with all its subcommands."""
    parser = command_parser("convert", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_import(commands)
    _add_export(commands)
    _add_upcycle(commands)
    _add_modality(commands)
    _add_merge(commands)
    _add_average(commands)
    _add_place_experts(commands)
    one = commands.add_parser("inspect", help="a table of what a checkpoint holds")
    one.add_argument("checkpoint", type=Path, help="a Megatron checkpoint, or a Hugging Face folder or file")
    _add_no_verify(one)
    two = commands.add_parser("diff", help="how two checkpoints differ; exit code 1 when they do")
    two.add_argument("first", type=Path)
    two.add_argument("second", type=Path)
    _add_no_verify(two)
    seal = commands.add_parser(
        "seal",
        help="give a checkpoint of an older version digests",
        description="Writes digests of all files and a seal into run.json. They vouch for the bytes as they are now; "
        "whether those are what was once written, nobody can tell. Refuses a checkpoint whose digests do not fit.",
    )
    seal.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    return parser


def _add_no_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-verify", action="store_true", help="do not compare what is read with its digests")


def _add_import(commands) -> None:
    parser = commands.add_parser(
        "import",
        help="a downloaded model -> a Megatron checkpoint",
        description="The layout of SOURCE is told from its tensors: a language model, LLaVA-1.5, MoE-LLaVA (any stage), "
        "or transformers' LLaVA. A language model needs --tower.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder with config.json and safetensors or .bin")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="run folder to write iter_0000000 into")
    parser.add_argument(
        "--tower",
        metavar="DIR",
        help="folder of the vision tower; only needed for its weights when SOURCE has none, else a name is enough. "
        "NAME@original drops the first feature also of SigLIP, as MoE-LLaVA does",
    )
    parser.add_argument(
        "--projector", type=Path, metavar="FILE", help="mm_projector.bin of stage 1 (default: a new one)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="convert all weights (default: as they are)")
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="BASE",
        help="SOURCE is an adapter of `peft` for the model of this Megatron checkpoint: write an adapter checkpoint beside it",
    )
    parser.add_argument("--seed", type=int, default=0, help="of a new projector")
    parser.add_argument(
        "--keep-output-bias", action="store_true", help="Phi-2: keep lm_head.bias, which the original drops"
    )
    _add_no_verify(parser)


def _add_export(commands) -> None:
    layouts = "\n".join(f"  {name:<15} {text}" for name, text in LAYOUTS.items())
    parser = commands.add_parser(
        "export",
        help="a Megatron checkpoint -> a model for others",
        description=f"Layouts:\n{layouts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="new folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--layout", choices=tuple(LAYOUTS), help="see above")
    what.add_argument(
        "--adapter",
        action="store_true",
        help="an adapter (training.lora) in the format of `peft`, for its base as --layout transformers writes it",
    )
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder whose tokenizer files are copied along")
    parser.add_argument("--tower", type=Path, metavar="DIR", help="published tower, for layers that training drops")
    parser.add_argument("--dtype", choices=DTYPES, help="convert all weights (default: as they are)")
    parser.add_argument(
        "--gguf-type", choices=GGUF_TYPES, default="f16", help="of the matrices in --layout gguf (default: f16)"
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTIZE,
        default="",
        help="the language model's matrices, in the format of compressed-tensors",
    )
    card = parser.add_argument_group("the model card (README.md)")
    card.add_argument("--license", default="", metavar="ID", help="the hub's name of its licence, such as apache-2.0")
    card.add_argument("--scores", type=Path, metavar="FILE", help="a scores.json that `moellava evaluate` wrote")
    hub = parser.add_argument_group("the Hugging Face hub")
    hub.add_argument(
        "--push", metavar="USER/NAME", help="upload the folder there as well, with the token of `hf auth login`"
    )
    hub.add_argument("--private", action="store_true", help="a new repository is private")
    hub.add_argument(
        "--dry-run", action="store_true", help="with --push: say what would be uploaded, and upload nothing"
    )
    _add_no_verify(parser)


def _add_upcycle(commands) -> None:
    parser = commands.add_parser(
        "upcycle",
        help="a dense checkpoint -> the MoE start of stage 3; or more experts for a MoE checkpoint",
        description="Copies the MLP of the chosen layers into every expert and draws a new router. "
        "A MoE checkpoint keeps its layers and gets more experts.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="run folder to write iter_0000000 into")
    parser.add_argument(
        "--num-experts",
        type=COUNT,
        help="copies of the MLP (default: 4; without it the language model stays as it is beside --tower-experts or "
        "--projector-experts)",
    )
    parser.add_argument("--topk", type=COUNT, help="experts per token (default: 2, or the checkpoint's)")
    parser.add_argument(
        "--granularity",
        type=COUNT,
        default=1,
        metavar="G",
        help="divide each copy into G experts of 1/G of its width, which are chosen together at first: num-experts x G "
        "experts, topk x G of them per token, the same computation and the same function",
    )
    parser.add_argument(
        "--moe-ffn-hidden-size",
        type=COUNT,
        metavar="WIDTH",
        help="the same by the width of an expert; num-experts and topk then count experts",
    )
    parser.add_argument(
        "--drop",
        type=float,
        default=0.0,
        metavar="R",
        help="draw this share of each copy's inner columns anew, from the layer's own mean and spread, so that equal copies "
        "learn different things (Drop-Upcycling has 0.5); the function changes",
    )
    parser.add_argument(
        "--select",
        choices=("utility",),
        default="",
        help="more experts for a MoE checkpoint: copy those with the largest gradients (by the optimizer's second moments in "
        "the checkpoint; where it has none, those that most tokens chose), not all in turn",
    )
    parser.add_argument(
        "--normalize-top1",
        action="store_true",
        help="with --topk 1: the chosen expert's weight is 1 and not its probability, so that the function stays",
    )
    parser.add_argument(
        "--placement",
        nargs="+",
        metavar="WHERE",
        help="first_half, second_half, sparse (0, 2, 4, ...), dense, or layer numbers (default: sparse, or the checkpoint's)",
    )
    parser.add_argument("--residual", action="store_true", help="keep the dense MLP beside the experts (residual MoE)")
    parser.add_argument(
        "--expert-bias",
        action="store_true",
        help="biases that balance the experts without a loss, zero at first; the router's scores become sigmoids",
    )
    parser.add_argument(
        "--shared-expert",
        action="store_true",
        help="an expert that sees every token: the dense MLP, whose output it and the others halve (the function stays); "
        "beside trained experts it starts with an output of zero",
    )
    parser.add_argument(
        "--tower-experts",
        type=COUNT,
        metavar="N",
        help="copies of the FFN in layers of the vision tower, too (CuMo: 4)",
    )
    parser.add_argument(
        "--tower-topk", type=COUNT, metavar="K", help="of them, experts per row of the tower (default: 2)"
    )
    parser.add_argument(
        "--tower-placement",
        nargs="+",
        metavar="WHERE",
        help="layers of the tower with experts, as --placement says it (default: dense, which is every layer)",
    )
    parser.add_argument(
        "--projector-experts", type=COUNT, metavar="N", help="copies of the whole projector as experts, too (CuMo: 4)"
    )
    parser.add_argument(
        "--projector-topk", type=COUNT, metavar="K", help="of them, experts per visual token (default: 2)"
    )
    parser.add_argument(
        "--noise",
        type=number(float, least=0),
        default=0.0,
        metavar="SHARE",
        help="noise on the copies, of the weights' spread",
    )
    parser.add_argument(
        "--router-scale",
        type=number(float, least=0),
        default=1.0,
        metavar="X",
        help="new router weights, times the original's range (1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of router and noise")
    _add_no_verify(parser)


def _add_modality(commands) -> None:
    parser = commands.add_parser(
        "add-modality",
        help="a checkpoint whose depth, thermal, ... pictures get a tower, a projector, or both of their own",
        description="Before training: records of data.modalities with that name then go through what is added here. Copies of "
        "the model's own tower and projector compute what was computed before.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="run folder to write iter_0000000 into")
    parser.add_argument("--modality", required=True, metavar="NAME", help="`name` of its record, such as depth")
    parser.add_argument("--tower", metavar="DIR", help="folder of a published tower, which becomes its own")
    parser.add_argument("--copy-tower", action="store_true", help="a copy of the model's tower becomes its own")
    parser.add_argument(
        "--projector",
        choices=("new", "copy", "shared"),
        default="new",
        help="of its own, new or a copy of the model's; or the model's (default: new)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of a new projector")
    _add_no_verify(parser)


def _add_merge(commands) -> None:
    parser = commands.add_parser(
        "merge",
        help="an adapter checkpoint (training.lora) into its base: a whole model",
        description="Adds scale * B A to every adapted matrix, in fp32, and takes over what was trained whole beside the "
        "adapters. The base is the checkpoint that the adapter names by its digest; another one is refused.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="ADAPTER")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="run folder to write iter_0000000 into")
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="where the base lies (default: where it lay in training)"
    )
    _add_no_verify(parser)


def _add_average(commands) -> None:
    parser = commands.add_parser(
        "average",
        help="the averaged weights of a run with optimizer.ema_decay as a checkpoint of its own",
        description="Every trained tensor is replaced by its average, rounded to the tensor's own type; the others stay. The "
        "result is evaluated, served and exported like any checkpoint.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="RUN", help="its newest checkpoint, or one iteration folder")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="run folder to write iter_0000000 into")
    _add_no_verify(parser)


def _add_place_experts(commands) -> None:
    parser = commands.add_parser(
        "place-experts",
        help="experts change their places in a run's checkpoint, so that expert-parallel ranks are busy alike",
        description="Says for every layer how much more the busiest rank had to do than the mean, and how much it would have "
        "with the experts in other places. With --save the newest checkpoint is written so, with optimizer states and all; "
        "the model computes what it computed, and a run with the same --save goes on from there.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="RUN", help="its newest checkpoint, or one iteration folder")
    parser.add_argument(
        "--save", type=Path, metavar="DIR", help="folder of the run that goes on; without it nothing is written"
    )
    parser.add_argument(
        "--expert-parallel", type=COUNT, metavar="N", help="ranks that share the experts (default: the run's)"
    )
    parser.add_argument(
        "--routing", type=Path, metavar="FILE", help="loads of the experts (default: RUN/routing.jsonl)"
    )
    parser.add_argument(
        "--records", type=COUNT, default=20, help="newest observations that count (default: %(default)s)"
    )
    _add_no_verify(parser)


class Bar:
    """A tqdm bar over bytes; silent when the output is not a terminal, except for a last line."""

    def __init__(self) -> None:
        self._bar, self._started = None, time.monotonic()

    def begin(self, total: int) -> None:
        """Show a bar over `total` bytes."""
        from tqdm import tqdm

        self._bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, disable=None, miniters=1)

    def __call__(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def finish(self) -> str:
        """Close the bar; bytes and seconds in words."""
        seconds = time.monotonic() - self._started
        if self._bar is None:
            return f"{seconds:.1f} s"
        self._bar.close()
        return f"{self._bar.total / 1e9:.2f} GB in {seconds:.1f} s"


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code: 2 for bad input, 1 where `diff` finds differences."""
    parsed = build_parser().parse_args(arguments)
    # Blocks are 1 MB: more threads only wait for each other (converting 2.7 GB took 38 s with two, 4 s with one).
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megatron_moellava.config import MoELlavaError

    try:
        return while_somebody_reads(lambda: COMMANDS[parsed.command](parsed))
    except (MoELlavaError, OSError) as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return exit_code_of(error)


def run_import(parsed: argparse.Namespace) -> int:
    """Weights from outside -> a Megatron checkpoint; prints what was recognised and what was left out."""
    from megatron_moellava.conversion.imports import import_checkpoint

    if parsed.adapter:
        return run_import_adapter(parsed)
    bar = Bar()
    report = import_checkpoint(
        parsed.source,
        save=parsed.save,
        tower=parsed.tower,
        projector=parsed.projector,
        dtype=parsed.dtype,
        seed=parsed.seed,
        keep_output_bias=parsed.keep_output_bias,
        verify=not parsed.no_verify,
        progress=bar,
        begin=bar.begin,
    )
    model = report["model"]
    print(f"{parsed.source} is {report['layout']}, {model.backbone.name}; {bar.finish()}")
    if model.tower is None:
        print("no --tower: this is the language model alone, which no stage can train")
    if "projector" in report:
        print(f"projector: {report['projector']}")
    for why, names in report.get("dropped", {}).items():
        print(f"left out {len(names)} tensors ({why}): {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
    print(f"wrote {report['tensors']} tensors to {report['folder']}")
    return 0


def _refuse(parsed: argparse.Namespace, names: tuple[str, ...]) -> None:
    """An option that would change nothing is refused instead of being passed over."""
    from megatron_moellava.config import ConfigError

    given = [f"--{name.replace('_', '-')}" for name in names if getattr(parsed, name)]
    if given:
        raise ConfigError(f"{', '.join(given)}: an adapter has no such thing; leave it out, or convert its base so")


def run_import_adapter(parsed: argparse.Namespace) -> int:
    """An adapter of `peft` -> an adapter checkpoint; prints what it adapts."""
    from megatron_moellava.conversion.adapter_imports import import_adapter

    _refuse(parsed, ("tower", "projector", "dtype", "keep_output_bias", "seed"))
    bar = Bar()
    report = import_adapter(
        parsed.source,
        base=parsed.adapter,
        save=parsed.save,
        verify=not parsed.no_verify,
        progress=bar,
        begin=bar.begin,
    )
    lora = report["lora"]
    print(f"{parsed.source} adapts {', '.join(lora.targets)} at rank {lora.rank}, named as in {report['layout']}")
    print(f"wrote {report['tensors']} tensors to {report['folder']}; {bar.finish()}")
    return 0


def run_export(parsed: argparse.Namespace) -> int:
    """A Megatron checkpoint -> a folder for transformers or for the original; prints what to know when loading it."""
    from megatron_moellava.config import ConfigError
    from megatron_moellava.conversion.exports import export_checkpoint
    from megatron_moellava.conversion.push import check_repo

    if parsed.push:
        check_repo(parsed.push)
    elif parsed.dry_run or parsed.private:
        raise ConfigError("--dry-run and --private belong to --push USER/NAME; give it, or leave them out")
    if parsed.adapter:
        return run_export_adapter(parsed)
    bar = Bar()
    report = export_checkpoint(
        parsed.checkpoint,
        save=parsed.save,
        layout=parsed.layout,
        tokenizer=parsed.tokenizer,
        tower=parsed.tower,
        dtype=parsed.dtype,
        licence=parsed.license,
        scores=parsed.scores,
        gguf_type=parsed.gguf_type,
        quantize=parsed.quantize,
        verify=not parsed.no_verify,
        progress=bar,
        begin=bar.begin,
    )
    print(f"wrote {report['tensors']} tensors to {report['folder']} as {report['layout']}; {bar.finish()}")
    for note in report["notes"]:
        print(f"note: {note}")
    if "modeling_moe_llava.py" in report["files"]:
        print("load it with trust_remote_code=True: modeling_moe_llava.py lies beside the weights")
    return _push(parsed)


def _push(parsed: argparse.Namespace) -> int:
    """Upload what was written, where that is asked for; prints what, or what would be."""
    from megatron_moellava.conversion.push import planned, push

    if not parsed.push:
        return 0
    files = planned(parsed.save)
    if parsed.dry_run:
        print(f"would upload {len(files)} files to {parsed.push}:")
        for name, size in files:
            print(f"  {size:>14,}  {name}")
        return 0
    print(f"uploaded {len(files)} files to {push(parsed.save, parsed.push, private=parsed.private)}")
    return 0


def run_export_adapter(parsed: argparse.Namespace) -> int:
    """An adapter checkpoint -> a folder for `peft`."""
    from megatron_moellava.conversion.adapter_exports import export_adapter

    _refuse(parsed, ("tokenizer", "tower", "dtype", "license", "scores"))
    report = export_adapter(parsed.checkpoint, save=parsed.save, verify=not parsed.no_verify)
    print(f"wrote {report['tensors']} tensors to {report['folder']} for peft")
    print("its base is what `moellava convert export BASE --layout transformers` writes")
    return _push(parsed)


def run_merge(parsed: argparse.Namespace) -> int:
    """An adapter checkpoint and its base -> a whole model; prints how many matrices changed."""
    from megatron_moellava.conversion.merge import merge_adapter

    bar = Bar()
    report = merge_adapter(
        parsed.checkpoint,
        save=parsed.save,
        base=parsed.base,
        verify=not parsed.no_verify,
        progress=bar,
        begin=bar.begin,
    )
    print(f"{report['merged']} matrices of {report['base']} have their adapters merged; {bar.finish()}")
    print(f"wrote {report['tensors']} tensors to {report['folder']}")
    return 0


def run_average(parsed: argparse.Namespace) -> int:
    """A run's checkpoint -> one with the averaged weights; prints how many tensors are averages."""
    from megatron_moellava.conversion.average import take_average

    bar = Bar()
    report = take_average(
        parsed.checkpoint, save=parsed.save, verify=not parsed.no_verify, progress=bar, begin=bar.begin
    )
    print(f"{report['averaged']} of {report['tensors']} tensors are averages; {bar.finish()}")
    print(f"wrote {report['folder']}")
    return 0


def run_add_modality(parsed: argparse.Namespace) -> int:
    """A checkpoint -> one with a tower, a projector, or both for a modality; prints what its pictures go through."""
    from megatron_moellava.conversion.modality import add_modality

    bar = Bar()
    report = add_modality(
        parsed.checkpoint,
        save=parsed.save,
        modality=parsed.modality,
        tower=parsed.tower,
        copy_tower=parsed.copy_tower,
        projector=parsed.projector,
        seed=parsed.seed,
        verify=not parsed.no_verify,
        progress=bar,
        begin=bar.begin,
    )
    branch, main = report["branch"], report["model"].tower
    tower = branch.seen_by(main)
    print(
        f"pictures of {branch.modality}: {'a tower of their own, ' if branch.tower else 'the tower '}{tower.name} "
        f"({tower.num_features} visual tokens each), {parsed.projector} projector; {bar.finish()}"
    )
    print(f"wrote {report['tensors']} tensors to {report['folder']}")
    return 0


def run_upcycle(parsed: argparse.Namespace) -> int:
    """A dense checkpoint -> one whose MLPs are copied to experts; prints the experts and their layers."""
    from megatron_moellava.conversion.upcycle import upcycle_checkpoint
    from megatron_moellava.conversion.upcycle_request import request, vision_request

    bar = Bar()
    vision = vision_request(
        tower_experts=parsed.tower_experts,
        tower_topk=parsed.tower_topk,
        tower_placement=parsed.tower_placement,
        projector_experts=parsed.projector_experts,
        projector_topk=parsed.projector_topk,
        normalize_top1=parsed.normalize_top1,
    )
    moe = None
    if parsed.num_experts or not vision:
        moe = request(
            parsed.checkpoint,
            num_experts=parsed.num_experts or 4,
            topk=parsed.topk,
            placement=parsed.placement,
            residual=parsed.residual,
            expert_bias=parsed.expert_bias,
            shared_expert=parsed.shared_expert,
            granularity=parsed.granularity,
            expert_width=parsed.moe_ffn_hidden_size,
            normalize_top1=parsed.normalize_top1,
        )
    else:
        _refuse_without_language_experts(parsed)
    report = upcycle_checkpoint(
        parsed.checkpoint,
        save=parsed.save,
        moe=moe,
        **vision,
        noise_std=parsed.noise,
        router_scale=parsed.router_scale,
        drop=parsed.drop,
        select=parsed.select,
        seed=parsed.seed,
        verify=not parsed.no_verify,
        progress=bar,
        begin=bar.begin,
    )
    first, *others = _made_experts(report["model"], moe is not None, vision)
    print("\n".join([f"{first}; {bar.finish()}", *others]))
    if moe is not None:
        _say_what_the_language_model_computes(parsed, moe, report)
    print(f"wrote {report['tensors']} tensors to {report['folder']}")
    return 0


def _refuse_without_language_experts(parsed: argparse.Namespace) -> None:
    """ConfigError for options that describe experts of the language model, where only other parts get some."""
    from megatron_moellava.config import ConfigError

    plain = {"granularity": 1, "drop": 0.0}
    named = ("topk", "placement", "residual", "expert_bias", "shared_expert", "granularity", "moe_ffn_hidden_size")
    for name in (*named, "drop", "select"):
        if getattr(parsed, name) not in (None, False, "", plain.get(name)):
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} describes experts of the language model; give --num-experts as well")


def _made_experts(model, has_language: bool, vision: dict) -> list[str]:
    """A line for each part of the model that has got experts."""
    lines = []
    if has_language:
        moe, layers = model.moe, ", ".join(map(str, model.moe_layers))
        width = f" of width {moe.moe_ffn_hidden_size}" if moe.moe_ffn_hidden_size else ""
        lines.append(f"{moe.num_moe_experts} experts{width}, top-{moe.moe_router_topk}, in layers {layers}")
    for section, moe in vision.items():
        where = f", in layers {', '.join(map(str, model.tower_moe_layers))}" if section == "tower_moe" else ""
        part = section.removesuffix("_moe")
        lines.append(f"{part}: {moe.num_moe_experts} experts, top-{moe.moe_router_topk}{where}")
    return lines


def _say_what_the_language_model_computes(parsed: argparse.Namespace, moe, report: dict) -> None:
    """Whether the function stays, and where the experts come from."""
    if moe.moe_router_topk == 1 and not moe.normalize_top1 and not parsed.expert_bias:
        print(
            "top-1: the chosen expert's weight is its probability, so the function changes; --normalize-top1 keeps it"
        )
    if parsed.select:
        print(f"experts chosen by {report['utility']}; which one each was made of is in run.json (provenance.sources)")
    if parsed.expert_bias:
        alone = moe.moe_router_topk == 1
        print(
            "expert biases start at zero, with moe.router=megatron; the router's scores are sigmoids: "
            + ("the chosen expert's weight is below 1" if alone else "the weights of equal experts still sum to 1")
        )
    if parsed.shared_expert:
        print("a shared expert that leaves the function as it is: it halves the others' output, or starts at zero")


def run_place_experts(parsed: argparse.Namespace) -> int:
    """Print what other places would do for the busiest rank, and write them where --save is given."""
    from megatron_moellava.checkpoint.description import read_description
    from megatron_moellava.checkpoint.folders import require_checkpoint
    from megatron_moellava.conversion.place_experts import find_places, note, place_experts, saved_share
    from megatron_moellava.conversion.routing_log import ROUTING
    from megatron_moellava.costs.shapes import model_from_json

    checkpoint = require_checkpoint(parsed.checkpoint)
    run = read_description(checkpoint)
    placings = find_places(run, parsed.routing or checkpoint.parent / ROUTING, parsed.expert_parallel, parsed.records)
    for placing in placings:
        print(
            f"layer {placing.layer}: busiest of {placing.ranks} ranks {placing.before:.2f} x the mean, "
            f"{placing.after:.2f} with {placing.moved} experts on other ranks"
        )
    saved = saved_share(placings)
    print(f"the experts' share of a step would take {1 - saved:.0%} of its time, if routers go on as they did")
    if parsed.save is None:
        return 0
    if not any(placing.moved for placing in placings):
        print("no place is better than today's; nothing was written")
        return 0
    if hint := note(model_from_json(run.model).moe):
        print(hint)
    print(f"wrote {place_experts(checkpoint, parsed.save, placings, verify=not parsed.no_verify)}")
    return 0


def run_inspect(parsed: argparse.Namespace) -> int:
    """Print a table of a checkpoint's tensors."""
    from megatron_moellava.conversion.inspection import inspect

    print(inspect(parsed.checkpoint, verify=not parsed.no_verify))
    return 0


def run_diff(parsed: argparse.Namespace) -> int:
    """Print how two checkpoints differ; 1 when they do."""
    from megatron_moellava.conversion.inspection import diff

    bar = Bar()
    differences, same = diff(parsed.first, parsed.second, verify=not parsed.no_verify, progress=bar, begin=bar.begin)
    bar.finish()
    for item in differences:
        print(f"{item.name}: {item.what}")
    print(f"{same} tensors are bit-identical, {len(differences)} differ")
    return 1 if differences else 0


def run_seal(parsed: argparse.Namespace) -> int:
    """Write digests and seal of a checkpoint that has none."""
    from megatron_moellava.conversion.seal import seal_checkpoint

    print(seal_checkpoint(parsed.checkpoint))
    return 0


COMMANDS = {
    "import": run_import,
    "export": run_export,
    "upcycle": run_upcycle,
    "add-modality": run_add_modality,
    "merge": run_merge,
    "average": run_average,
    "place-experts": run_place_experts,
    "inspect": run_inspect,
    "diff": run_diff,
    "seal": run_seal,
}
