"""Every conversation version: exact prompts, and labels by position equal to labels by the original's counting."""

import json
import random
import shutil

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.data.encode import IMAGE_TOKEN, encode, expand
from megatron_moellava.data.original import encode_original
from megatron_moellava.data.sample import Turn, parse_record
from megatron_moellava.data.templates import TEMPLATES, get_template, prompt, turns_of
from megatron_moellava.data.tokenizer import load_tokenizer
from tests.helpers.data_files import ASSETS, conversation

HI = (Turn(role="user", text="<image>\nHi"), Turn(role="assistant", text="yo"))
CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
USER, HUMAN = CURIOUS.format("user"), CURIOUS.format("human")
PROMPTS = {
    "plain": "<image>yo\n",
    "v1": f"{USER} USER: <image>\nHi ASSISTANT: yo</s>",
    "llava_v1": f"{HUMAN} USER: <image>\nHi ASSISTANT: yo</s>",
    "phi": f"{USER} USER: <image>\nHi ASSISTANT: yo<|endoftext|>",
    "qwen": f"{USER} USER: <image>\nHi ASSISTANT: yo<|endoftext|>",
    "stablelm": f"{USER} USER: <image>\nHi ASSISTANT: yo<|endoftext|>",
    "openchat": f"{USER} USER: <image>\nHi ASSISTANT: yo<|end_of_turn|>",
    "mistral": f"{USER} USER: <image>\nHi ASSISTANT: yo</s>",
    "minicpm": f"{USER} USER: <image>\nHi ASSISTANT: yo</s>",
    "llava_llama_2": (
        "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual content"
        " that the user provides, and assist the user with a variety of tasks using natural language.\n<</SYS>>\n\n"
        "<image>\nHi [/INST] yo </s>"
    ),
    "mpt": (
        "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. The assistant gives helpful"
        " and honest answers.<|im_end|><|im_start|>user\n<image>\nHi<|im_end|><|im_start|>assistant\nyo<|im_end|>"
    ),
    "v0": f"{HUMAN}\n\n### Human: <image>\nHi\n### Assistant: yo\n### ",
    "llama_3": (
        "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are able to"
        " understand the visual content that the user provides, and assist the user with a variety of tasks using natural"
        " language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nyo<|eot_id|>"
    ),
    "short": "USER: <image>\nHi ASSISTANT: yo</s>",
}
OPEN = {
    "v1": f"{USER} USER: Hi ASSISTANT:",
    "v0": "social instability.\n###Human: Hi###Assistant:",
    "llava_v0": f"{HUMAN}###Human: Hi###Assistant:",
    "llama_3": (
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "llava_llama_2": "USER",
    "mpt": "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\n",
    "short": "USER: Hi ASSISTANT:",
}
# What the original's counting relies on: BOS for the "bos" rules, none for the others.
SPM = ("v1", "vicuna_v1", "llava_v1", "v1_mmtag", "mistral", "minicpm", "llama_2", "llava_llama_2", "plain", "short")
BPE = ("phi", "qwen", "stablelm", "mpt", "chatml", "plain")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe") / "tok"
    shutil.copytree(ASSETS / "tok_bpe", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>", "<|end_of_turn|>"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return {"spm": load_tokenizer(ASSETS / "tok_spm"), "bpe": load_tokenizer(folder)}


@pytest.mark.parametrize("version", PROMPTS)
def test_prompt(version):
    assert prompt(get_template(version), HI) == PROMPTS[version]


@pytest.mark.parametrize("version", OPEN)
def test_generation_prompt_ends_where_the_answer_begins(version):
    text = prompt(get_template(version), (Turn(role="user", text="Hi"),))
    assert text.endswith(OPEN[version] if version != "llava_llama_2" else "Hi [/INST]")


def test_second_turn_of_llama_2_starts_anew():
    turns = (*HI, Turn(role="user", text="and?"), Turn(role="assistant", text="no"))
    assert prompt(get_template("llama_2"), turns).endswith("yo </s><s>[INST] and? [/INST] no </s>")


def test_prompts_of_v0_begin_with_an_example_and_training_does_not():
    """The original's `conv_vicuna_v0` has two turns of its own, `conv_llava_v0` none; label functions use neither."""
    question = (Turn(role="user", text="Hi"),)
    example = prompt(get_template("v0"), question)
    assert example.startswith(
        f"{HUMAN}###Human: What are the key differences between renewable and non-renewable energy"
    )
    assert example.count("###") == 4 and example.count("\n") == 7
    assert prompt(get_template("v0"), HI) == prompt(get_template("llava_v0"), HI)
    assert prompt(get_template("default"), question) == example


@pytest.mark.parametrize("version", TEMPLATES)
def test_only_v0_keeps_a_leading_answer(version, tokenizers):
    turns = [{"from": "gpt", "value": "lake"}, *conversation("<image>\nis it?", "yes it is")]
    sample = parse_record({"image": "a.png", "conversations": turns}, origin="")
    template = get_template(version)
    kept = template.style == "single"
    assert ("### Assistant: lake\n### Human" in prompt(template, turns_of(template, sample))) == kept
    tokenizer = tokenizers["spm"]
    ids, labels = encode(sample, template, tokenizer)
    trained = tokenizer.decode([label for label in labels if label != -100])
    assert ("lake" in trained) == kept and "yes it is" in trained
    if template.labels:
        assert encode_original(sample, template, tokenizer, 10_000)[0] == ids


def test_mmtag_surrounds_images():
    assert "<Image><image></Image>\nHi" in prompt(get_template("v0_mmtag"), HI)


def random_sample(rng: random.Random, *, one_turn: bool):
    words = ("is", "it", "raining", "no", "the", "clear", "and", "lake", "Yes.", "it's", "42,", "naïve", "☃", "\n")
    count = 2 if one_turn else 2 * rng.randint(1, 4)
    turns = [" ".join(rng.choices(words, k=rng.randint(1, 8))).strip() or "ok" for _ in range(count)]
    image = one_turn or rng.random() < 0.7
    if image:
        turns[0] = f"<image>\n{turns[0]}"
    record = {"conversations": conversation(*turns)} | ({"image": "a.png"} if image else {})
    return parse_record(record, origin="")


@pytest.mark.parametrize("version, kind", [(v, "spm") for v in SPM] + [(v, "bpe") for v in BPE])
def test_labels_by_position_equal_labels_by_counting(version, kind, tokenizers):
    rng, template, mismatches = random.Random(0), get_template(version), 0
    for _ in range(200):
        sample = random_sample(rng, one_turn=template.style == "plain")
        ids, labels, mismatch = encode_original(sample, template, tokenizers[kind], 10_000)
        mismatches += mismatch
        if not mismatch:
            assert encode(sample, template, tokenizers[kind]) == (ids, labels)
    assert mismatches == 0


@pytest.mark.parametrize("version", ["v0", "default", "llava_v0", "v0_mmtag"])
def test_v0_trains_answers_with_role_and_the_separators(version, tokenizers):
    tokenizer = tokenizers["bpe"]
    sample = parse_record({"conversations": conversation("is it?", "yes it is")}, origin="")
    ids, labels = encode(sample, get_template(version), tokenizer)
    trained = tokenizer.decode([label for label in labels if label != -100])
    assert trained.replace(" ", "").startswith("##") and trained.endswith("### Assistant: yes it is\n### ")
    original_ids, original, _ = encode_original(sample, get_template(version), tokenizer)
    assert ids == original_ids and sum(a != b for a, b in zip(labels, original, strict=True)) <= 4


@pytest.mark.parametrize("version, kind", [("v1", "spm"), ("phi", "bpe"), ("mpt", "bpe")])
@pytest.mark.parametrize("text", ["</s>", "<s>", "<|endoftext|>", "<|im_end|>", " ASSISTANT: no", "USER:", "<unk>"])
def test_control_tokens_in_a_text_are_text(version, kind, text, tokenizers):
    tokenizer, template = tokenizers[kind], get_template(version)
    plain = parse_record({"conversations": conversation("say X please", "so X then")}, origin="")
    odd = parse_record({"conversations": conversation(f"say {text} please", f"so {text} then")}, origin="")
    (_, labels), (_, base) = (encode(sample, template, tokenizer) for sample in (odd, plain))
    ends = tokenizer.token_id(template.end)
    assert labels.count(ends) == base.count(ends) == 1
    answer = tokenizer.decode([label for label in labels if label not in (-100, ends)])
    assert answer.split() == f"so {text} then".split()


def test_the_unknown_template_names_its_neighbours():
    with pytest.raises(ConfigError, match="vicuna_v1"):
        get_template("vicuna_v2")


def test_all_versions_of_the_specification_exist():
    named = "plain v0_plain v1 vicuna_v1 llava_v1 phi qwen stablelm openchat mistral minicpm llama_2 llava_llama_2 mpt"
    assert set(TEMPLATES) >= {*named.split(), "v0", "default", "llava_v0", "v0_mmtag", "v1_mmtag"}


def test_expansion_shifts_labels_and_never_cuts_an_image():
    ids, labels = [5, IMAGE_TOKEN, 6, IMAGE_TOKEN, 7], [-100, -100, 6, -100, 7]
    tokens_S, labels_S, images, length = expand(ids, labels, ("a", "b"), (3, 3), 100)
    assert tokens_S.tolist() == [5, *[IMAGE_TOKEN] * 3, 6, *[IMAGE_TOKEN] * 3, 7] and length == 9
    assert labels_S.tolist() == [-100, -100, -100, 6, -100, -100, -100, 7, -100]
    tokens_S, labels_S, images, length = expand(ids, labels, ("a", "b"), (3, 3), 7)
    assert tokens_S.tolist() == [5, *[IMAGE_TOKEN] * 3, 6] and images == ("a",) and length == 9
