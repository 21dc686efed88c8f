"""The chat template that other tools render is the conversation version of the training, character by character."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_moellava.conversion.chat_template import chat_template
from megatron_moellava.conversion.served_tokenizer import ServedTokenizer
from megatron_moellava.data.sample import Turn
from megatron_moellava.data.templates import TEMPLATES, get_template, prompt

QUESTION, ANSWER = "<image>\nWhat's that?", 'A "cat".'
IDS = {"files": {}, "image_token": 0}
SERVED = {
    "Llama": ServedTokenizer(bos="<s>", **IDS),
    "Llama, legacy: false": ServedTokenizer(bos="<s>", gap=" ", specials=("<s>", "</s>"), **IDS),
    "Llama, legacy: false, with ChatML's": ServedTokenizer(bos="<s>", gap=" ", specials=("<|im_start|>",), **IDS),
    "Qwen": ServedTokenizer(bos="", **IDS),
}


def rendered(written: str, turns, **more) -> str:
    """As transformers renders it, in its sandbox; a picture that begins a turn as a part of the message."""
    messages = [
        {
            "role": turn.role,
            "content": [{"type": "image"}, {"type": "text", "text": turn.text.removeprefix("<image>\n")}]
            if turn.text.startswith("<image>\n")
            else turn.text,
        }
        for turn in turns
    ]
    ((text,), _) = render_jinja_template([messages], chat_template=written, **more)
    return text


def turns_of(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn(role=("user", "assistant")[number % 2], text=text) for number, text in enumerate(texts))


CONVERSATIONS = {
    "a question": turns_of(QUESTION),
    "a question without a picture": turns_of("Who?"),
    "a second question": turns_of(QUESTION, ANSWER, "And this: <image> one?"),
    "two pictures": turns_of("<image>\n<image>\nWhich?"),
    "a whole conversation": turns_of(QUESTION, ANSWER, "Why?", "It\nmeows."),
}


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("version", TEMPLATES)
def test_chat_template_is_the_template(version, kind):
    template, served = get_template(version), SERVED[kind]
    written = chat_template(template, served)
    for turns in CONVERSATIONS.values():
        asks = turns[-1].role == "user"
        assert rendered(written, turns, add_generation_prompt=asks) == served.written(prompt(template, turns))


@pytest.mark.parametrize("version", TEMPLATES)
def test_a_system_message_takes_the_place_of_the_templates_own(version):
    turns = (Turn(role="system", text="Be brief."), *turns_of(QUESTION))
    text = rendered(chat_template(get_template(version), SERVED["Qwen"]), turns, add_generation_prompt=True)
    assert ("Be brief." in text) == (get_template(version).style != "plain")


def test_marks_of_llama_cpps_server_stand_where_pictures_stand():
    """It puts a mark before the question, with no line break, into a message that is one text."""
    template = get_template("v1")
    marked = (Turn(role="user", text="<__media_a1__>Who?"),)
    for name, gap in (("Llama", ""), ("Llama, legacy: false", " ")):
        written = chat_template(template, SERVED[name], llama_cpp=True)
        assert f"USER: <__media_a1__>{gap}\nWho? ASSISTANT:" in rendered(written, marked, add_generation_prompt=True)
        assert rendered(written, turns_of("Who?"), add_generation_prompt=True) == SERVED[name].written(
            prompt(template, turns_of("Who?"))
        )


@pytest.mark.parametrize("version", TEMPLATES)
def test_strings_have_no_escapes_that_llama_cpp_does_not_know(version):
    assert "\\u" not in chat_template(get_template(version), SERVED["Llama"], llama_cpp=True)
