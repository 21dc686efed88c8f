"""The tower's own retrieval, with a random tower and pictures that it cannot confuse, or cannot tell apart."""

import pytest
import torch
from PIL import Image

from megatron_moellava.towers import get_tower
from megatron_moellava.towers.from_config import hf_config_of

COLORS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250), "white": (255, 255, 255)}


@pytest.fixture
def tower(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = hf_config_of(get_tower("clip-tiny"))
    config.pop("model_type", None)
    CLIPVisionModel(CLIPVisionConfig(**config)).save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


def draw(folder, name, color):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (72, 72), color).save(folder / name)
    return name


def test_pictures_that_look_the_same_are_found_and_others_are_not(tower, tmp_path):
    from retrieval import retrieval_ceiling

    train = [draw(tmp_path, f"train/{name}-0.png", color) for name, color in COLORS.items()]
    tests = [draw(tmp_path, f"test/{name}-1.png", color) for name, color in COLORS.items()]
    tests.append(draw(tmp_path, "test/red-2.png", COLORS["blue"]))  # looks blue
    found = retrieval_ceiling(tower, get_tower("clip-tiny"), tmp_path, train, tests)
    assert found == {"exact": 80.0, "pictures": 5, "among": 4}


def test_a_thing_is_its_file_without_the_number_of_the_view():
    from retrieval import thing_of

    assert thing_of("names/train/1F1E9-1F1EA-3.png") == "1F1E9-1F1EA"
