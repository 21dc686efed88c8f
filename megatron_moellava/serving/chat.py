"""A conversation in the terminal."""

import base64
import io
import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_moellava.config import DataError
from megatron_moellava.data.images import open_image
from megatron_moellava.data.media import show_video
from megatron_moellava.data.regions import Located
from megatron_moellava.data.sample import IMAGE_PLACEHOLDER, Turn, frame_counts, placed
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


@dataclass(slots=True)
class Conversation:
    """One conversation with its pictures; /clear begins another."""

    engine: Any  # with `stream` and `cancel`: an Engine, or one that tells other ranks
    sampling: Sampling
    turns: list[Turn] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    # shown with the next question: (name, text that stands for it, pictures); the frames of a video have no name
    pending: list[tuple[str, str, list[Image.Image]]] = field(default_factory=list)
    _numbers: itertools.count = field(default_factory=itertools.count)

    def show(self, file: str) -> None:
        """Raises DataError when it is no readable picture."""
        file = os.path.abspath(os.path.expanduser(file.strip("\"'")))  # a later `cd` must not lose it
        image, _ = open_image(file, file)
        self.pending.append((file, IMAGE_PLACEHOLDER, [image]))

    def show_video(self, file: str) -> None:
        """Raises DataError when it is no readable video."""
        file = os.path.abspath(os.path.expanduser(file.strip("\"'")))
        text, frames = show_video(file, file, self.engine.prompter.data)
        self.pending.append(("", text, frames))

    def clear(self) -> None:
        """Forget turns and pictures, also those not yet asked about."""
        for part in (self.turns, self.images, self.names, self.pending):
            part.clear()

    def ask(self, question: str, say: Callable[[str], None]) -> str:
        """The answer, said piece by piece on the way. Interrupted or refused, the question is as if not asked."""
        text = self._with_pending(question)
        images = [image for _, _, found in self.pending for image in found]
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
        self.names += [name for name, _, found in self.pending for _ in found]
        self.images += images
        self.pending.clear()
        return answer

    def _with_pending(self, question: str) -> str:
        """The question with what is shown: where it says `<image>` or `<video>` once for each, else in front."""
        texts = [text for _, text, _ in self.pending]
        if texts and (text := placed(question, texts)) is not None:
            return text
        return "".join(f"{text}\n" for text in texts) + question.replace(IMAGE_PLACEHOLDER, "< image >")

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
        if self.names:
            record["image"] = [
                _portable(name, folder) if name else _png(self.images[number]) for number, name in enumerate(self.names)
            ]
        if frames := frame_counts(image.info.get(FRAME) for image in self.images):
            record["frames"] = frames
        for turn in self.turns:
            text = turn.text if turn.role == "user" else turn.text.replace(IMAGE_PLACEHOLDER, "< image >")
            record["conversations"].append({"from": speakers[turn.role], "value": text})
        content = json.dumps([record], ensure_ascii=False, indent=1) + "\n"
        Path(file).expanduser().write_text(content, encoding="utf-8")


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
    elif command == "/boxes":
        print(conversation.places())
    elif command == "/clear":
        conversation.clear()
        print("A new conversation.")
    elif command == "/save" and argument:
        conversation.save(argument)
        print(f"Saved to {argument}.")
    elif command.startswith("/"):
        print(HELP)
    else:
        conversation.ask(line, _say)
        print(flush=True)


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _shown(conversation: Conversation) -> str:
    count = sum(len(images) for *_, images in conversation.pending)
    return f" {count} picture{'s' if count > 1 else ''} with the next question." if count else ""
