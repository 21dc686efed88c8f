"""What an export needs besides its weights, so that the next tool can ask it: ends of answers, `<image>`, chat template,
processor. All of it is data: no code of a tokenizer's folder is run, and nothing asks for leave to run it.
"""

import json
import re
from pathlib import Path

from megatron_moellava.costs.shapes import Model
from megatron_moellava.data.encode import answer_ends
from megatron_moellava.data.sample import IMAGE_PLACEHOLDER
from megatron_moellava.data.templates import Template, get_template
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.data.tokenizer_files import read_object
from megatron_moellava.towers import Tower
from megatron_moellava.towers.from_config import processor_config_of

SPECIAL = ("eos_token_id", "bos_token_id", "pad_token_id")


def template_of(model: Model, trained: dict[str, dict]) -> Template:
    """The conversation version that the weights were trained with; the backbone's own where that is not known."""
    return get_template(trained.get("data", {}).get("template") or model.backbone.template)


def special_ids(template: Template, tokenizer: Path | None, source: dict) -> dict:
    """`eos_token_id` and the like: where answers end by template and tokenizer, and what the source says.

    `source`: the imported config.json and generation_config.json, merged.
    """
    text = source.get("text_config") or {}
    found = {name: source.get(name, text.get(name)) for name in SPECIAL}
    if tokenizer:
        loaded = load_tokenizer(tokenizer)
        said = found["eos_token_id"]
        ends = [loaded.eos_id, *sorted(answer_ends(template, loaded)[0])]
        ends += said if isinstance(said, list) else [] if said is None else [said]
        ends = list(dict.fromkeys(ends))
        found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        found["bos_token_id"] = loaded.bos_id if found["bos_token_id"] is None else found["bos_token_id"]
    return {name: value for name, value in found.items() if value is not None}


def free_id(folder: Path) -> int:
    """The id of `<image>`: the tokenizer's own, or the first that it lacks."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (
        Exception
    ):  # a tokenizer that only its own code reads in transformers (Qwen v1, StableLM-2): ours does without
        loaded = load_tokenizer(folder)
        known = loaded.token_id(IMAGE_PLACEHOLDER)
        return loaded.vocab_size if known is None else known
    known = tokenizer.get_vocab().get(IMAGE_PLACEHOLDER)
    return len(tokenizer) if known is None else known


def with_image_token(folder: Path, index: int) -> dict[str, dict]:
    """The tokenizer's JSON files with `<image>` as id `index`, by name; those that need no change are left out."""
    token = {"content": IMAGE_PLACEHOLDER, "special": True}
    token |= dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    whole = read_object(folder / "tokenizer.json")
    config, listed = (read_object(folder / name) for name in ("tokenizer_config.json", "added_tokens.json"))
    decoder = config.get("added_tokens_decoder")
    changed: dict[str, dict] = {}
    if whole and all(item["content"] != IMAGE_PLACEHOLDER for item in whole.get("added_tokens") or ()):
        changed["tokenizer.json"] = whole | {
            "added_tokens": [*(whole.get("added_tokens") or ()), {"id": index} | token]
        }
    if decoder is not None:
        config = config | {"added_tokens_decoder": decoder | {str(index): token}}
    elif not whole:
        changed["added_tokens.json"] = listed | {IMAGE_PLACEHOLDER: index}
    changed["tokenizer_config.json"] = config | {"processor_class": "LlavaProcessor"}
    return changed


def processor_files(tower: Tower, image_aspect_ratio: str) -> dict[str, dict]:
    """`preprocessor_config.json` and `processor_config.json` of transformers' LlavaProcessor.

    `image_aspect_ratio`: data.image_aspect_ratio of the training; "pad" is that processor's `do_pad`.
    """
    pictures = {"do_center_crop": False} | processor_config_of(tower) | {"processor_class": "LlavaProcessor"}
    if tower.newline:
        name = {"next": "LlavaNext", "onevision": "LlavaOnevision"}[tower.tiling]
        pictures |= {"image_processor_type": f"{name}ImageProcessor", "processor_class": f"{name}Processor"}
        pictures["image_grid_pinpoints"] = tower.tiles.pinpoints(tower.image_size)
    elif image_aspect_ratio == "pad":
        pictures |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    processor = {
        "processor_class": pictures["processor_class"],
        "image_token": IMAGE_PLACEHOLDER,
        "patch_size": tower.patch_size,
        "num_additional_image_tokens": int(tower.class_token),
        "vision_feature_select_strategy": "default" if tower.drop_first_feature else "full",
    }
    return {"preprocessor_config.json": pictures, "processor_config.json": processor}


def chat_template(template: Template) -> str:
    """The template in Jinja, as transformers' `apply_chat_template` reads it; empty for what it cannot express.

    The tokenizer puts BOS before it. A picture of a message is `<image>` and a line break, as LLaVA's data have it.
    """
    if template.style not in WRITERS or template.image_tags != ("", ""):
        return ""
    return CONTENT + WRITERS[template.style](template)


CONTENT = (
    "{%- macro content(message) -%}{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- else -%}"
    "{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{%- if messages[0]['role'] == 'system' -%}{%- set given = content(messages[0]) -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set given = none -%}{%- set turns = messages -%}{%- endif -%}"
)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("'", "\\u0027")


def _system(before: str, prompt: str, after: str) -> str:
    text = f"{_quoted(before)} ~ (given if given is not none else {_quoted(prompt)}) ~ {_quoted(after)}"
    if prompt or before:
        return f"{{{{ {text} }}}}"
    return f"{{%- if given is not none -%}}{{{{ given ~ {_quoted(after)} }}}}{{%- endif -%}}"


def _turns(user: str, assistant: str) -> str:
    return (
        "{%- for message in turns -%}{%- if message['role'] == 'user' -%}{{ " + user + " }}"
        "{%- else -%}{{ " + assistant + " }}{%- endif -%}{%- endfor -%}"
    )


def _two(template: Template) -> str:
    user, assistant = template.roles
    return (
        _system("", template.system, template.sep)
        + _turns(
            f"{_quoted(user + ': ')} ~ content(message) ~ {_quoted(template.sep)}",
            f"{_quoted(assistant + ': ')} ~ content(message) ~ {_quoted(template.sep2)}",
        )
        + f"{{%- if add_generation_prompt -%}}{{{{ {_quoted(assistant + ':')} }}}}{{%- endif -%}}"
    )


def _mpt(template: Template) -> str:
    head = re.match(r".*?\n+", template.system)
    before = head.group() if head else ""
    user, assistant = template.roles
    return (
        _system(before, template.system.removeprefix(before), template.sep)
        + _turns(*(f"{_quoted(role)} ~ content(message) ~ {_quoted(template.sep)}" for role in (user, assistant)))
        + f"{{%- if add_generation_prompt -%}}{{{{ {_quoted(assistant)} }}}}{{%- endif -%}}"
    )


def _llama_2(template: Template) -> str:
    system = f'"[INST] <<SYS>>\\n" ~ (given if given is not none else {_quoted(template.system)}) ~ "\\n<</SYS>>\\n\\n"'
    start = f"(({system}) if loop.first else {_quoted(template.sep + '[INST] ')})"
    return _turns(
        f'{start} ~ content(message) ~ " [/INST]"', f'" " ~ content(message) ~ {_quoted(" " + template.sep2)}'
    )


WRITERS = {"two": _two, "mpt": _mpt, "llama_2": _llama_2}
