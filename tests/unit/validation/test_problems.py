"""A run that cannot start is never called valid: one table of a user's mistakes, each with what the message must say."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.checkpoint.description import RunDescription, read_description, write_description
from megatron_moellava.config import ConfigError, MoEConfig, RunConfig, from_dict, set_override, to_dict
from megatron_moellava.costs.shapes import Model
from megatron_moellava.machine import Machine
from megatron_moellava.towers import get_tower
from megatron_moellava.validation.run import layout_problems, load_run, validate
from tests.helpers import data_files
from tests.helpers.made_tokenizer import write_tokenizer
from tests.helpers.paths import REPO


def checkpoint(folder: Path, backbone: str = "llama-tiny", moe: MoEConfig | None = None, **fields) -> str:
    """What a checkpoint says of itself, without its tensors."""
    iteration = folder / "iter_0000004"
    iteration.mkdir(parents=True)
    model = Model(backbone=get_backbone(backbone), tower=get_tower("clip-tiny"), moe=moe)
    write_description(iteration, RunDescription(iteration=4, model=model.to_json(), **fields))
    return str(folder)


CPU = Machine(has_gpu=False, has_transformer_engine=False, has_gradient_fusion=False)


class Wanted:
    """A run that can start, in `folder`; the table below spoils one thing of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = data_files.make_set(folder / "data", 8)
        self.flags: dict[str, object] = {
            "training.stage": 2,
            "model.backbone": "llama-tiny",
            "model.tower": "clip-tiny",
            "checkpoint.save": str(folder / "save"),
        }
        self.overrides = [f"data.tokenizer={write_tokenizer(folder / 'tokenizer')}"]

    def source(self, **changes) -> dict:
        return {"path": str(self.data), "image_folder": str(self.data.parent)} | changes

    def load(self):
        return load_run(flags={"data.sources": [self.source()]} | self.flags, overrides=self.overrides)

    def message(self, world_size: int = 1) -> str:
        with pytest.raises(ConfigError) as error:
            validate(self.load(), world_size, CPU)
        return str(error.value)


@pytest.fixture
def wanted(tmp_path) -> Wanted:
    return Wanted(tmp_path)


def test_the_run_that_the_table_spoils_is_valid(wanted):
    validate(wanted.load(), 1)


def write(wanted: Wanted, text: str | bytes) -> None:
    wanted.data.write_bytes(text.encode() if isinstance(text, str) else text)


def tokenizer(wanted: Wanted, folder: Path | str) -> None:
    wanted.overrides.append(f"data.tokenizer={folder}")


def empty_folder(wanted: Wanted) -> Path:
    (wanted.folder / "empty").mkdir()
    return wanted.folder / "empty"


def needs_code(wanted: Wanted) -> Path:
    folder = empty_folder(wanted)
    (folder / "tokenization_other.py").write_text("")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_other.X"]}}))
    return folder


def damaged(wanted: Wanted) -> Path:
    folder = empty_folder(wanted)
    (folder / "tokenizer.json").write_text('{"model": ')
    return folder


def save_with(wanted: Wanted, name: str) -> None:
    (wanted.folder / "save").mkdir()
    (wanted.folder / "save" / name).write_text("{}")


def half_a_checkpoint(wanted: Wanted) -> None:
    (wanted.folder / "save" / "iter_0000010").mkdir(parents=True)


def load(wanted: Wanted, *overrides: str, moe: MoEConfig | None = None, backbone: str = "llama-tiny", **flags) -> None:
    wanted.flags |= {"checkpoint.load": checkpoint(wanted.folder / "start", backbone, moe)}
    wanted.flags |= {name.replace("__", "."): value for name, value in flags.items()}
    wanted.overrides += overrides


def saved(wanted: Wanted, **fields) -> None:
    checkpoint(wanted.folder / "save", **fields)


def sources(wanted: Wanted, **changes) -> None:
    wanted.flags["data.sources"] = [wanted.source(**changes)]


def unsealed(wanted: Wanted) -> None:
    load(wanted, "training.lora.rank=4")
    (file,) = Path(str(wanted.flags["checkpoint.load"])).glob("iter_*/run.json")
    file.write_text(
        json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "checksum"})
    )


