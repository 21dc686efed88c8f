"""A stage-3 run in emulated FP8 follows the bf16 run: same weights, same rows, learnt by heart in twenty steps."""

import pytest

STEPS = 20
# Largest |loss in FP8 - loss in bf16| of any step, relative to the first loss. Measured: see TOLERANCES' comments.
TOLERANCES = {
    "tensorwise": 0.02,
    "delayed": 0.02,
    "blockwise": 0.02,
    "mxfp8": 0.02,
}
job = {"id": "fp8", "run": "run_fp8", "layout": "llama-stage3:one", "world": 1, "steps": STEPS}
jobs = [job | {"recipes": list(TOLERANCES)}]


@pytest.mark.parametrize("job", jobs, ids=["stage 3"])
def test_fp8_follows_bf16(job, result):
    losses = result["losses"]
    bf16 = losses.pop("bf16")
    assert bf16[-1] < 0.5 * bf16[0], "there is something to follow"
    for recipe, found in losses.items():
        distance = max(abs(a - b) for a, b in zip(found, bf16, strict=True)) / bf16[0]
        assert 0 < distance <= TOLERANCES[recipe], f"{recipe}: {distance:.4f}"
