"""MoE-LLaVA's label masking, failures included (specification 4.4; LLaVA's `preprocess_*`).

Each rule tokenises the prompt's rounds again and counts. Off-by-ones are the original's: a round's BOS stands in for
the separator that was split off, and the blank after "ASSISTANT:" merges into the first token of the answer.
"""

from megatron_moellava.data.encode import IGNORE_INDEX, IMAGE_TOKEN
from megatron_moellava.data.sample import IMAGE_PLACEHOLDER, Sample, Turn
from megatron_moellava.data.templates import Template, prompt, turns_of
from megatron_moellava.data.tokenizer import Tokenizer


def tokenise(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids as the original's tokenizer gives them: BOS first, special tokens parsed."""
    return tokenizer.bos_ids + tokenizer.encode_parsed(text)


def tokenise_with_images(text: str, tokenizer: Tokenizer) -> list[int]:
    """Chunks around `<image>` are tokenised alone and joined by one IMAGE_TOKEN; only the first BOS stays."""
    ids = list(tokenizer.bos_ids)
    for index, chunk in enumerate(text.split(IMAGE_PLACEHOLDER)):
        ids += [IMAGE_TOKEN] if index else []
        ids += tokenizer.encode_parsed(chunk) if chunk else []
    return ids


def one_image(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Version "plain" keeps a single image whatever the human turn says."""
    return (Turn(role="user", text=IMAGE_PLACEHOLDER), *turns[1:2])


def _count_rounds(ids, rounds, tokenizer, tokenise, max_length, *, split, start, extra, back):
    """Mask the instruction of each round; `extra` and `back` are the off-by-ones of round and instruction."""
    labels = [IGNORE_INDEX] * start + ids[start:]
    current = start
    for text in rounds:
        parts = text.split(split)
        if text == "" or len(parts) != 2:
            break
        instruction = len(tokenise(parts[0] + split, tokenizer)) - back
        stop = min(current + instruction, len(labels))
        labels[current:stop] = [IGNORE_INDEX] * max(stop - current, 0)
        current += len(tokenise(text, tokenizer)) + extra
    labels[current:] = [IGNORE_INDEX] * len(labels[current:])
    total = sum(token != tokenizer.pad_id for token in ids)
    mismatch = current < max_length and current != total
    return [IGNORE_INDEX] * len(ids) if mismatch else labels, mismatch


def _two(start: int, extra: int, back: int):
    def rule(ids, turns, template, tokenizer, tokenise, max_length):
        rounds = prompt(template, turns).split(template.sep2)
        split = f"{template.sep}{template.roles[1]}: " if template.style == "two" else "[/INST] "
        return _count_rounds(
            ids, rounds, tokenizer, tokenise, max_length, split=split, start=start, extra=extra, back=back
        )

    return rule


def _mpt(ids, turns, template, tokenizer, tokenise, max_length):
    parts = prompt(template, turns).split(template.sep)
    rounds = [template.sep.join(parts[:3])]
    rounds += [template.sep.join(parts[i : i + 2]) for i in range(3, len(parts), 2)]
    extra = len(tokenise_with_images(template.sep, tokenizer))
    return _count_rounds(
        ids,
        rounds,
        tokenizer,
        tokenise_with_images,
        max_length,
        split=template.sep + template.roles[1],
        start=0,
        extra=extra,
        back=0,
    )


def _plain(ids, turns, template, tokenizer, tokenise, max_length):
    masked = len(tokenise_with_images(turns[0].text, tokenizer))
    return [IGNORE_INDEX] * masked + ids[masked:], False


def _v0(ids, turns, template, tokenizer, tokenise, max_length):
    """Human sentences are masked but for their first two tokens; every piece is counted with its BOS."""
    labels = list(ids)
    current = len(tokenise(f"{template.system}\n\n", tokenizer))
    labels[:current] = [IGNORE_INDEX] * current
    for turn in turns:
        role = template.roles[turn.role == "assistant"]
        length = len(tokenise(f"{template.sep} {role}: {turn.text}\n", tokenizer))
        if turn.role == "user":
            masked = range(current + 2, min(current + length, len(labels)))
            labels[current + 2 : current + length] = [IGNORE_INDEX] * len(masked)
        current += length
    return labels[: len(ids)], False


LABELS = {
    "bos": _two(start=1, extra=0, back=2),
    "no_bos": _two(start=0, extra=1, back=1),
    "llama_2": _two(start=1, extra=0, back=2),
    "mpt": _mpt,
    "plain": _plain,
    "v0": _v0,
}


def original_ids(sample: Sample, template: Template, tokenizer: Tokenizer) -> list[int]:
    """The whole prompt's ids, an image being one."""
    turns = turns_of(template, sample) if template.style != "plain" else one_image(sample.turns)
    return (tokenise_with_images if sample.images else tokenise)(prompt(template, turns), tokenizer)


def is_cut_early(sample: Sample, template: Template) -> bool:
    """Whether the original cuts this row before it masks; the others are cut by its collator."""
    return not sample.images and template.style not in ("plain", "mpt")


def original_length(sample: Sample, template: Template, tokenizer: Tokenizer, found: int) -> int:
    """Ids of a row before any cut, of which `encode_original` gave `found`."""
    return len(original_ids(sample, template, tokenizer)) if is_cut_early(sample, template) else found


def encode_original(
    sample: Sample, template: Template, tokenizer: Tokenizer, max_length: int = 2048
) -> tuple[list[int], list[int], bool]:
    """(ids, labels, mismatch) by the original's algorithm, failures included. Text-only rows are cut at max_length."""
    turns = turns_of(template, sample) if template.style != "plain" else one_image(sample.turns)
    split = tokenise_with_images if sample.images else tokenise
    ids = original_ids(sample, template, tokenizer)
    if is_cut_early(sample, template):
        ids = ids[:max_length]
    labels, mismatch = LABELS[template.labels](ids, turns, template, tokenizer, split, max_length)
    return ids, labels, mismatch
