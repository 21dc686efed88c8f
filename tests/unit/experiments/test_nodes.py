"""A whole small chain: a dense checkpoint, upcycled and trained as nodes of a grid, and its routing analysed."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from megatron_moellava import parallel
from megatron_moellava.analysis.command import analyse
from megatron_moellava.analysis.similarity import expert_similarity
from megatron_moellava.config import CheckpointConfig, CheckpointError, ConfigError, LoggingConfig, ParallelConfig
from megatron_moellava.experiments.grid import load_grid
from megatron_moellava.experiments.nodes import finished, overrides_of, resolve, run_node
from megatron_moellava.training.loop import Trainer
from tests.helpers import data_files
from tests.helpers.inference_models import TOKENIZER, tiny_run

from megatron.core import dist_checkpointing

FACTS = 2  # that an answer holds
QUESTIONS = ["what color is it?", "is it red?"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(grid, runs, nodes) of a chain that has been run."""
    folder = tmp_path_factory.mktemp("chain")
    save_dense(folder / "stage2")
    write_data(folder / "data")
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    grid = load_grid(folder / "grid.yaml")
    nodes = grid.chain("moe", 1)
    for node in nodes[1:]:
        run_node(grid, folder / "runs", node)
    return grid, folder, nodes


RUN = {
    "data": {"template": "v1", "seq_length": 384, "num_workers": 0},
    "training": {"global_batch_size": 2, "precision": "fp32"},
    "logging": {"tensorboard": False, "routing_interval": 1},
}


GRID = {
    "baseline": "moe",
    "seeds": [1],
    "cells": {"moe": {}},
    "steps": {
        "stage2": {"kind": "given", "folder": "{here}/stage2"},
        "upcycle": {"kind": "upcycle", "from": "stage2", "moe": {"num_moe_experts": 3}, "noise_std": 0.0},
        "stage3": {
            "kind": "train",
            "from": "upcycle",
            "stage": 3,
            "steps": 3,
            "data": "{here}/data/rows.json",
            "tokenizer": str(TOKENIZER),
            "config": "{here}/run.yaml",
            "set": {"optimizer": {"lr": 0.01, "lr_warmup_fraction": 0.0}},
            "ask": {"questions": "{here}/data/test.jsonl", "images": "{here}/data"},
        },
    },
}


def save_dense(folder, backbone: str = "llama-tiny"):
    parallel.initialize(ParallelConfig(), 1)
    run = replace(
        tiny_run(backbone=backbone),
        checkpoint=CheckpointConfig(save=str(folder)),
        logging=LoggingConfig(tensorboard=False),
    )
    run = replace(run, training=replace(run.training, micro_batch_size=1, global_batch_size=1))
    trainer = Trainer(run, None, 1)
    trainer.loader = SimpleNamespace(state_dict=dict)
    trainer.save()
    trainer.log.close()
    return folder


def write_data(folder) -> None:
    data_files.write_images(folder)
    rows = [data_files.row(i, ("a.png", None)[i % 2], tag=("color", "existence")[i % 2]) for i in range(12)]
    data_files.write_rows(folder, rows)
    asked = [
        {
            "question_id": i,
            "image": "b.png",
            "question": question,
            "answer": "yes",
            "type": ("color", "existence")[i],
            "facts": FACTS,
        }
        for i, question in enumerate(QUESTIONS)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))


def test_a_node_trains_asks_and_says_what_it_found(chain):
    _, folder, nodes = chain
    numbers = finished(folder / "runs", nodes[-1])["numbers"]
    assert numbers["steps"] == 3
    assert 0 <= numbers["accuracy"] <= 100 and "accuracy color" in numbers
    assert numbers["max_load"] >= 1 and numbers["diverged"] == 0.0
    assert numbers["bits_per_fact"] == pytest.approx(numbers["held_out_loss"] / math.log(2) / FACTS)
    assert numbers["mflops_per_token"] > 0 and numbers["activated_parameters"] < numbers["parameters"]
    records = [json.loads(line) for line in (folder / "runs" / nodes[-1].name / "routing.jsonl").open()]
    assert len(records) == 3
    groups = {name for record in records for name in record["layers"][0]["groups"]}
    assert groups >= {"text", "image", "type:color", "type:existence"}
    assert records[0]["layers"][0]["load_balancing_loss"] > 0


