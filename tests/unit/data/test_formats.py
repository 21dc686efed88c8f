"""A row is understood or refused, never half: the same sample in every format that people have."""

import json

import pytest

from megatron_moellava.data.encode import encode
from megatron_moellava.data.encoder import Encoder, with_system
from megatron_moellava.data.sample import BadSample, parse_record
from megatron_moellava.data.templates import TEMPLATES, get_template, prompt
from megatron_moellava.data.tokenizer import load_tokenizer
from tests.helpers.data_files import ASSETS, config, conversation, make_loader, write_images, write_rows

ASK, ANSWER = "<image>\n<image>\nWhich?", "The first."


def turns(first: str, second: str, speaker: str, text: str) -> list[dict]:
    return [{speaker: first, text: ASK}, {speaker: second, text: ANSWER}]


NAMES = {
    "image": {"image": ["b.png", "a.png"]},
    "images": {"images": ["b.png", "a.png"]},
    "paths": {"images": [{"path": "b.png"}, {"path": "a.png"}]},
    "urls": {"images": [{"url": "b.png"}, {"url": "a.png"}]},
    "empty fields beside": {"image": ["b.png", "a.png"], "images": None, "video": "", "system": None, "tools": []},
    "fields about the row": {"image": ["b.png", "a.png"], "model": "x", "width": 3, "source": "coco"},
}
TURNS = {
    "LLaVA": {"conversations": turns("human", "gpt", "from", "value")},
    "ShareGPT with other names": {"conversations": turns("user", "assistant", "from", "value")},
    "messages": {"messages": turns("user", "assistant", "role", "content")},
    "conversations of messages": {"conversations": turns("user", "assistant", "role", "content")},
    "messages of turns": {"messages": turns("human", "gpt", "from", "value")},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        ]
    },
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("form", TURNS)
def test_every_format_gives_the_same_sample(names, form):
    sample = parse_record(NAMES[names] | TURNS[form], origin="row")
    assert [(turn.role, turn.text) for turn in sample.turns] == [("user", ASK), ("assistant", ANSWER)]
    assert [ref.name for ref in sample.images] == ["b.png", "a.png"] and not sample.notes


def test_pictures_named_inside_of_turns_keep_their_order():
    parts = [
        {"type": "image", "image": "b.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "text", "text": "Which?"},
    ]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": ANSWER}]}
    sample = parse_record(record, origin="row")
    assert [ref.name for ref in sample.images] == ["b.png", "a.png"] and sample.turns[0].text == ASK


TEXT = {"conversations": conversation("a", "b")}
SYSTEM = {
    "field": TEXT | {"system": "Be brief."},
    "first turn": {"conversations": [{"from": "system", "value": "Be brief."}, *TEXT["conversations"]]},
    "first message": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
    },
}


@pytest.mark.parametrize("form", SYSTEM)
@pytest.mark.parametrize("version", [name for name, template in TEMPLATES.items() if template.style != "plain"])
def test_a_system_prompt_stands_in_for_the_templates_own(form, version):
    sample = parse_record(SYSTEM[form], origin="row")
    template = get_template(version)
    own = prompt(template, sample.turns)
    text = prompt(with_system(template, sample), sample.turns)
    before = template.system.rpartition("\n")[2] if template.style == "mpt" else template.system
    assert text.count("Be brief.") == 1
    assert text == (own.replace(before, "Be brief.", 1) if before else f"Be brief.{template.sep}{own}")


def test_a_system_prompt_reaches_the_tokens_and_is_not_trained():
    tokenizer = load_tokenizer(ASSETS / "tok_bpe")
    encoder = Encoder(template=get_template("phi"), tokenizer=tokenizer, num_features=16, max_length=400)
    found = encoder(parse_record(SYSTEM["field"], origin="row"))
    assert tokenizer.decode(found.tokens_S.tolist()).startswith("Be brief. USER: a")
    plain = encoder(parse_record(TEXT, origin="row"))
    assert (found.labels_S != -100).sum() == (plain.labels_S != -100).sum()


@pytest.mark.parametrize(
    "version, system, message", [("plain", "x", "has no system prompt"), ("phi", "a </s>", "'</s>'")]
)
def test_a_system_prompt_without_a_place_is_refused(version, system, message):
    with pytest.raises(BadSample, match=message):
        with_system(get_template(version), parse_record(TEXT | {"system": system}, origin="row"))


