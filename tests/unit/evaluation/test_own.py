"""Questions of one's own: what a line may hold, what is asked, and the file that comes out."""

import json

import numpy as np
import pytest
from PIL import Image

from megatron_moellava.commands.evaluate import main
from megatron_moellava.config import ConfigError, DataConfig, DataError
from megatron_moellava.data import quantities
from megatron_moellava.data.quantities import MODALITY
from megatron_moellava.data.video import FRAME
from megatron_moellava.evaluation.generation import _translated
from megatron_moellava.evaluation.own import OwnQuestions, ask
from megatron_moellava.evaluation.predictions import ALONE
from megatron_moellava.evaluation.runner import Answer, Options, make_request
from tests.helpers.evaluation_miniatures import write_image, write_jsonl
from tests.helpers.modalities import DEPTH, write_pictures

QUIET = Options(progress=False)


class Echo:
    """Says what it was asked, and how many pictures it saw."""

    def __init__(self):
        self.asked = []

    def generate(self, requests):
        for request in reversed(list(requests)):
            assert request.turns[-1].text.count("<image>") == len([picture.open() for picture in request.images])
            self.asked.append(request)
            yield Answer(request_id=request.id, text=f" {len(request.images)}: {request.turns[-1].text}\n")


@pytest.fixture
def folder(tmp_path):
    write_image(tmp_path / "pictures/a.png")
    write_image(tmp_path / "pictures/b.png", (0, 90, 0))
    return tmp_path


def own(folder, rows, name="mine.jsonl", **fields):
    write_jsonl(folder / name, rows)
    return OwnQuestions(file=folder / name, images=folder / "pictures", **fields)


def test_the_originals_question_file_is_asked_and_answered_in_its_columns(folder):
    rows = [
        {"question_id": 7, "image": "b.png", "text": "What is it?", "category": "conv"},
        {"question_id": "x", "image": "a.png", "text": "And this?"},
    ]
    engine = Echo()
    line = ask(
        own(folder, rows),
        folder / "out",
        engine,
        model="m",
        place=ALONE,
        options=QUIET,
        answers=folder / "to/answers.jsonl",
    )
    assert line == f"2 questions of {folder}/mine.jsonl are answered in {folder}/to/answers.jsonl\n"
    written = [json.loads(row) for row in (folder / "to/answers.jsonl").read_text().splitlines()]
    assert [list(row) for row in written] == [
        ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    ] * 2
    assert [(row["question_id"], row["prompt"], row["text"], row["model_id"]) for row in written] == [
        (7, "What is it?", "1: <image>\nWhat is it?", "m"),
        ("x", "And this?", "1: <image>\nAnd this?", "m"),
    ]
    assert (folder / "out/mine/predictions.jsonl").read_text() == (folder / "to/answers.jsonl").read_text()
    asked = engine.asked[0]
    assert (asked.max_new_tokens, asked.image_aspect_ratio, asked.temperature) == (1024, "model", 0.0)


@pytest.mark.parametrize(
    "row, turn, id_",
    [
        ({"text": "Why?"}, "Why?", 0),
        ({"id": "q", "question": "Why?", "image": None}, "Why?", "q"),
        ({"prompt": "Why?", "image": []}, "Why?", 0),
        ({"text": "Compare.", "image": ["a.png", "b.png"]}, "<image>\n<image>\nCompare.", 0),
        ({"text": "Is <image> like <image>?", "image": ["a.png", "b.png"]}, "Is <image> like <image>?", 0),
        ({"text": "<image>\nWhat?", "image": "a.png"}, "<image>\nWhat?", 0),
        ({"text": "What does the tag <image> do?"}, "What does the tag <image> do?", 0),
        ({"text": "Pick.", "option_char": "A", "options": []}, "Pick.", 0),
    ],
)
def test_what_a_line_may_hold(folder, row, turn, id_):
    (question,) = own(folder, [row]).read()
    request = make_request(own(folder, [row]).task, question)
    assert (request.turns[0].text, len(request.images), question.id) == (turn, len(question.paths), id_)
    if "<image>" not in row.get("text", "") or question.paths:
        ask(own(folder, [row]), folder / "out", Echo(), model="m", place=ALONE, options=QUIET, answers=None)


