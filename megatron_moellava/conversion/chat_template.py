"""A conversation version (`data.templates`) as a chat template in Jinja, as transformers and llama.cpp read it.

It writes the beginning-of-text token itself, since some of these tools tokenise a rendered chat without special tokens.
A picture of a message is `<image>` and a line break, as LLaVA's data have it.
"""

import json
import re

from megatron_moellava.conversion.served_tokenizer import ServedTokenizer
from megatron_moellava.data.sample import IMAGE_PLACEHOLDER
from megatron_moellava.data.templates import Template

MARK = ("<__media_", "__>")  # how the marks of llama.cpp's server begin and end


def chat_template(template: Template, served: ServedTokenizer, *, llama_cpp: bool = False) -> str:
    """The template in Jinja, for the tokenizer of an export.

    `llama_cpp`: a message has the marks of its server in the place of pictures, and no line breaks behind them.
    """
    start = served.bos if template.style == "plain" else served.written(_first(template)).removesuffix(_first(template))
    begin = f"{{{{ {_quoted(start)} }}}}" if start else ""
    return _content(template, served.gap, llama_cpp) + begin + WRITERS[template.style](template, served.gap)


def _first(template: Template) -> str:
    """What a conversation begins with."""
    return template.system or ("[INST]" if template.style == "llama_2" else template.roles[0])


def _quoted(text: str) -> str:
    """A string of Jinja; of JSON's escapes llama.cpp knows the short ones alone."""
    return json.dumps(text, ensure_ascii=False)


def _content(template: Template, gap: str, llama_cpp: bool) -> str:
    """Macros for the text of a message, and the message of the system apart from the others."""
    image = _quoted(IMAGE_PLACEHOLDER)
    text, tagged = "text", IMAGE_PLACEHOLDER.join(template.image_tags)
    if tagged != IMAGE_PLACEHOLDER:  # of a turn that begins with one, as the original does it
        text = f"({text}.replace({image}, {_quoted(tagged)}) if {text}.startswith({image}) else {text})"
    if llama_cpp:
        before, after = MARK
        broken = f"text.replace({_quoted(after)}, {_quoted(after + gap + chr(10))})"
        text = f"({broken} if {_quoted(before)} in text else {text})"
    elif gap:
        text = f"{text}.replace({image}, {_quoted(IMAGE_PLACEHOLDER + gap)})"
    return (
        "{%- macro written(message) -%}{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
        "{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- else -%}"
        f"{{{{ {_quoted(IMAGE_PLACEHOLDER + chr(10))} }}}}{{%- endif -%}}{{%- endfor -%}}{{%- endif -%}}{{%- endmacro -%}}"
        f"{{%- macro content(message) -%}}{{%- set text = written(message) -%}}{{{{ {text} }}}}{{%- endmacro -%}}"
        "{%- if messages[0]['role'] == 'system' -%}{%- set given = content(messages[0]) -%}{%- set turns = messages[1:] -%}"
        "{%- else -%}{%- set given = none -%}{%- set turns = messages -%}{%- endif -%}"
    )


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


def _asks(text: str) -> str:
    return f"{{%- if add_generation_prompt -%}}{{{{ {_quoted(text)} }}}}{{%- endif -%}}"


def _two(template: Template, gap: str) -> str:
    user, assistant = template.roles
    return (
        _system("", template.system, template.sep)
        + _turns(
            f"{_quoted(user + ': ')} ~ content(message) ~ {_quoted(template.sep)}",
            f"{_quoted(assistant + ': ')} ~ content(message) ~ {_quoted(template.sep2)}",
        )
        + _asks(f"{assistant}:")
    )


def _mpt(template: Template, gap: str) -> str:
    head = re.match(r".*?\n+", template.system)
    before = head.group() if head else ""
    user, assistant = template.roles
    return (
        _system(before, template.system.removeprefix(before), template.sep)
        + _turns(*(f"{_quoted(role)} ~ content(message) ~ {_quoted(template.sep)}" for role in (user, assistant)))
        + _asks(assistant)
    )


def _llama_2(template: Template, gap: str) -> str:
    system = f'"[INST] <<SYS>>\\n" ~ (given if given is not none else {_quoted(template.system)}) ~ "\\n<</SYS>>\\n\\n"'
    start = f"(({system}) if loop.first else {_quoted(template.sep + '[INST] ')})"
    return _turns(
        f'{start} ~ content(message) ~ " [/INST]"', f'" " ~ content(message) ~ {_quoted(" " + template.sep2)}'
    )


def _single(template: Template, gap: str) -> str:
    """As in the original, a conversation that asks for an answer is laid out otherwise than one that was trained."""
    user, assistant = template.roles
    examples = [f"{template.roles[turn.role == 'assistant']}: {turn.text}{template.sep}" for turn in template.examples]
    asked = _system("", template.system, template.sep + "".join(examples)) + _turns(
        *(f"{_quoted(role + ': ')} ~ content(message) ~ {_quoted(template.sep)}" for role in (user, assistant))
    )
    asked += f"{{{{ {_quoted(assistant + ':')} }}}}"
    said = _system("", template.system, "\n\n") + _turns(
        *(
            f"{_quoted(f'{template.sep} {role}: ')} ~ content(message) ~ {_quoted(chr(10))}"
            for role in (user, assistant)
        )
    )
    said += f"{{{{ {_quoted(template.sep + ' ')} }}}}"
    return f"{{%- if messages[-1]['role'] == 'user' -%}}{asked}{{%- else -%}}{said}{{%- endif -%}}"


def _plain(template: Template, gap: str) -> str:
    """Captioning: all images, then the answers; the human text is dropped."""
    image = _quoted(IMAGE_PLACEHOLDER)
    images = (
        "{%- for message in turns if message['role'] == 'user' -%}"
        f"{{{{ {image} * (written(message).split({image})|length - 1) }}}}{{%- endfor -%}}"
    )
    answers = f"{{{{ loop.first and {_quoted(gap)} or '' }}}}{{{{ content(message) ~ {_quoted(template.sep)} }}}}"
    return images + f"{{%- for message in turns if message['role'] == 'assistant' -%}}{answers}{{%- endfor -%}}"


WRITERS = {"two": _two, "mpt": _mpt, "llama_2": _llama_2, "single": _single, "plain": _plain}