PICTURE = {"conversations": conversation("Describe the image.", "A ball.")}
REFUSED = {
    "images without placeholder": (
        PICTURE | {"images": ["a.png"]},
        "0 `<image>` in the conversation but 1 in `images`",
    ),
    "image without placeholder": (PICTURE | {"image": "a.png"}, "0 `<image>` in the conversation but 1 in `image`"),
    "video without placeholder": (PICTURE | {"video": "a.gif"}, "0 `<video>` and 0 `<image>`"),
    "an empty image": ({"image": "", "conversations": conversation("<image>", "b")}, "1 `<image>`.* or remove `image`"),
    "too few pictures": (
        {"images": ["a.png"], "conversations": conversation("<image><image>", "b")},
        "2 `<image>` in the conversation but 1 in `images`",
    ),
    "image and images": (PICTURE | {"image": "a", "images": ["b"]}, "pictures in both `image` and `images`"),
    "conversations and messages": (TEXT | {"messages": []}, None),
    "both turn fields": (
        TEXT | {"messages": [{"role": "user", "content": "a"}]},
        "both `conversations` and `messages`",
    ),
    "two system prompts": (
        {"system": "other", "conversations": SYSTEM["first turn"]["conversations"]},
        "keep one",
    ),
    "a late system turn": (
        {"conversations": [*TEXT["conversations"], {"from": "system", "value": "x"}]},
        "only the first turn may be one",
    ),
    "a system prompt that is no text": (TEXT | {"system": ["x"]}, "`system` must be text"),
    "a weight in a turn": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0.5}]},
        "unknown key 'weight'; every answer is trained alike",
    ),
    "another part": (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}, {"role": "assistant", "content": "b"}]},
        "'audio'; use 'text' or 'image'",
    ),
    "an answer that is no text": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": 3}]},
        "found int",
    ),
    "blanks for an answer": ({"conversations": conversation("a", " \n")}, "no answer to learn from"),
    "wrapped": ({"data": [TEXT]}, "the row's keys are 'data'"),
    "Alpaca": ({"instruction": "a", "output": "b"}, "the row's keys are 'instruction', 'output'"),
    "a tool": ({"conversations": [{"from": "function_call", "value": "a"}]}, "is from 'function_call'"),
}
UNKNOWN = ("image_path", "Image", "img", "image_paths", "pictures", "photo", "image_url", "system_prompt", "tools")
UNKNOWN += ("objects", "rejected", "history", "question", "response", "videos", "audio", "mask")


@pytest.mark.parametrize("case", [name for name, (_, message) in REFUSED.items() if message])
def test_half_a_row_is_refused_with_what_to_do(case):
    record, message = REFUSED[case]
    with pytest.raises(BadSample, match=message):
        parse_record(record, origin="row")


@pytest.mark.parametrize("key", UNKNOWN)
def test_an_unknown_key_is_a_bad_row_unless_the_run_passes_over_it(key):
    with pytest.raises(BadSample, match=f"unknown key '{key}'.*data.ignore_keys=.{key}. passes over it"):
        parse_record(TEXT | {key: ["x"]}, origin="row")
    assert parse_record(TEXT | {key: ["x"]}, origin="row", ignore_keys=(key,)).turns


def test_a_text_only_row_may_speak_of_the_tag(tmp_path):
    tokenizer = load_tokenizer(ASSETS / "tok_bpe")
    record = {"conversations": conversation("What is <image> in RSS?", "A tag: <image>.")}
    sample = parse_record(record, origin="row")
    ids, _ = encode(sample, get_template("phi"), tokenizer)
    assert "What is <image> in RSS?" in tokenizer.decode(ids) and -200 not in ids
    batch = next(make_loader(config(write_rows(tmp_path, [record]), packing=False), micro_batch_size=1))
    assert len(batch.pixel_values_NCHW) == 0 and (batch.tokens_BS >= 0).all()


def test_a_run_reads_all_formats_together(tmp_path):
    write_images(tmp_path)
    rows = [NAMES["images"] | form | {"id": name} for name, form in TURNS.items()]
    path = write_rows(tmp_path, [*rows, *(form | {"id": f"system {name}"} for name, form in SYSTEM.items())])
    loader = make_loader(config(path, packing=False), micro_batch_size=1)
    found = {}
    for _ in range(len(TURNS) + len(SYSTEM)):
        batch = next(loader)
        found[batch.sample_ids[0]] = json.dumps(batch.tokens_BS.tolist())
    assert len({found[name] for name in TURNS}) == 1 and len({found[f"system {name}"] for name in SYSTEM}) == 1
