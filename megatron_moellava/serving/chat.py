"""A conversation in the terminal."""

import base64
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_moellava.config import DataError, Modality
from megatron_moellava.data.images import open_image
from megatron_moellava.data.media import show_video
from megatron_moellava.data.placeholders import (
    IMAGE_PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    any_of,
    in_places,
    placed,
    with_placeholders,
)
from megatron_moellava.data.quantities import MODALITY, open_picture
from megatron_moellava.data.regions import Located
from megatron_moellava.data.sample import Turn, frame_counts
from megatron_moellava.data.video import FRAME
from megatron_moellava.inference.regions import locate_answer
from megatron_moellava.inference.requests import Request, Sampling

HELP = """/image FILE   show a picture with the next question (several times: several pictures)
/video FILE   show a video with the next question, as frames
/boxes        where the last answer says something is, in pixels of the last picture
/clear        begin a new conversation
/save FILE    write the conversation as a LLaVA record (JSON)
/help         this list
/quit         leave (or Ctrl-D)"""


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture or a video that waits for its question."""

    name: str  # of its file; the frames of a video have none
    placeholder: str  # what a question may call it
    text: str  # that stands for it, with an `<image>` for each picture
    images: list[Image.Image]


@dataclass(slots=True)
class Conversation:
    """One conversation with its pictures; /clear begins another."""

    engine: Any  # with `stream` and `cancel`: an Engine, or one that tells other ranks
    sampling: Sampling
    turns: list[Turn] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    pending: list["Shown"] = field(default_factory=list)  # with the next question
    _numbers: itertools.count = field(default_factory=itertools.count)

    def show(self, file: str, modality: Modality | None = None) -> None:
        """Raises DataError when it is no readable picture of its modality (None: a plain one)."""
        file = os.path.abspath(os.path.expanduser(file.strip("\"'")))  # a later `cd` must not lose it
        image, _ = open_image(file, file) if modality is None else open_picture(file, modality, file)
        placeholder = modality.placeholder if modality else IMAGE_PLACEHOLDER
        self.pending.append(Shown(file, placeholder, IMAGE_PLACEHOLDER, [image]))

    def show_video(self, file: str) -> None:
        """Raises DataError when it is no readable video."""
        file = os.path.abspath(os.path.expanduser(file.strip("\"'")))
        text, frames = show_video(file, file, self.engine.prompter.data)
        self.pending.append(Shown("", VIDEO_PLACEHOLDER, text, frames))

    def clear(self) -> None:
        """Forget turns and pictures, also those not yet asked about."""
        for part in (self.turns, self.images, self.names, self.pending):
            part.clear()

    def ask(self, question: str, say: Callable[[str], None]) -> str:
        """The answer, said piece by piece on the way. Interrupted or refused, the question is as if not asked."""
        shown, text = self._with_pending(question)
        images = [image for item in shown for image in item.images]
        turns = (*self.turns, Turn(role="user", text=text))
        request = Request(
            id=str(next(self._numbers)),
            turns=turns,
            images=(*self.images, *images),
            sampling=self.sampling,
        )
        answer = ""
        try:
            for event in self.engine.stream(request):
                say(event.delta)
                answer += event.delta
        except KeyboardInterrupt:
            self.engine.cancel(request.id)
            say(" [interrupted]")
        self.turns = [*turns, Turn(role="assistant", text=answer)]
        self.names += [item.name for item in shown for _ in item.images]
        self.images += images
        self.pending.clear()
        return answer

    def _with_pending(self, question: str) -> tuple[list[Shown], str]:
        """(what is shown, in its order in the question; the question with it).

        It stands where the question has one `<image>`, `<video>` or `<depth>` for each, else in front.
        """
        kinds = [item.placeholder for item in self.pending]
        own = [modality.placeholder for modality in self.engine.prompter.data.modalities]
        order = in_places(question, kinds)
        if kinds and order is not None:
            shown = [self.pending[index] for index in order]
            waiting = iter([item.text for item in shown])
            question = _as_text(question, [placeholder for placeholder in own if placeholder not in kinds])
            return shown, any_of(kinds).sub(lambda _: next(waiting), question)
        question, texts = _as_text(question, own), [item.text for item in self.pending]
        if texts and (text := placed(question, texts)) is not None:
            return [*self.pending], text
        front = "".join(f"{text}\n" for text in texts)
        return [*self.pending], front + _as_text(question, [IMAGE_PLACEHOLDER])

    def places(self) -> str:
        """A line for each box, point and polygon that the last answer names."""
        answer = self.turns[-1].text if self.turns else ""
        found = locate_answer(answer, self.images, self.engine.prompter)
        lines = [f"{place.kind} in picture {place.image + 1}: {_numbers(place)}" for place in found]
        return "\n".join(lines) or "The last answer names no place."

    def save(self, file: str) -> None:
        """A record that training reads as it is: names below the file's folder, other pictures inside of it."""
        speakers = {"user": "human", "assistant": "gpt"}
        folder = Path(file).expanduser().resolve().parent
        record: dict = {"id": Path(file).stem, "conversations": []}
        kinds = [image.info.get(MODALITY, "image") for image in self.images]
        for kind, name, image in zip(kinds, self.names, self.images, strict=True):
            record.setdefault(kind, []).append(_portable(name, folder) if name else _png(image))
        plain = [image for kind, image in zip(kinds, self.images, strict=True) if kind == "image"]
        if frames := frame_counts(image.info.get(FRAME) for image in plain):
            record["frames"] = frames
        asked = with_placeholders([turn.text for turn in self.turns if turn.role == "user"], kinds)
        questions = iter(asked)
        for turn in self.turns:
            answer = _as_text(turn.text, [f"<{kind}>" for kind in ("image", *kinds)])
            text = next(questions) if turn.role == "user" else answer
            record["conversations"].append({"from": speakers[turn.role], "value": text})
        content = json.dumps([record], ensure_ascii=False, indent=1) + "\n"
        Path(file).expanduser().write_text(content, encoding="utf-8")


