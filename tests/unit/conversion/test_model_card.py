"""What an export says of itself: only what is known, and no place of the machine that made it."""

import json
from dataclasses import replace

import pytest
import yaml

from megatron_moellava.backbones import get_backbone
from megatron_moellava.checkpoint.description import RunDescription
from megatron_moellava.config import ConfigError, MoEConfig
from megatron_moellava.conversion.model_card import USES, model_card
from megatron_moellava.costs.shapes import Model
from megatron_moellava.towers import get_tower

PHI = get_backbone("phi-2")
MODEL = Model(backbone=PHI, tower=get_tower("clip-vit-large-patch14-336"), moe=MoEConfig())
RUN = RunDescription(
    iteration=5196,
    stage=3,
    consumed_samples=665_088,
    model={},
    config={"data": {"sources": [{"path": "/home/someone/secret/llava_mix.json"}]}},
    provenance={
        "operation": "training of stage 3",
        "source": "stage2/iter_0000010",
        "parent": {
            "operation": "upcycle",
            "source": "stage2",
            "parent": {
                "operation": "training of stage 2",
                "data": ["mimic.json"],
                "iteration": 10,
                "consumed_samples": 20,
            },
        },
    },
)
SCORES = [
    {"title": "TextVQA", "metric": "accuracy", "value": 51.4, "standard_error": 0.65, "count": 5000},
    {"title": "VQAv2", "value": None, "notes": ["answers are not public"]},
]


def card(**more) -> str:
    given = {"title": "transformers", "use": "transformers"} | more
    return model_card("phi-moe", MODEL, RUN, **given)


def head(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_the_head_is_the_hubs_metadata():
    found = head(card(licence="apache-2.0"))
    assert found["license"] == "apache-2.0" and found["pipeline_tag"] == "image-text-to-text"
    assert found["base_model"] == ["microsoft/phi-2", "openai/clip-vit-large-patch14-336"] and "moe" in found["tags"]
    assert head(card())["license"] == "unknown"


def test_data_stages_and_routing_are_told_without_places():
    text = card()
    assert "llava_mix.json; 5,196 steps, 665,088 samples" in text and "mimic.json; 10 steps" in text
    assert text.index("training of stage 3") < text.index("upcycle") < text.index("training of stage 2")
    assert "top 2 of 4 experts per token" in text and "/home" not in text


def test_scores_stand_with_their_errors(tmp_path):
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(SCORES))
    assert "| TextVQA | accuracy | 51.40 +- 0.65 | 5,000 |" in card(scores=file)
    assert "VQAv2" not in card(scores=file)


@pytest.mark.parametrize("content", ["[]", "{", '{"value": 1}', "3"])
def test_a_file_without_scores_is_refused(tmp_path, content):
    file = tmp_path / "scores.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"scores\.json"):
        card(scores=file)


def test_a_conversion_and_a_language_model_have_a_card_too():
    run = replace(RUN, config=None, provenance={"operation": "import", "source": "phi-2", "layout": "language-model"})
    text = model_card("phi", Model(backbone=PHI), run, title="x", use="language model")
    assert head(text)["pipeline_tag"] == "text-generation" and "import; of phi-2" in text
    assert "trust_remote_code=True" in card(use="modelling file") and "trust_remote_code" not in card()
    assert all("FOLDER" in text or "`" in text for text in USES.values())
    assert "apply_chat_template" not in card(use="no tokenizer") + card(use="native")
