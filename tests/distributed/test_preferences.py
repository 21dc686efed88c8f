"""Stage 4: the reference's log-probabilities and every step's numbers are those of one process, under any layout."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.same_steps import LEARNING, assert_same_steps
from tests.distributed.test_held_out import LAYOUTS, STEADY

SAME = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "nll_loss", "grad_norm")
MPO = {"preference.loss_coeff": 0.8, "preference.quality_coeff": 0.2, "preference.sft_coeff": 1.0}
KTO = {"preference.loss": "kto", "preference.beta": 0.5}
LORA = {"training.lora.rank": 4, "training.lora.alpha": 8.0}
RECOMPUTED = {"training.recompute": "full"}
MODEL = STEADY | {"moe.moe_aux_loss_coeff": 0.1}

start = {"id": "preferred-start", "run": "run_validated", "world": 1, "settings": MODEL | {"training.train_steps": 2}}


def preferred(name: str, world: int, settings: dict, needs: tuple = (), **more) -> dict:
    """A run of stage 4 with a large learning rate, so that the policy goes away from its reference."""
    return {
        "id": f"preferred-{name}",
        "run": "run_preferences",
        "world": world,
        "settings": MODEL | LEARNING | settings,
        "load": start["id"],
        "needs": [start, *needs],
    } | more


def beside(name: str, kind: str, world: int, settings: dict, layout: dict) -> dict:
    """A layout, with the same run in one process before it."""
    alone = preferred(f"{kind}-one", 1, settings)
    return preferred(f"{kind}-{name}", world, settings | layout, [alone], beside=alone["id"])


jobs = [beside(name, "mpo", 2, MPO, layout) for name, layout in LAYOUTS.items()]
jobs += [beside("recomputed", "mpo", 1, MPO, RECOMPUTED), beside("cp2", "kto", 2, KTO, LAYOUTS["cp2"])]
jobs += [beside(name, "lora", 2, MPO | LORA, LAYOUTS[name]) for name in ("tp2", "ep2")]
jobs += [beside("cp2-pp2", "mpo", 4, MPO, LAYOUTS["cp2"] | LAYOUTS["pp2"])]


def log_probs(results, name: str) -> torch.Tensor:
    return load_file(results / f"{name}.safetensors")["log_probs"]


@pytest.mark.parametrize("job", jobs, ids=[job["id"] for job in jobs])
def test_every_layout_gives_the_numbers_of_one_process(job, results, result):
    assert result["exit"] == 0
    reference_R2, alone_R2 = log_probs(results, job["id"]), log_probs(results, job["beside"])
    assert reference_R2.shape == (14, 2) and reference_R2.isfinite().all() and (reference_R2 < 0).all()
    torch.testing.assert_close(reference_R2, alone_R2, rtol=1e-5, atol=1e-4)
    alone = assert_same_steps(results, job, SAME)
    first, last = alone[0], alone[-1]
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-4), "the policy begins as its reference"
    assert last["rewards/margins"] > 0.05, "and learns the preferences"


whole = preferred("mpo-one", 1, MPO)
resumed = preferred("resumed", 1, MPO, [whole], goes_on=whole["id"], log_probs=whole["id"])
continued = {
    "id": f"{whole['id']} and {resumed['id']}",
    "run": "run_differences",
    "sources": [whole["id"], resumed["id"]],
    "world": 1,
    "needs": [start, whole, resumed],
}


@pytest.mark.parametrize("job", [continued], ids=["resumed"])
def test_a_run_that_goes_on_is_bit_identical(job, results, result):
    """The mean reward that the quality term compares with goes on too."""
    assert result["different"] == []
    shifts = [json.loads((results / f"{name}.json").read_text())["preference"] for name in job["sources"]]
    assert shifts[0] == shifts[1] and shifts[0]["shift"] != 0.0