def adapter(wanted: Wanted, *overrides: str, base: str = "base", seal: str | None = None) -> None:
    """checkpoint.load is an adapter of rank 2 beside `base`."""
    whole = checkpoint(wanted.folder / "base")
    seal = seal or read_description(Path(whole) / "iter_0000004").checksum
    named = {"folder": str(wanted.folder / base), "seal": seal}
    held = {"lora": {"rank": 2, "alpha": 4.0}, "base": named}
    wanted.flags["checkpoint.load"] = checkpoint(wanted.folder / "start", adapter=held)
    wanted.overrides += overrides


MISTAKES = {
    # tokenizer
    "no tokenizer": (lambda w: tokenizer(w, ""), "data.tokenizer is empty"),
    "tokenizer folder empty": (lambda w: tokenizer(w, empty_folder(w)), "holds no tokenizer"),
    "tokenizer needs code": (
        lambda w: tokenizer(w, needs_code(w)),
        "running the code that comes with it",
    ),
    "tokenizer damaged": (lambda w: tokenizer(w, damaged(w)), "tokenizer.json"),
    "tokenizer lacks the end": (
        lambda w: tokenizer(w, write_tokenizer(w.folder / "other", control=("<|endoftext|>", "<unk>"))),
        "data.template='v1' writes </s>",
    ),
    "tokenizer too large": (
        lambda w: tokenizer(w, write_tokenizer(w.folder / "other", size=513)),
        "has 513 tokens, more than the vocab_size=512 of llama-tiny",
    ),
    "tokenizer is a picture": (lambda w: tokenizer(w, w.data.parent / "a.png"), "neither a folder nor a SentencePiece"),
    # data
    "no data": (lambda w: w.flags.update({"data.sources": []}), "data.sources is empty"),
    "data is missing": (lambda w: sources(w, path="/nowhere.json"), "/nowhere.json does not exist"),
    "data is empty": (lambda w: write(w, ""), "holds no rows"),
    "data is an empty list": (lambda w: write(w, "[]"), "holds no rows"),
    "data is not JSON": (lambda w: write(w, "colour,answer\n"), "not valid JSON"),
    "data is a picture": (lambda w: sources(w, path=str(w.data.parent / "a.png")), "a.png"),
    "rows are bad": (lambda w: write(w, '[{"question": "a"}]'), "the row's keys are 'question'"),
    "picture is missing": (lambda w: (w.data.parent / "a.png").unlink(), "a.png does not exist"),
    "folder without an index": (lambda w: sources(w, path=str(w.data.parent)), "without Energon's .nv-meta"),
    "weight of 0": (lambda w: sources(w, weight=0), "data.sources[0].weight=0.0 must be positive"),
    "weight below 0": (lambda w: sources(w, weight=-1), "data.sources[0].weight=-1.0 must be positive"),
    "weight of nothing": (lambda w: sources(w, weight="nan"), "weight=nan must be positive"),
    # checkpoint.load
    "dense checkpoint for stage 3": (
        lambda w: load(w, "moe.num_moe_experts=4", training__stage=3),
        "holds a dense model (llama-tiny), and moe.* asks for experts; make them first: moellava convert upcycle",
    ),
    "dense checkpoint for stage 3, no experts asked for": (
        lambda w: load(w, training__stage=3),
        "training.stage=3 trains MoE layers, and this model has none",
    ),
    "another backbone": (
        lambda w: load(w, model__backbone="qwen2-tiny"),
        "holds llama-tiny, clip-tiny, which is not the model of this run: backbone.num_query_groups 4 there, 2 here",
    ),
    "another tower": (lambda w: load(w, model__tower="siglip-tiny"), "tower.hidden_size 96 there, 128 here"),
    "other experts": (
        lambda w: load(w, "moe.num_moe_experts=8", moe=MoEConfig()),
        "moe.num_moe_experts 4 there, 8 here",
    ),
    "experts elsewhere": (lambda w: load(w, "moe.placement=dense", moe=MoEConfig()), "moe.layers [0, 2] there"),
    "MoE checkpoint for a dense run": (lambda w: load(w, "moe=null", moe=MoEConfig()), "this run sets moe to null"),
    "no checkpoint": (
        lambda w: w.flags.update({"checkpoint.load": "/nowhere"}),
        "/nowhere holds no complete checkpoint",
    ),
    # checkpoint.save
    "save holds a model": (lambda w: save_with(w, "config.json"), "holds a Hugging Face model (config.json)"),
    "save holds half a checkpoint": (half_a_checkpoint, "iter_0000010 without run.json"),
    "save holds a conversion": (saved, "holds a checkpoint of a conversion that cannot be continued as stage 2"),
    "save holds another stage": (
        lambda w: saved(w, stage=1, optimizer_steps=4),
        "holds a checkpoint of stage 1 that cannot be continued as stage 2",
    ),
    "save is a file": (lambda w: w.flags.update({"checkpoint.save": str(w.data)}), "rows.json is not a folder"),
    # fields
    "learning rate below its end": (lambda w: w.overrides.append("optimizer.min_lr=1"), "optimizer.min_lr=1.0 is more"),
    "nothing trained": (lambda w: w.overrides.append("training.trains=[]"), "training.trains is empty"),
    "no GPU": (lambda w: w.overrides.append("training.device=cuda"), "training.device=cuda: torch finds no GPU"),
    "no kernel": (
        lambda w: w.overrides.append("optimizer.gradient_accumulation_fusion=true"),
        "gradient_accumulation_fusion=true needs Transformer Engine and apex's kernel",
    ),
    "size of 0": (lambda w: w.overrides.append("parallel.tensor_model_parallel_size=0"), "must be at least 1"),
    "a learning rate of 0": (lambda w: w.overrides.append("optimizer.lr=0"), "optimizer.lr=0: no step would change"),
    "rows shorter than an image": (
        lambda w: w.overrides.append("data.seq_length=36"),
        "an image is 36 tokens, which leaves nothing to learn of the 36 of a sample",
    ),
    "samples shorter than an image": (
        lambda w: w.overrides.append("data.max_sample_length=20"),
        "leaves nothing to learn of the 20 of a sample",
    ),
    "not a number": (lambda w: w.overrides.append("optimizer.lr=nan"), "optimizer.lr=nan must be"),
    # adapters
    "adapters in stage 1": (
        lambda w: load(w, "training.lora.rank=4", training__stage=1),
        "training.lora: stage 1 trains a new projector whole",
    ),
    "rank 0": (lambda w: load(w, "training.lora.rank=0"), "training.lora.rank=0 must be at least 1"),
    "dropout of everything": (
        lambda w: load(w, "training.lora.dropout=1"),
        "training.lora.dropout=1.0 must be at least 0 and below 1",
    ),
    "no targets": (lambda w: load(w, "training.lora.targets=[]"), "training.lora.targets is empty"),
    "targets that match nothing": (
        lambda w: load(w, "training.lora.targets=[attention,experts]"),
        "training.lora.targets: this model has no matrices of experts (a dense model",
    ),
    "an unknown target": (lambda w: load(w, "training.lora.targets=[mlp]"), "'mlp' is not supported"),
    "adapted and trained": (
        lambda w: load(w, "training.lora.rank=4", "training.trains=[language.ffn]"),
        "training.trains names language.ffn, whose matrices training.lora.targets adapts",
    ),
    "shared by no experts": (
        lambda w: load(w, "training.lora.shared_outer=true"),
        "training.lora.shared_outer=true is about the experts' adapters",
    ),
    "adapters beside nothing": (
        lambda w: w.overrides.append("training.lora.rank=4"),
        "training.lora stands beside the weights of a trained model",
    ),
    "a base without a seal": (lambda w: unsealed(w), "has no seal by which an adapter could name its base"),
    "an adapter where a model is wanted": (
        lambda w: adapter(w),
        "is an adapter, and training.lora is not set; set it as there (rank=2 alpha=4.0",
    ),
    "another adapter": (
        lambda w: adapter(w, "training.lora.rank=3", "training.lora.alpha=4"),
        "is an adapter of training.lora rank=2",
    ),
    "an adapter whose base is gone": (
        lambda w: adapter(w, "training.lora.rank=2", "training.lora.alpha=4", base="gone"),
        "gone holds no checkpoint; say where it is",
    ),
    "an adapter whose base is another by now": (
        lambda w: adapter(w, "training.lora.rank=2", "training.lora.alpha=4", seal="0" * 64),
        "is another checkpoint",
    ),
    "an override that is no YAML": (
        lambda w: w.overrides.append("data.sources=[{"),
        "data.sources=[{' is not valid YAML",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_run_that_cannot_start_is_refused(wanted, mistake):
    spoil, message = MISTAKES[mistake]
    spoil(wanted)
    assert message in wanted.message()


# What megatron-core 0.19.2 aborts on, found by walking through random combinations of layouts, rows, routers, experts,
# recomputation and precision on tiny models. Fields of a run -> what the message must say.
TWO_STAGES = {"parallel.pipeline_model_parallel_size": 2}
INTERLEAVED = TWO_STAGES | {"parallel.virtual_pipeline_model_parallel_size": 2}
COMBINATIONS = {
    "interleaved pipeline with padded rows": (
        INTERLEAVED | {"data.packing": False},
        "virtual_pipeline_model_parallel_size=2 needs rows of one length (data.packing=true)",
    ),
    "interleaved pipeline of one chunk": (
        TWO_STAGES | {"parallel.virtual_pipeline_model_parallel_size": 1},
        "virtual_pipeline_model_parallel_size=1 is no interleaved pipeline",
    ),
    "shared experts beside MLPs with biases": (
        {"model.backbone": "phi-2-tiny", "moe.moe_shared_expert_intermediate_size": 64},
        "moe_shared_expert_intermediate_size=64: the MLPs of phi-2-tiny have biases",
    ),
    "experts whose width does not divide": (
        {"moe.num_moe_experts": 4, "moe.moe_ffn_hidden_size": 33, "parallel.expert_tensor_parallel_size": 2},
        "parallel.expert_tensor_parallel_size=2 does not divide the experts' width of 33",
    ),
    "several experts of weight 1": (
        {"moe.num_moe_experts": 4, "moe.normalize_top1": True},
        "moe.normalize_top1=true with moe.moe_router_topk=2: the weights of several experts sum to 1",
    ),
    "a shared expert that tensor parallelism cannot divide": (
        {"moe.moe_shared_expert_intermediate_size": 63, "parallel.tensor_model_parallel_size": 2},
        "does not divide moe.moe_shared_expert_intermediate_size=63; use 1, 3, 7, 9, 21 or 63",
    ),
    "the gate of no shared expert": ({"moe.moe_shared_expert_gate": True}, "there is no shared expert"),
    "a softmax before the choice of sigmoids": (
        {"moe.moe_router_pre_softmax": True, "moe.moe_router_enable_expert_bias": True},
        "has sigmoids in place of the softmax",
    ),
    "groups of experts without a number to choose": (
        {"moe.moe_router_num_groups": 2},
        "moe.moe_router_num_groups=2 and moe.moe_router_group_topk=None belong together",
    ),
    "groups that do not divide the experts": (
        {"moe.moe_router_num_groups": 3, "moe.moe_router_group_topk": 1, "moe.moe_router_pre_softmax": True},
        "moe.moe_router_num_groups=3 must divide moe.num_moe_experts=4",
    ),
    "more experts of a token than the groups have": (
        {
            "moe.moe_router_num_groups": 4,
            "moe.moe_router_group_topk": 1,
            "moe.moe_router_topk": 2,
            "moe.moe_router_pre_softmax": True,
        },
        "moe.moe_router_topk=2: 1 groups of 1 experts have fewer",
    ),
    "groups of logits": (
        {"moe.moe_router_num_groups": 2, "moe.moe_router_group_topk": 1},
        "compares sums of scores, which logits are not",
    ),
    "the original's router with a softmax before the choice": (
        {"moe.moe_router_pre_softmax": True, "moe.router": "original", "data.packing": False},
        "moe.moe_router_pre_softmax=True: the original router has no such thing",
    ),
    "a dense run of a backbone with experts": (
        {"model.backbone": "olmoe-tiny"},
        "moe is null, and olmoe-tiny has experts",
    ),
    "other experts than the backbone's": (
        {"model.backbone": "olmoe-tiny", "moe.num_moe_experts": 8, "moe.moe_router_topk": 3, "moe.placement": "dense"},
        "moe.moe_router_pre_softmax=False: olmoe-tiny has experts of its own, with True; leave it out",
    ),
    "split experts with biases": (
        {"model.backbone": "phi-2-tiny", "moe.num_moe_experts": 4, "parallel.expert_tensor_parallel_size": 2},
        "the experts of phi-2-tiny have biases",
    ),
    "roles that a dense model lacks": (
        {"training.trains": ["router", "experts"]},
        "training.trains=['router', 'experts']: a dense model has no such parameters",
    ),
    "capacity where a rank has a share of the sequence": (
        {"moe.moe_expert_capacity_factor": 1.0, "parallel.tensor_model_parallel_size": 2},
        "leave it unset (dropless)",
    ),
    "rows of several lengths and the all-gather dispatcher": (
        {"moe.moe_token_dispatcher_type": "allgather", "data.packing": False},
        "allgather needs rows of one length",
    ),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_combination_that_cannot_work_is_refused_and_never_planned(name):
    fields, message = COMBINATIONS[name]
    tree: dict = {"model": {"backbone": "llama-tiny", "tower": "clip-tiny"}, "training": {"stage": 2}}
    for path, value in fields.items():
        set_override(tree, path, value)
    run = from_dict(RunConfig, tree)
    assert message in "\n".join(layout_problems(run, get_backbone(run.model.backbone), 2))
    with pytest.raises(ConfigError) as error:
        validate(run, 2)
    assert message in str(error.value)


def test_all_problems_are_reported_together(wanted):
    wanted.overrides += ["training.recompute=ful", "data.sorces=1", "optimizer.clip_grad=-1", "data.tokenizer=/nowhere"]
    said = wanted.message().splitlines()
    assert len(said) == 4
    assert "did you mean full? Use one of: none, full, selective, moe" in wanted.message()


def test_a_wrong_field_brings_no_second_problem_of_its_default(wanted):
    wanted.flags["data.sources"] = [{"file": "x"}]
    assert "data.sources is empty" not in wanted.message()


def test_a_resumed_run_needs_its_start_no_more(wanted):
    """Backbone, tower and experts come from the checkpoint in `checkpoint.save`; that in `checkpoint.load` may be gone."""
    saved(wanted, backbone="qwen2-tiny", stage=2, optimizer_steps=4)
    wanted.flags |= {"checkpoint.load": "/nowhere", "model.backbone": "", "model.tower": ""}
    run = wanted.load()
    validate(run, 1)
    assert (run.model.backbone, run.model.tower) == ("qwen2-tiny", "clip-tiny")


def test_a_resumed_run_needs_the_folders_of_its_models_no_more(wanted):
    saved(wanted, backbone="qwen2-tiny", stage=2, optimizer_steps=4)
    wanted.flags |= {"model.backbone": "/gone/qwen2", "model.tower": "/gone/clip"}
    run = wanted.load()
    validate(run, 1)
    assert (run.model.backbone, run.model.tower) == ("qwen2-tiny", "clip-tiny")
    wanted.flags["model.backbone"] = "qwen2-tony"
    assert "neither a known backbone nor a folder" in wanted.message(), "a misspelled name is no folder that is gone"


def start(wanted: Wanted, name: str) -> dict:
    """What a run remembers of the checkpoint that it started from."""
    path = Path(checkpoint(wanted.folder / name, provenance={"operation": name})) / "iter_0000004"
    return {"source": f"{name}/iter_0000004", "source_seal": read_description(path).checksum}


def test_the_start_checkpoint_may_be_moved_and_gone_but_not_another(wanted):
    begun = start(wanted, "start")
    start(wanted, "another")
    config = to_dict(wanted.load()) | {"checkpoint": {"load": "start"}}
    saved(wanted, stage=2, optimizer_steps=4, provenance=begun, config=config)
    (wanted.folder / "start").rename(wanted.folder / "moved")
    for load in ("", "/nowhere", str(wanted.folder / "moved"), "start"):
        wanted.flags["checkpoint.load"] = load
        validate(wanted.load(), 1)
    wanted.flags["checkpoint.load"] = str(wanted.folder / "another")
    wanted.flags |= {"training.seed": 7, "model.backbone": "qwen2-tiny"}
    assert "training.seed=42 then, 7 now" in wanted.message()
    assert "which is not the model of this run" in wanted.message(), "all of it at once"
    assert "started from start/iter_0000004 (checkpoint.load=start), and checkpoint.load=" in wanted.message()
    assert "(another/iter_0000004), which a run that goes on does not read" in wanted.message()


@pytest.mark.parametrize("text", ["", "{", '{"format": 1}'])
def test_a_damaged_newest_checkpoint_is_passed_over(wanted, text):
    """Training sets it aside and takes the one before; the check must not end the run first."""
    saved(wanted, stage=2, optimizer_steps=4)
    damaged = wanted.folder / "save/iter_0000006"
    damaged.mkdir()
    (damaged / "run.json").write_text(text)
    validate(wanted.load(), 1)


def test_a_checkpoint_that_the_yaml_file_names_brings_its_model(wanted):
    file = wanted.folder / "run.yaml"
    file.write_text(json.dumps({"checkpoint": {"load": checkpoint(wanted.folder / "start", moe=MoEConfig())}}))
    flags = {"training.stage": 3, "data.sources": [wanted.source()]}
    run = load_run(config=str(file), flags=flags, overrides=wanted.overrides)
    validate(run, 1)
    assert run.model.backbone == "llama-tiny" and run.moe == replace(MoEConfig())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_backbone_with_experts_of_its_own_brings_them(wanted, stage):
    """Without a checkpoint, beside settings of the training alone, and of a checkpoint whose experts have grown."""
    own = get_backbone("qwen2-moe-tiny").moe
    wanted.flags |= {"model.backbone": "qwen2-moe-tiny", "training.stage": stage}
    wanted.overrides += ["moe.moe_aux_loss_coeff=0.5", "parallel.expert_model_parallel_size=2"]
    run = wanted.load()
    validate(run, 2, CPU)
    assert run.moe == replace(own, moe_aux_loss_coeff=0.5)
    grown = replace(own, num_moe_experts=16, moe_router_topk=6)
    load(wanted, moe=grown, backbone="qwen2-moe-tiny")
    del wanted.flags["model.backbone"]
    assert wanted.load().moe == replace(grown, moe_aux_loss_coeff=0.5)
    validate(wanted.load(), 2, CPU)
    wanted.overrides.append("moe.moe_router_topk=3")
    assert "moe.moe_router_topk=3:" in wanted.message(2)


def test_a_home_folder_is_meant_in_a_yaml_file(wanted, monkeypatch):
    """Else a folder of the name `~` would be made in the folder of the job."""
    monkeypatch.setenv("HOME", str(wanted.folder))
    checkpoint(wanted.folder / "start", moe=MoEConfig())
    file = wanted.folder / "run.yaml"
    file.write_text('{"checkpoint": {"load": "~/start", "save": "~/new"}, "logging": {"directory": "~/log"}}')
    flags = {"training.stage": 3, "data.sources": [wanted.source()]}
    run = load_run(config=str(file), flags=flags, overrides=wanted.overrides)
    validate(run, 1)
    found = (run.checkpoint.load, run.checkpoint.save, run.logging.directory)
    assert found == tuple(str(wanted.folder / name) for name in ("start", "new", "log"))
    assert run.moe == replace(MoEConfig())


def test_the_answer_takes_no_torch_and_two_seconds_at_most(wanted):
    """Of CPU; 0.5 s were measured, so that the limit has a head-room of four. The modules decide, the time is shown."""
    words = ["tools/train.py", "--validate-only", "--stage", "2", "--backbone", "llama-tiny", "--tower", "clip-tiny"]
    words += ["--data", str(wanted.data), "--image-folder", str(wanted.data.parent), *wanted.overrides]
    code = f"""
import resource, runpy, sys
sys.argv = {words!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = [name for name in ("torch", "transformers", "megatron.core", "megatron.energon") if name in sys.modules]
assert not heavy, f"--validate-only imported {{heavy}}"
used = resource.getrusage(resource.RUSAGE_SELF)
print(f"{{used.ru_utime + used.ru_stime:.2f}} s of CPU")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    assert "the run is valid" in result.stdout