def options(chain, out, **changes):
    _, folder, nodes = chain
    base = {
        "load": folder / "runs" / nodes[-1].name,
        "data": [str(folder / "data/rows.json"), str(folder / "data/test.jsonl")],
        "image_folder": "",
        "origin": str(folder / "stage2"),
        "out": out,
        "limit": 0,
        "overlays": 2,
        "pca": True,
        "tokenizer": "",
        "template": "",
        "precision": "",
        "overrides": [],
        "no_verify": False,
    }
    return SimpleNamespace(**base | changes)


def test_analysis_of_a_checkpoint_counts_every_token(chain, tmp_path):
    text = analyse(options(chain, tmp_path))
    numbers = json.loads((tmp_path / "routing.json").read_text())
    assert "samples: 14" in text
    for layer in numbers["layers"]:
        assert sum(layer["choices"]) == 2 * layer["tokens"]
        groups = layer["groups"]
        assert groups["image"]["tokens"] == 36 * 8  # six rows and two questions with a picture of 36 visual tokens
        assert groups["text"]["tokens"] + groups["image"]["tokens"] == layer["tokens"]
        assert {"type:color", "type:existence"} <= groups.keys()
    assert len(list(tmp_path.glob("overlay_*.png"))) == 2
    assert (tmp_path / "report.html").exists()


def test_similarity_is_that_of_the_tensors(chain):
    _, folder, nodes = chain
    trained, dense = (folder / "runs" / nodes[-1].name, folder / "stage2")
    found = expert_similarity(trained, dense)
    parallel.initialize(ParallelConfig(), 1)  # for Megatron-Core's reader
    now, then = (dist_checkpointing.load_plain_tensors(str(next(path.glob("iter_*")))) for path in (trained, dense))
    prefix = "language_model.decoder.layers.2.mlp."
    names = ("linear_fc1.weight", "linear_fc2.weight")
    origin = np.concatenate([then[prefix + name].double().numpy().ravel() for name in names])
    experts = np.stack(
        [
            np.concatenate([now[f"{prefix}experts.experts.{name}"][e].double().numpy().ravel() for name in names])
            for e in range(3)
        ]
    )
    moves = experts - origin
    assert found.layers == (0, 2)
    assert found.from_origin_LE[1] == pytest.approx(np.linalg.norm(moves, axis=1) / np.linalg.norm(origin))
    assert found.from_origin_LE.min() > 0
    expected = np.linalg.norm(experts[0] - experts[2]) / np.linalg.norm(origin)
    assert found.between_LEE[1, 0, 2] == pytest.approx(expected)
    cosine = moves[0] @ moves[1] / np.linalg.norm(moves[0]) / np.linalg.norm(moves[1])
    assert found.cosine_LEE[1, 0, 1] == pytest.approx(cosine)


def test_the_upcycled_checkpoint_is_an_origin_too_and_its_experts_are_identical(chain):
    _, folder, nodes = chain
    upcycled, trained = (folder / "runs" / node.name for node in nodes[1:])
    assert expert_similarity(upcycled).identical
    one, other = expert_similarity(trained, upcycled), expert_similarity(trained, folder / "stage2")
    assert one.from_origin_LE == pytest.approx(other.from_origin_LE)
    assert expert_similarity(trained).cosine_LEE is None


def test_what_cannot_be_analysed_is_refused(chain, tmp_path):
    _, folder, nodes = chain
    with pytest.raises(ConfigError, match="dense: it has no routers"):
        analyse(options(chain, tmp_path, load=folder / "stage2", tokenizer=str(TOKENIZER)))
    with pytest.raises(CheckpointError, match="--origin"):
        expert_similarity(folder / "runs" / nodes[1].name, save_dense(folder / "phi", "phi-2-tiny"))


def test_a_command_gets_its_settings_and_its_folder(grid, tmp_path):
    node = grid.chain("four", 3)[0]
    run_node(grid, tmp_path, node)
    assert (tmp_path / node.name / "data.json").read_text() == "red 3"
    assert finished(tmp_path, node)["seed"] == 3
    stage2 = grid.chain("four", 3)[1]
    assert resolve(grid, tmp_path, stage2, "data") == str(tmp_path / node.name / "data.json")


def test_settings_become_overrides():
    tree = {"optimizer": {"lr": 0.1, "clip_grad": 0}, "training": {"trains": ["projector"]}}
    assert overrides_of(tree) == ["optimizer.lr=0.1", "optimizer.clip_grad=0", 'training.trains=["projector"]']
