"""An export is a complete model: transformers alone, with nothing but its folder, sees the pixels and tokens of the training
and gives this program's logits and answer, for every family, dense and with experts.
"""

import json
import runpy

import pytest
import torch
import transformers
from PIL import Image

from megatron_moellava.checkpoint.sums import SUMS_FILE, verify_sums
from tests.helpers.served_models import (
    CASES,
    NEW_TOKENS,
    PICTURE,
    QUESTION,
    checkpoint_of,
    expected,
    export_of,
    with_image_token,
)

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# Experts are summed in another order. Of logits whose spread is above 1.
LOGITS = 5e-5
PIXELS = 1e-6  # (level / 255 - mean) / std in another order of products
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]


@pytest.mark.parametrize("name", CASES)
def test_transformers_gives_our_answer_from_the_folder_alone(tmp_path, name):
    checkpoint_of(CASES[name], tmp_path)
    folder = export_of(CASES[name], tmp_path)
    ours = expected(tmp_path)
    assert (folder / SUMS_FILE).exists()
    verify_sums(folder, say=pytest.fail)

    config = json.loads((folder / "config.json").read_text())
    own = "auto_map" in config
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=own)
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    inputs = processor(images=Image.open(PICTURE), text=text, return_tensors="pt")
    prompt = with_image_token(ours.prompt, config["image_token_id"])
    assert inputs["input_ids"][0].tolist() == prompt
    assert (inputs["pixel_values"] - ours.pixels_NCHW).abs().max() <= PIXELS
    messages = [{"role": "user", "content": [{"type": "image", "path": str(PICTURE)}, MESSAGES[0]["content"][1]]}]
    at_once = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert at_once["input_ids"][0].tolist() == prompt

    model, loading = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=own, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["mismatched_keys"] and not loading["unexpected_keys"]
    with torch.no_grad():
        row = torch.tensor([prompt + ours.tokens])
        logits_SV = model(input_ids=row, pixel_values=inputs["pixel_values"]).logits[0]
    rows = ours.logits_SV.shape[1]
    assert (logits_SV[:, :rows] - ours.logits_SV).abs().max() <= LOGITS * ours.logits_SV.std().clamp(min=1)
    unsaid = list(range(ours.known, config["text_config"]["vocab_size"]))  # random weights would say them
    answer = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, suppress_tokens=unsaid or None)
    assert answer[0, len(prompt) :].tolist() == ours.tokens


def test_the_modelling_file_has_the_model_without_its_output_layer(tmp_path):
    """`AutoModel`, upon which other tools build: hidden states, which the output layer makes the same logits of."""
    case = CASES["Llama, residual experts"]
    checkpoint_of(case, tmp_path)
    folder, row = export_of(case, tmp_path), torch.arange(3, 12)[None]
    kinds = (transformers.AutoModel, transformers.AutoModelForImageTextToText)
    base, whole = (kind.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32) for kind in kinds)
    assert not hasattr(base, "lm_head")
    with torch.no_grad():
        logits = whole.lm_head(base(input_ids=row).last_hidden_state)
        assert torch.equal(logits, whole(input_ids=row).logits)


@pytest.mark.parametrize("name", ["Llama", "Llama, residual experts"])
def test_the_code_of_the_model_card_runs(tmp_path, capsys, name):
    checkpoint_of(CASES[name], tmp_path)
    folder = export_of(CASES[name], tmp_path)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "card.py").write_text(code.replace("FOLDER", str(folder)).replace("a.jpg", str(PICTURE)))
    runpy.run_path(str(tmp_path / "card.py"))
    assert "What is it? ASSISTANT:" in capsys.readouterr().out