def _as_text(text: str, placeholders: Iterable[str]) -> str:
    """With placeholders that no picture belongs to as words: "< image >"."""
    for placeholder in placeholders:
        text = text.replace(placeholder, f"< {placeholder[1:-1]} >")
    return text


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:;base64," + base64.b64encode(buffer.getvalue()).decode()


def _numbers(place: Located) -> str:
    return " ".join(f"({x:.1f}, {y:.1f})" for x, y in place.points)


def _portable(name: str, folder: Path) -> str:
    path = Path(name).expanduser().resolve()
    if path.is_relative_to(folder):
        return str(path.relative_to(folder))
    return "data:;base64," + base64.b64encode(path.read_bytes()).decode()


def run_chat(conversation: Conversation, images: list[str]) -> None:
    """Read lines until the end of the input."""
    for file in images:
        conversation.show(file)
    print(f"Type a question, or /help.{_shown(conversation)}", flush=True)
    while (line := _read()) is not None:
        line = line.strip()
        if line in ("/quit", "/exit"):
            return
        if line:
            try:
                _obey(conversation, line)
            except (DataError, OSError) as error:
                print(f"{error}", flush=True)


def _read() -> str | None:
    try:
        return input("you> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _obey(conversation: Conversation, line: str) -> None:
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == "/image" and argument:
        conversation.show(argument)
        print(_shown(conversation).strip())
    elif command == "/video" and argument:
        conversation.show_video(argument)
        print(_shown(conversation).strip())
    elif command in (own := _commands(conversation)) and argument:
        conversation.show(argument, own[command])
        print(_shown(conversation).strip())
    elif command == "/boxes":
        print(conversation.places())
    elif command == "/clear":
        conversation.clear()
        print("A new conversation.")
    elif command == "/save" and argument:
        conversation.save(argument)
        print(f"Saved to {argument}.")
    elif command.startswith("/"):
        extra = [f"{name} FILE   show a picture of this modality" for name in _commands(conversation)]
        print("\n".join([HELP, *extra]))
    else:
        conversation.ask(line, _say)
        print(flush=True)


def _commands(conversation: Conversation) -> dict[str, Modality]:
    """Of the checkpoint's modalities: `/depth FILE`."""
    return {f"/{modality.name}": modality for modality in conversation.engine.prompter.data.modalities}


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _shown(conversation: Conversation) -> str:
    count = sum(len(item.images) for item in conversation.pending)
    return f" {count} picture{'s' if count > 1 else ''} with the next question." if count else ""