def test_questions_that_share_an_id_keep_their_order(folder):
    rows = [{"question_id": 1, "text": text} for text in ("a", "b", "c")]
    ask(own(folder, rows), folder / "out", Echo(), model="m", place=ALONE, options=QUIET, answers=None)
    written = [json.loads(row) for row in (folder / "out/mine/predictions.jsonl").read_text().splitlines()]
    assert [(row["question_id"], row.get("round_id", 0), row["prompt"]) for row in written] == [
        (1, 0, "a"),
        (1, 1, "b"),
        (1, 2, "c"),
    ]


@pytest.mark.parametrize(
    "rows, words",
    [
        ([], "holds no question"),
        ([{"question_id": 1}], "question 1: `text` must hold the question; the line has .'question_id'"),
        ([{"text": "a"}, {"text": " "}], "question 2: `text` must hold the question"),
        ([{"text": "a", "image": 3}], "`image` must be a file's name or a list of names, not 3"),
        ([{"text": "a", "image": "c.png"}], "1 pictures are missing, first .*c.png; name their folder with"),
        ([{"text": "<image> <image>", "image": "a.png"}], "2 `<image>` in the text for 1 pictures"),
    ],
)
def test_a_wrong_file_is_one_clear_error(folder, rows, words):
    with pytest.raises(DataError, match=words):
        own(folder, rows).read()


def test_answers_to_other_questions_are_not_reused(folder):
    def asked(rows, **fields):
        return ask(
            own(folder, rows, **fields), folder / "out", Echo(), model="m", place=ALONE, options=QUIET, answers=None
        )

    rows = [{"question_id": 1, "text": "a", "image": "a.png"}]
    asked(rows)
    asked(rows)
    for changed, fields in (
        ([rows[0] | {"image": "b.png"}], {}),
        ([rows[0] | {"text": "b"}], {}),
        (rows, {"max_new_tokens": 5}),
        (rows, {"image_aspect_ratio": "square"}),
    ):
        with pytest.raises(ConfigError, match="use another --out"):
            asked(changed, **fields)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--questions", "q.jsonl"], "--questions needs a model to ask"),
        (["--questions", "q.jsonl", "--load", "x", "--benchmark", "pope"], "leave out --benchmark"),
        (["--benchmark", "pope", "--load", "x", "--answers", "a.jsonl"], "--answers belongs to --questions FILE"),
        (["--benchmark", "pope", "--load", "x", "--image-aspect-ratio", "square"], "--image-aspect-ratio belongs to"),
        (["--questions", "q.jsonl", "--load", "x", "--max-new-tokens", "0"], "max-new-tokens=0 must be at least 1"),
        (["--questions", "q.jsonl", "--load", "x"], "q.jsonl is missing"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_pictures_of_the_checkpoints_modalities_are_asked_about_in_their_places(folder):
    write_pictures(folder / "pictures")
    rows = [
        {"image": "a.png", "depth": "depth/0.png", "text": "How far is it?"},
        {"image": "a.png", "depth": ["depth/0.png", "depth/1.png"], "text": "<depth> or <image> or <depth>?"},
    ]
    known = own(folder, rows, modalities=("depth",)).read()
    asked = [make_request(own(folder, rows).task, question) for question in known]
    assert [request.turns[0].text for request in asked] == [
        "<image>\n<depth>\nHow far is it?",
        "<depth> or <image> or <depth>?",
    ]
    data = DataConfig(modalities=(DEPTH,))
    shown = [_translated(request, data) for request in asked]
    assert [request.turns[0].text.count("<image>") for request in shown] == [2, 3]
    assert [image.info.get(MODALITY) for image in shown[1].images] == ["depth", None, "depth"]
    depth = np.asarray(Image.open(folder / "pictures/depth/1.png"))
    assert (np.asarray(shown[1].images[2]) == quantities.shown(depth, DEPTH)).all()
    with pytest.raises(DataError, match="picture of 'depth', and the checkpoint has learned of no modality"):
        _translated(asked[0], DataConfig())
    assert own(folder, rows[:1]).read()[0].pictures[0].placeholder == "<image>", "another checkpoint does not ask"


def test_a_video_that_the_text_names_before_a_picture_is_shown_before_it(folder):
    for number in range(3):
        write_image(folder / f"pictures/clip/{number}.png", (number, 0, 0))
    rows = [{"image": "a.png", "video": "clip", "text": "Is <video> like <image>?"}]
    (question,) = own(folder, rows).read()
    shown = _translated(make_request(own(folder, rows).task, question), DataConfig(video_frames=3))
    assert [FRAME in image.info for image in shown.images] == [True, True, True, False]
    assert shown.turns[0].text == "Is <image><image><image> like <image>?"
