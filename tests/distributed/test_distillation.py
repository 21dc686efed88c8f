"""A teacher's logits and every step of its student are those of one process, under any layout.

Teacher and student have different language models: a Llama teaches a Phi-2.
"""

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.distributed.same_steps import LEARNING, assert_same_steps
from tests.distributed.test_held_out import LAYOUTS, PADDED, STEADY

SAME = ("loss", "ce_loss", "kl_loss", "grad_norm")
TEACHER = {"model.backbone": "llama-tiny"}
STUDENT = STEADY | LEARNING | {"moe.moe_aux_loss_coeff": 0.1}
SHARDS = [f"rows-{start:07d}.safetensors" for start in (0, 16, 32)]


def started(name: str, settings: dict, **more) -> dict:
    """Weights to start from, trained a little: those of a new model make all tokens alike."""
    return {"id": f"distil-{name}", "run": "run_validated", "world": 1, "settings": settings | more}


large = started("large", TEACHER | LEARNING, **{"optimizer.lr": 1e-2, "training.trains": None, "training.seed": 3})
small = started("small", STEADY, **{"training.train_steps": 2})


def taught(name: str, world: int, layout: dict, needs: tuple = (), **more) -> dict:
    return {
        "id": f"taught-{name}",
        "run": "run_teacher",
        "world": world,
        "settings": TEACHER | layout,
        "load": large["id"],
        "needs": [large, *needs],
    } | more


alone = taught("one", 1, {})
taught_padded = taught("padded-one", 1, PADDED)
teachers = [taught(name, 2, layout, [alone]) for name, layout in LAYOUTS.items()]
teachers += [taught("padded-cp2", 2, PADDED | LAYOUTS["cp2"], [alone]), taught_padded | {"needs": [large, alone]}]
teachers += [taught("tp2-pp2", 4, LAYOUTS["tp2"] | LAYOUTS["pp2"], [alone])]


def distilled(name: str, world: int, settings: dict, needs: tuple = (), **more) -> dict:
    return {
        "id": f"distilled-{name}",
        "run": "run_distilled",
        "world": world,
        "settings": STUDENT | settings,
        "load": small["id"],
        "teacher": alone["id"],
        "needs": [large, small, alone, *needs],
    } | more


def beside(name: str, settings: dict, world: int = 2) -> dict:
    """A layout, with the same run in one process before it."""
    kind = "padded-" if "data.packing" in settings else ""
    one = distilled(f"{kind}one", 1, {key: settings[key] for key in PADDED if key in settings})
    return distilled(kind + name, world, settings, [one], beside=one["id"])


students = [beside(name, layout) for name, layout in LAYOUTS.items()]
students += [beside(name, PADDED | LAYOUTS[name]) for name in ("tp2", "cp2")]
students += [beside("cp2-tp2", LAYOUTS["cp2"] | LAYOUTS["tp2"], 4)]


@pytest.mark.parametrize("job", teachers, ids=[job["id"] for job in teachers])
def test_every_layout_writes_the_logits_of_one_process(job, results, result):
    """Packed or padded, in whatever order the rows were read."""
    assert sorted(path.name for path in (results / job["id"]).glob("rows-*")) == SHARDS
    for shard in SHARDS:
        found, wanted = (load_file(results / name / shard) for name in (job["id"], alone["id"]))
        assert np.array_equal(found["labels_R"], wanted["labels_R"]) and (wanted["labels_R"] >= 0).all()
        assert np.array_equal(found["starts_R"], wanted["starts_R"]) and len(wanted["ids_TK"]) == wanted["starts_R"][-1]
        np.testing.assert_allclose(found["log_probs_TC"], wanted["log_probs_TC"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(np.exp(found["log_probs_TC"]).sum(axis=1), 1.0, atol=1e-5)
        assert (found["ids_TK"] == wanted["ids_TK"]).mean() > 0.99, "but for tokens that are equally likely"


@pytest.mark.parametrize("job", students, ids=[job["id"] for job in students])
def test_every_layout_gives_the_numbers_of_one_process(job, results, result):
    assert result["exit"] == 0
    alone = assert_same_steps(results, job, SAME)
    for one in alone:
        assert one["loss"] == pytest.approx(0.3 * one["ce_loss"] + 0.7 * one["kl_loss"], rel=1e-4)
    assert alone[0]["kl_loss"] > 0.05, "teacher and student differ"


whole = distilled("one", 1, {})
resumed = distilled("resumed", 1, {}, [whole], goes_on=whole["id"])
continued = {
    "id": f"{whole['id']} and {resumed['id']}",
    "run": "run_differences",
    "sources": [whole["id"], resumed["id"]],
    "world": 1,
    "needs": [large, small, alone, whole, resumed],
}


@pytest.mark.parametrize("job", [continued], ids=["resumed"])
def test_a_run_that_goes_on_is_bit_identical(job, results, result):
    assert result["different"] == []
