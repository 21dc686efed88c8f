"""Every template with every family of tokenizers: refused, or generation stops at what training put after an answer."""

import base64
import itertools
import json

import pytest

from megatron_moellava.backbones import BACKBONES
from megatron_moellava.config import ConfigError
from megatron_moellava.data.encode import answer_ends, check_template, encode
from megatron_moellava.data.sample import parse_record
from megatron_moellava.data.stablelm_tokenizer import RANKS
from megatron_moellava.data.templates import TEMPLATES, get_template
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.inference.text import TextStream
from tests.helpers.data_files import conversation
from tests.helpers.paths import ASSETS
from tests.helpers.tokenizer_folders import byte_folder, llama_folder

LLAMA_2 = {"v1", "vicuna_v1", "llava_v1", "v1_mmtag", "mistral", "minicpm", "llama_2", "llava_llama_2", "short"}
ANY = {"plain", "v0_plain", "v0", "default", "llava_v0", "v0_mmtag"}  # their own text holds no control token
ENDOFTEXT, CHATML = {"phi", "qwen", "stablelm"}, {"mpt", "chatml"}
FITTING = {
    "llama-2": LLAMA_2 | ANY,
    "llama-2 json": LLAMA_2 | ANY,
    "openchat": LLAMA_2 | ANY | {"openchat"},
    "phi-2": ENDOFTEXT | ANY,
    "qwen base": ENDOFTEXT | CHATML | ANY,
    "qwen instruct": ENDOFTEXT | CHATML | ANY,
    "stablelm-2": ENDOFTEXT | CHATML | ANY,
    "llama-3": {"llama_3"} | ANY,
}
PAIRS = list(itertools.product(FITTING, TEMPLATES))
TINY = [name for name in BACKBONES if name.endswith("-tiny")]


def change(folder, **config):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def llama_3(place):
    """A byte-level vocabulary with Llama-3's control tokens, and BOS from tokenizer.json's post-processor."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    backend = load_tokenizer(byte_folder(place / "base", "GPT2Tokenizer_plain")).model.backend_tokenizer
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    backend.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in names])
    bos = "<|begin_of_text|>"
    backend.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    (place / "it").mkdir()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": "<|end_of_text|>"}
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|endoftext|>"]
    (place / "it/tokenizer.json").write_text(json.dumps(content))
    (place / "it/tokenizer_config.json").write_text(json.dumps(config))
    return place / "it"


def stablelm_2(place):
    ranks = "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    place.mkdir()
    (place / RANKS).write_text(ranks)
    return place


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizers")
    folders = {
        "llama-2": llama_folder(place / "llama", "legacy_false", "model"),
        "llama-2 json": llama_folder(place / "json", "legacy_true", "json"),
        "openchat": llama_folder(place / "openchat", "openchat_eos", "model"),
        "phi-2": byte_folder(place / "phi", "CodeGenTokenizer_saved"),
        "qwen base": byte_folder(place / "base", "Qwen2Tokenizer_saved"),
        "qwen instruct": change(byte_folder(place / "instruct", "Qwen2Tokenizer_saved"), eos_token="<|im_end|>"),
        "stablelm-2": stablelm_2(place / "stablelm"),
        "llama-3": llama_3(place / "llama_3"),
    }
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("family, version", PAIRS)
def test_a_template_is_refused_or_its_end_stops_generation(family, version, tokenizers):
    tokenizer, template = tokenizers[family], get_template(version)
    if version not in FITTING[family]:
        with pytest.raises(ConfigError, match="which the tokenizer does not have") as caught:
            check_template(template, tokenizer)
        for fitting in FITTING[family]:
            assert fitting in str(caught.value)
        return
    check_template(template, tokenizer)
    record = {"image": "a.png", "conversations": conversation("<image>\nWhat?", "The ball is red.")}
    _, labels = encode(parse_record(record, origin=""), template, tokenizer)
    # What the model says when it says what it was trained to say, and goes on for ever.
    trained = [label for label in labels if label != -100] * 3
    if template.style == "single":  # the first trained tokens belong to the role tags
        trained = tokenizer.encode_text(" The ball is red.\n### Human: and on")[0]
    stop_ids, stop_strings = answer_ends(template, tokenizer)
    stream = TextStream(tokenizer, stop_strings)
    for token in trained:
        if token in stop_ids:
            break
        stream.add(token)
        if stream.stopped:
            break
    else:
        pytest.fail(f"no stop among {trained}: {stop_ids}, {stop_strings}")
    assert (stream.text + stream.finish()).strip() == "The ball is red."
    assert tokenizer.eos_id in stop_ids


@pytest.mark.parametrize("family, version", [pair for pair in PAIRS if pair[1] in FITTING[pair[0]]])
def test_roles_and_ends_are_single_tokens(family, version, tokenizers):
    """A mark that is spelt in ordinary tokens is none."""
    tokenizer, template = tokenizers[family], get_template(version)
    record = {"conversations": conversation("What?", "Red.", "And?", "Blue.")}
    ids, labels = encode(parse_record(record, origin=""), template, tokenizer)
    for token in template.control_tokens:
        assert tokenizer.token_id(token) in ids
    if template.control_tokens:
        assert labels.count(next(iter(answer_ends(template, tokenizer)[0] & set(labels)))) == 2


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_has_a_template_that_exists(name):
    assert get_template(BACKBONES[name].template)


@pytest.mark.parametrize(
    "name, template",
    {
        "llama-3-8b": "llama_3",
        "llama-3.2-1b": "llama_3",
        "qwen2-7b": "chatml",
        "qwen3-tiny": "chatml",
        "qwen1.5-1.8b": "qwen",
        "phi-2": "phi",
        "vicuna-7b-v1.5": "v1",
        "openchat-3.5-1210": "openchat",
    }.items(),
)
def test_the_template_of_a_family(name, template):
    assert BACKBONES[name].template == template


def test_a_line_break_ends_a_caption_even_at_once():
    tokenizer = load_tokenizer(ASSETS / "tok_spm")
    _, stop = answer_ends(get_template("plain"), tokenizer)
    stream = TextStream(tokenizer, stop)
    for token in tokenizer.encode_text("\nA ball")[0]:
        stream.add(token)
    assert (stop, stream.text, stream.stopped) == (("\n",), "", True)
