"""Published models and trainings, met by the formulas."""

from dataclasses import replace

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import load_config
from megatron_moellava.costs.gpus import GPUS
from megatron_moellava.costs.layout import Layout
from megatron_moellava.costs.parameters import parameters_of
from megatron_moellava.planning import published
from megatron_moellava.towers import get_tower
from tests.helpers.paths import REPO

DOCUMENT = REPO / "docs" / "measurements" / "planning.md"


def test_document_has_the_table_that_the_code_computes():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert published.markdown_table() in text, "run python -m megatron_moellava.planning.published"


def test_published_language_models_are_met_within_a_sixth():
    checks = {item.run.name: item for item in published.check_all() if item.run.unit == "mfu"}
    assert abs(checks["Mixtral 8x7B"].off) < 0.01, "the constants were fitted to this run"
    others = [item for item in checks.values() if not item.run.calibrates]
    assert len(others) == 3 and all(abs(item.off) < 1 / 6 for item in others)
    for item in checks.values():
        assert item.memory < GPUS["h100"].memory, f"{item.run.name} ran on 80 GB"


def test_published_layouts_count_the_published_parameters():
    """Active and total parameters of the models whose runs are checked, in billions."""
    for run, total in ((published.RUNS[0], 46.7), (published.RUNS[1], 140.6), (published.RUNS[3], 57.4)):
        alone = replace(run, gpus=1, parallel=type(run.parallel)(), global_batch_size=1).layout
        count = parameters_of(alone, 0)
        language = sum(number for part, number in count.items() if part not in ("tower", "projector"))
        assert language / 1e9 == pytest.approx(total, rel=0.005)


@pytest.mark.parametrize(("name", "total"), [("stablelm-2-1.6b", 2.9), ("qwen-1.8b", 3.1), ("phi-2", 5.3)])
def test_models_of_the_paper_have_its_number_of_parameters(name, total):
    run = load_config(None, [f"model.backbone={name}", "training.stage=3", "moe.num_moe_experts=4"])
    layout = Layout(run=run, backbone=get_backbone(name), tower=get_tower(run.model.tower), world_size=1)
    language = sum(n for part, n in parameters_of(layout, 0).items() if part not in ("tower", "projector"))
    assert round(language / 1e9, 1) == total
