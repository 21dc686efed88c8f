"""The Kubernetes manifest: its schema, and that what it starts is what tools/train.py understands."""

import json
import re

import jsonschema
import pytest
import yaml

from tests.helpers.paths import REPO

SCHEMA = json.loads((REPO / "tests" / "helpers" / "pytorchjob_schema.json").read_text())


@pytest.fixture
def job() -> dict:
    return yaml.safe_load((REPO / "examples/kubernetes/pytorchjob.yaml").read_text())


def pods(job: dict) -> list[dict]:
    return [replica["template"]["spec"] for replica in job["spec"]["pytorchReplicaSpecs"].values()]


def value_of(words: list[str], option: str) -> str:
    return next(word.split("=", 1)[1] for word in words if word.startswith(option + "="))


def test_manifest_follows_the_schema(job):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(job, SCHEMA)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda job: job["spec"].update(replicas=2),
        lambda job: job["spec"]["pytorchReplicaSpecs"].update(Workers=job["spec"]["pytorchReplicaSpecs"].pop("Worker")),
        lambda job: pods(job)[0]["containers"][0].update(arguments=[]),
        lambda job: pods(job)[0]["containers"][0]["env"].append({"name": "STEPS", "value": 5}),
        lambda job: pods(job)[0]["containers"][0]["resources"]["limits"].update(memory="512 GB"),
        lambda job: job["spec"]["pytorchReplicaSpecs"]["Master"].update(restartPolicy="OnError"),
    ],
)
def test_schema_refuses_what_kubernetes_would(job, spoil):
    spoil(job)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, SCHEMA)


def test_operator_finds_container_and_port(job):
    for pod in pods(job):
        assert [container["name"] for container in pod["containers"]] == ["pytorch"]
        assert [port["name"] for port in pod["containers"][0]["ports"]] == ["pytorchjob-port"]


def test_every_variable_is_defined(job):
    given_by_operator = {"MASTER_ADDR", "MASTER_PORT"}
    for pod in pods(job):
        for container in [*pod["initContainers"], *pod["containers"]]:
            own = {entry["name"] for entry in container["env"]}
            used = set(re.findall(r"\$\((\w+)\)", " ".join(container["command"] + container["args"])))
            assert used <= own | given_by_operator


def test_world_size_nodes_and_gpus_agree(job):
    nodes = sum(replica["replicas"] for replica in job["spec"]["pytorchReplicaSpecs"].values())
    for pod in pods(job):
        command = pod["containers"][0]["command"]
        gpus = pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        assert int(value_of(command, "--nnodes")) == nodes
        assert int(value_of(command, "--nproc-per-node")) == gpus
        assert int(value_of(pod["initContainers"][0]["command"], "WORLD_SIZE")) == nodes * gpus


def test_arguments_make_a_run_of_the_recipe_global_batch(job):
    from megatron_moellava.config import load_config

    args = pods(job)[0]["containers"][0]["args"]
    overrides = [word for word in args if re.match(r"\w+\.\w+=", word)]
    stage = next(entry["value"] for entry in pods(job)[0]["containers"][0]["env"] if entry["name"] == "STAGE")
    recipe = REPO / f"examples/recipes/stage{stage}.yaml"
    run = load_config(str(recipe), ["model.backbone=phi-2", f"training.stage={stage}", *overrides])
    assert run.training.global_batch_size % (16 * run.training.micro_batch_size) == 0


@pytest.mark.parametrize(
    ("stage", "batch", "micro", "rate", "aspect"),
    [(1, 256, 32, 1e-3, "square"), (2, 128, 8, 2e-5, "pad"), (3, 128, 8, 2e-5, "pad")],
)
def test_recipes_are_the_original_hyperparameters(stage, batch, micro, rate, aspect):
    """MoE-LLaVA's scripts and the paper's table 9; the constants the original leaves at their defaults too."""
    from megatron_moellava.config import load_config

    recipe = REPO / f"examples/recipes/stage{stage}.yaml"
    run = load_config(str(recipe), ["model.backbone=phi-2", f"training.stage={stage}"])
    training, optimizer, data = run.training, run.optimizer, run.data
    assert (training.global_batch_size, training.micro_batch_size, training.train_steps) == (batch, micro, 0)
    assert (optimizer.lr, optimizer.min_lr, optimizer.lr_decay_style, optimizer.lr_warmup_fraction) == (
        rate,
        0,
        "cosine",
        0.03,
    )
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.999, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_grad, optimizer.projector_lr) == (0, 0, None)
    assert (data.seq_length, data.image_aspect_ratio, data.packing) == (2048, aspect, False)
    assert (data.sampler, data.template) == (("shuffle", "plain") if stage == 1 else ("modality_length", ""))
    assert (run.moe is None) == (stage < 3)
    if run.moe:
        assert (run.moe.num_moe_experts, run.moe.moe_router_topk, run.moe.placement) == (4, 2, "sparse")
        assert (run.moe.router, run.moe.moe_expert_capacity_factor, run.moe.moe_aux_loss_coeff) == (
            "original",
            1.5,
            0.01,
        )
