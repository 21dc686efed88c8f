"""Conversations -> prompt, ids and labels, against the original's, in its own label mode (failures included)."""

from pathlib import Path

from megatron_moellava.config import MoELlavaError
from megatron_moellava.data.original import encode_original, one_image
from megatron_moellava.data.sample import Sample, Turn, parse_record
from megatron_moellava.data.templates import Template, get_template, prompt, turns_of
from megatron_moellava.data.tokenizer import Tokenizer, load_tokenizer
from megatron_moellava.hf_config import read_json
from megatron_moellava.verify.table import Table

WHOLE = 2048  # tokens, the original's model_max_length


def verify_conversations(file: Path, assets: Path, table: Table) -> None:
    """A recording does not name its tokenizer: of those in `assets`, the one that agrees best is it."""
    recorded = read_json(file)
    tokenizers = find_tokenizers(assets)
    records = recorded["samples"] | recorded["plain"]
    for version, expected in recorded["versions"].items():
        samples = {name: value for name, value in expected.items() if not name.startswith("__")}
        found = [differing(version, records, samples, tokenizer) for tokenizer in tokenizers]
        wrong = min(found, key=len, default=list(samples))
        table.add(f"conversations {version}", f"{len(samples)} samples", len(wrong), 0, ", ".join(wrong))
        other = [name for name, value in samples.items() if not same_prompt(version, records[name], name, value)]
        table.add(f"conversations {version}", f"{len(samples)} prompts", len(other), 0, ", ".join(other))
    for version, expected in recorded.get("generation_prompts", {}).items():
        turns = (Turn(role="user", text="<image>\nWhat is shown?"),)
        table.equal("conversations", f"generation prompt {version}", prompt(get_template(version), turns), expected)


def same_prompt(version: str, record: dict, name: str, expected: dict) -> bool:
    """The string that is tokenised; a recording may lack it."""
    template = template_of(version)
    sample = parse(record, name)
    turns = one_image(sample.turns) if template.style == "plain" else turns_of(template, sample)
    return expected.get("prompt") in (None, prompt(template, turns))


def template_of(version: str) -> Template:
    """The template of a recorded case; "@max" and the variants of "plain" are the recording's own."""
    base = version.partition("@max")[0]
    return get_template("plain" if base.startswith("plain") else base)


def find_tokenizers(assets: Path, pattern: str = "tok*") -> list[Tokenizer]:
    """Every tokenizer of the assets that loads; the others are printed with the reason."""
    found = []
    for folder in sorted(item for item in assets.glob(pattern) if item.is_dir()):
        try:
            found.append(load_tokenizer(folder))
        except (MoELlavaError, OSError, ValueError) as error:
            print(f"{folder.name} cannot be loaded: {error}")
    return found


def differing(version: str, records: dict, samples: dict, tokenizer: Tokenizer) -> list[str]:
    """Names of the samples whose ids, labels or warning are not the recorded ones."""
    limit, template = version.partition("@max")[2], template_of(version)
    wrong = []
    for name, expected in samples.items():
        ids, labels, warning = encode_original(parse(records[name], name), template, tokenizer, int(limit or WHOLE))
        theirs = expected["input_ids"], expected["labels"], expected.get("warning", warning)
        if (ids, labels, warning) != theirs:
            wrong.append(name)
    return wrong


def parse(record: dict, name: str) -> Sample:
    """As training reads it, but an empty answer, which training refuses, stays."""
    turns = record["conversations"]
    if turns[-1]["value"]:
        return parse_record(record, origin=name)
    filled = {"conversations": [*turns[:-1], turns[-1] | {"value": "x"}]}
    sample = parse_record(record | filled, origin=name)
    object.__setattr__(sample, "turns", (*sample.turns[:-1], Turn(role="assistant", text="")))
    return sample
