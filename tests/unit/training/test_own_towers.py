"""Depth with a tower and a projector of its own through all stages, by records that do not say so: the checkpoint does."""

from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from megatron_moellava import parallel
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import ConfigError, MoEConfig, RunConfig, to_dict
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from megatron_moellava.conversion.modality import add_modality
from megatron_moellava.conversion.tensors import loaded
from megatron_moellava.conversion.upcycle import upcycle_checkpoint
from megatron_moellava.data.quantities import open_picture
from megatron_moellava.data.sample import Turn
from megatron_moellava.inference.load import load_for_inference
from megatron_moellava.inference.requests import Request, Sampling
from megatron_moellava.towers import get_tower
from megatron_moellava.towers.branches import own_tower
from megatron_moellava.training.run import train
from megatron_moellava.validation.run import load_run, run_problems
from tests.helpers.data_files import conversation, row, write_images, write_rows
from tests.helpers.inference_models import TOKENIZER, tiny_checkpoint
from tests.helpers.modalities import DEPTH, write_pictures
from tests.helpers.paths import GOLDEN

SIGLIP = GOLDEN / "assets/google/siglip-tiny"  # 16 visual tokens, 48 wide; the model's own, clip-tiny, has 36, 96 wide


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with rows, a config, and a start whose depth has a tower and a projector of its own."""
    folder = tmp_path_factory.mktemp("stages")
    write_images(folder)
    write_pictures(folder)
    ask = conversation("<depth>\n<image>\nwhich?", "the left one")
    rows = [row(number, "a.png" if number % 2 else None) for number in range(4)]
    rows += [{"id": f"d{n}", "image": "b.png", "depth": f"depth/{n % 2}.png", "conversations": ask} for n in range(4)]
    write_rows(folder, rows)
    record = {name: value for name, value in to_dict(DEPTH).items() if name not in ("tower", "projector")}
    data = {"modalities": [record], "sources": [{"path": str(folder / "rows.json"), "image_folder": str(folder)}]}
    data |= {"tokenizer": str(TOKENIZER), "template": "v1", "seq_length": 256, "num_workers": 0}
    training = {"precision": "fp32", "global_batch_size": 2, "train_steps": 2}
    optimizer = {"lr": 1e-2, "lr_warmup_fraction": 0.0}
    tree = {"data": data, "training": training, "optimizer": optimizer, "logging": {"tensorboard": False}}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    tiny_checkpoint(folder / "dense", "dense")
    add_modality(folder / "dense", save=folder / "start", modality="depth", tower=str(SIGLIP))
    return folder


def run_of(place: Path, stage: int, load: str, *overrides: str) -> RunConfig:
    flags = {
        "checkpoint.load": str(place / load),
        "checkpoint.save": str(place / f"stage{stage}"),
        "training.stage": stage,
    }
    return load_run(config=str(place / "run.yaml"), flags=flags, overrides=overrides)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: loaded(tensor) for name, tensor in open_checkpoint(folder).tensors.items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The first two parts of the names of what has changed."""
    changed = (name for name in before if name in after and not torch.equal(before[name], after[name]))
    return {".".join(name.split(".")[:2]) for name in changed}


def test_the_stages_train_what_is_theirs_and_keep_the_rest(place):
    found = {"start": tensors_of(place / "start")}
    for stage, load in ((1, "start"), (2, "stage1"), (3, "moe")):
        if stage == 3:
            upcycle_checkpoint(place / "stage2", save=place / "moe", moe=MoEConfig())
            found["moe"] = tensors_of(place / "moe")
        run = run_of(place, stage, load)
        (record,) = run.data.modalities
        assert own_tower(record) == get_tower(str(SIGLIP)) and record.projector == "own", "of the checkpoint"
        assert train(run) == 0
        found[f"stage{stage}"] = tensors_of(place / f"stage{stage}")
        projectors = {"modality_depth.projector", "projector.linear_fc1", "projector.linear_fc2"}
        changed = moved(found[load], found[f"stage{stage}"])
        assert not {"modality_depth.tower", "vision_tower.decoder"} & changed
        assert changed == projectors if stage == 1 else projectors < changed
    assert train(run_of(place, 3, "moe", "training.train_steps=3")) == 0, "a run goes on by the same records"
    assert require_checkpoint(place / "stage3").name == "iter_0000003"


def test_what_was_trained_answers_about_a_picture_of_the_modality(place):
    """From the checkpoint alone; visual tokens are those of its tower, and other pictures give other answers."""
    engine = load_for_inference(place / "stage3", max_batch_size=2)
    try:
        picture, _ = open_picture(str(place / "depth/0.png"), DEPTH, "depth")
        plain = Image.open(place / "a.png").convert("RGB")
        ask = (Turn(role="user", text="<image>\n<image>\nwhich?"),)
        prompts = [
            engine.prompter(Request(id="x", turns=ask, images=pair)) for pair in ((picture, plain), (plain, picture))
        ]
        assert [prompt.features for prompt in prompts] == [(16, 36), (36, 16)]
        assert prompts[0].digests == prompts[1].digests[::-1]
        (answer,) = engine.generate(
            [Request(id="x", turns=ask, images=(picture, plain), sampling=Sampling(max_new_tokens=3))]
        )
        assert answer.tokens
    finally:
        parallel.shutdown()


def test_runs_that_say_something_else_are_refused_before_a_weight_is_touched(place):
    elsewhere = f"checkpoint.save={place / 'other'}"
    other = run_of(place, 1, "start", "data.modalities=[]", elsewhere)
    (said,) = [text for text in run_problems(other, 1) if "of its own" in text]
    assert said.startswith(
        f"checkpoint.load={place / 'start'} has tower and projector of its own for depth, and data.mod"
    )
    plain = run_of(place, 1, "dense", "data.modalities=[{name: depth, levels: uint16, channels: [{black: 8, white: 1}], "
                   "projector: own}]", elsewhere)  # fmt: skip
    (said,) = [text for text in run_problems(plain, 1) if "of its own" in text]
    assert "moellava convert add-modality --modality depth" in said
    with pytest.raises(ConfigError, match="of its own for depth, which data"):
        train(plain)
