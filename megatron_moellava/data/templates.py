"""Conversation versions as data (specification 4.3; system prompts as in LLaVA's conversation.py).

A template turns the turns of a sample into pieces: text, and whether it is trained and whether it is the template's
own (only the template's own text may hold control tokens). All versions share the code below.
"""

import difflib
import re
from dataclasses import dataclass, replace

from megatron_moellava.config import ConfigError
from megatron_moellava.data.sample import IMAGE_PLACEHOLDER, Sample, Turn

# Control tokens as the templates spell them.
CONTROL = re.compile(r"(</?s>|<\|[a-z_]+\|>)")

_CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_VISUAL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_MPT = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """A conversation version: who speaks how, and what stands between the turns."""

    version: str  # the template version of the original's conversation object
    style: str  # "plain", "two", "single", "llama_2" or "mpt" (roles are marked by control tokens)
    system: str = ""
    roles: tuple[str, str] = ("USER", "ASSISTANT")
    sep: str = " "  # after a user turn
    sep2: str = ""  # after an answer, trained; one control token of the tokenizer
    examples: tuple[Turn, ...] = ()  # turns that a generation prompt begins with
    labels: str = "bos"  # counting rule of the original: "bos" (v1), "no_bos" (phi), "llama_2", "mpt", "plain", "v0"
    image_tags: tuple[str, str] = ("", "")  # around every `<image>`

    @property
    def end(self) -> str:
        """What training puts after an answer; generation stops at it."""
        return self.sep2 or self.sep

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The control tokens of the template's own text: the tokenizer must have them all."""
        own = (self.system, *self.roles, self.sep, self.sep2)
        return tuple(dict.fromkeys(token for text in own for token in CONTROL.findall(text)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A stretch of a rendered conversation."""

    text: str
    trained: bool = False
    literal: bool = True  # the template's own text: control tokens are parsed
    head: int = 0  # style "single" only: that many leading tokens are trained all the same


_V1 = Template(version="v1", style="two", system=_CURIOUS.format("user"), sep2="</s>")
_PHI = replace(_V1, version="phi", sep2="<|endoftext|>", labels="no_bos")
_V0 = Template(
    version="v0",
    style="single",
    system=_CURIOUS.format("human"),
    roles=("Human", "Assistant"),
    sep="###",
    labels="v0",
)
# The conversation that every generation prompt of the original's `conv_vicuna_v0` begins with (FastChat's example).
_ENERGY = (
    "What are the key differences between renewable and non-renewable energy sources?",
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such as "
    "solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and will "
    "eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable and "
    "non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are finite "
    "and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable sources, "
    "which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources are "
    "not, and their depletion can lead to economic and social instability.\n",
)
_VICUNA_V0 = replace(_V0, examples=(Turn(role="user", text=_ENERGY[0]), Turn(role="assistant", text=_ENERGY[1])))
_LLAVA_LLAMA_2 = Template(version="llama_v2", style="llama_2", system=_VISUAL, sep="<s>", sep2="</s>", labels="llama_2")
_PLAIN = Template(version="plain", style="plain", roles=("", ""), sep="\n", labels="plain")

TEMPLATES: dict[str, Template] = {
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "v1": _V1,
    "vicuna_v1": _V1,
    "llava_v1": replace(_V1, system=_CURIOUS.format("human")),
    "v1_mmtag": replace(_V1, version="v1_mmtag", system=_MMTAG, image_tags=("<Image>", "</Image>")),
    "phi": _PHI,
    "qwen": _PHI,
    "stablelm": replace(_PHI, version="stablelm"),
    "openchat": replace(_V1, version="openchat", sep2="<|end_of_turn|>"),
    "mistral": replace(_V1, version="mistral"),
    "minicpm": replace(_V1, version="minicpm"),
    "llama_2": replace(_LLAVA_LLAMA_2, system=_LLAMA_2),
    "llava_llama_2": _LLAVA_LLAMA_2,
    "mpt": Template(
        version="mpt",
        style="mpt",
        system=_MPT,
        roles=("<|im_start|>user\n", "<|im_start|>assistant\n"),
        sep="<|im_end|>",
        labels="mpt",
    ),
    "v0": _VICUNA_V0,
    "default": _VICUNA_V0,
    "llava_v0": _V0,
    "v0_mmtag": replace(_V0, version="v0_mmtag", system=_MMTAG, image_tags=("<Image>", "</Image>")),
    # Not in the original: no system prompt, so that small runs spend their tokens on the data.
    "short": replace(_V1, version="short", system=""),
    # Llama-3's chat template, with LLaVA-NeXT's system prompt.
    "llama_3": Template(
        version="llama_3",
        style="mpt",
        system=f"<|start_header_id|>system<|end_header_id|>\n\n{_VISUAL}",
        roles=(
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        sep="<|eot_id|>",
        labels="",
    ),
    # ChatML, the chat template of Qwen2 and later.
    "chatml": Template(
        version="chatml",
        style="mpt",
        system="<|im_start|>system\nYou are a helpful assistant.",
        roles=("<|im_start|>user\n", "<|im_start|>assistant\n"),
        sep="<|im_end|>\n",
        labels="mpt",
    ),
}


def get_template(name: str) -> Template:
    """The conversation version `name`; ConfigError, with the nearest names, where there is none."""
    if name not in TEMPLATES:
        near = ", ".join(difflib.get_close_matches(name, TEMPLATES, 3) or sorted(TEMPLATES))
        raise ConfigError(f"data.template={name!r} is not a conversation version; nearest: {near}")
    return TEMPLATES[name]


def turns_of(template: Template, sample: Sample) -> tuple[Turn, ...]:
    """A sample's turns. Of the original's label functions only that of `v0` keeps an answer before the first question."""
    if template.style != "single" or not sample.leading:
        return sample.turns
    return (Turn(role="assistant", text=sample.leading), *sample.turns)


def render(template: Template, turns: tuple[Turn, ...]) -> list[Piece]:
    """Pieces of a conversation. A last user turn without an answer renders as the prompt of a generation."""
    if template.image_tags != ("", ""):
        turns = tuple(Turn(role=turn.role, text=_tag_images(template, turn.text)) for turn in turns)
    return _STYLES[template.style](template, turns)


def prompt(template: Template, turns: tuple[Turn, ...]) -> str:
    """The conversation as the one string that the original tokenises."""
    return "".join(piece.text for piece in render(template, turns))


def _tag_images(template: Template, text: str) -> str:
    """The original tags the images of a turn only if the turn starts with one."""
    tagged = IMAGE_PLACEHOLDER.join(template.image_tags)
    return text.replace(IMAGE_PLACEHOLDER, tagged) if text.startswith(IMAGE_PLACEHOLDER) else text


def _plain(template: Template, turns: tuple[Turn, ...]) -> list[Piece]:
    """Captioning: all images, then the answers. The human text is dropped, as in the original."""
    images = "".join(IMAGE_PLACEHOLDER * turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    pieces = [Piece(text=images, literal=False)]
    for turn in turns:
        if turn.role == "assistant":
            pieces += [Piece(text=turn.text, trained=True, literal=False), Piece(text=template.sep, trained=True)]
    return pieces


def _two(template: Template, turns: tuple[Turn, ...]) -> list[Piece]:
    """system USER: question ASSISTANT: answer</s>USER: ... The blank after "ASSISTANT:" belongs to the answer."""
    pieces = [Piece(text=template.system + template.sep if template.system else "")]
    for turn in _with_open_answer(turns):
        trained = turn.role == "assistant"
        pieces.append(Piece(text=f"{template.roles[trained]}:"))
        if turn.text:  # the original renders an empty turn like an open one, without an end
            pieces.append(Piece(text=f" {turn.text}", trained=trained, literal=False))
            pieces.append(Piece(text=template.sep2 if trained else template.sep, trained=trained))
    return pieces


def _single(template: Template, turns: tuple[Turn, ...]) -> list[Piece]:
    """Training: system, blank line, then "### Human: question", "### Assistant: answer", each on its line, "### ".

    As in the original, answers are trained with their role tag, and so are the two first tokens of each question
    (the "###" that ends the answer before) and the "### " at the end. Generation, again as in the original, has
    another layout: "system###Human: question###Assistant:", after the template's examples.
    """
    if turns[-1].role == "user":
        turns = (*template.examples, *turns)
        parts = [template.system, *(f"{template.roles[turn.role == 'assistant']}: {turn.text}" for turn in turns)]
        return [Piece(text=template.sep.join([*parts, f"{template.roles[1]}:"]), literal=False)]
    pieces = [Piece(text=f"{template.system}\n\n")]
    for turn in turns:
        trained = turn.role == "assistant"
        role = template.roles[trained]
        pieces.append(Piece(text=f"{template.sep} {role}: ", trained=trained, head=0 if trained else 2))
        pieces += [Piece(text=turn.text, trained=trained, literal=False), Piece(text="\n", trained=trained)]
    return [*pieces, Piece(text=f"{template.sep} ", trained=True)]


def _llama_2(template: Template, turns: tuple[Turn, ...]) -> list[Piece]:
    """[INST] <<SYS>> system <</SYS>> question [/INST] answer </s><s>[INST] ..."""
    system = f"<<SYS>>\n{template.system}\n<</SYS>>\n\n"
    pieces = []
    for number, turn in enumerate(turns):
        if turn.role == "assistant" and turn.text:
            pieces.append(Piece(text=f" {turn.text} ", trained=True, literal=False))
            pieces.append(Piece(text=template.sep2, trained=True))
        elif turn.role == "user" and (turn.text or number == 0):
            start = f"{template.sep}[INST] " if number else f"[INST] {system}"  # BOS stands for the first <s>
            pieces += [Piece(text=start), Piece(text=turn.text, literal=False), Piece(text=" [/INST]")]
    return pieces


def _mpt(template: Template, turns: tuple[Turn, ...]) -> list[Piece]:
    """<|im_start|>user, newline, question<|im_end|><|im_start|>assistant, newline, answer<|im_end|>"""
    pieces = [Piece(text=template.system + template.sep)]
    for turn in _with_open_answer(turns):
        trained = turn.role == "assistant"
        pieces.append(Piece(text=template.roles[trained]))
        if turn.text:
            pieces.append(Piece(text=turn.text, trained=trained, literal=False))
            pieces.append(Piece(text=template.sep, trained=trained))
    return pieces


def _with_open_answer(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return turns if turns[-1].role == "assistant" else (*turns, Turn(role="assistant", text=""))


_STYLES = {"plain": _plain, "two": _two, "single": _single, "llama_2": _llama_2, "mpt": _mpt}
