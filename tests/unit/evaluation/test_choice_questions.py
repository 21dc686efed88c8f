"""Lettered questions about several pictures and videos, as their publishers lay them out."""

import json

import pytest

from megatron_moellava.config import DataConfig, DataError
from megatron_moellava.evaluation.choice_questions import read_choices
from tests.helpers.evaluation_miniatures import base64_image
from tests.helpers.videos import number_of, still

DATA = "data:;base64," + base64_image()
BLINK = {
    "idx": "val_Counting_1",
    "sub_task": "Counting",
    "question": "How many?",
    "image_1": {"bytes": DATA, "path": "1.jpg"},
    "image_2": {"bytes": DATA, "path": None},
    "choices": ["1", "2"],
    "answer": "(B)",
    "prompt": "How many? Select from the following choices.",
}
MUIR = {
    "idx": "4",
    "task": "Ordering",
    "question": "Which is first, <image> or <image>?",
    "options": ["the first", "the second", "None"],
    "answer": "B",
    "image_list": [{"bytes": DATA}, {"bytes": DATA}],
}
VIDEO_MME = {
    "videoID": "abc",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "When?",
    "options": ["A. Apples.", "B. Candles."],
    "answer": "B",
}
MVBENCH = {"video": "v.mp4", "question": "What?", "candidates": ["run", "sit"], "answer": "sit", "start": 1.5, "end": 3}


def read(tmp_path, *rows):
    path = tmp_path / "q.json"
    path.write_text(json.dumps(list(rows)))
    return read_choices(path, tmp_path)


@pytest.mark.parametrize(
    ("row", "text", "group"),
    [
        (BLINK, "How many?\nA. 1\nB. 2", "Counting"),
        (MUIR, "Which is first, <image> or <image>?\nA. the first\nB. the second\nC. None", "Ordering"),
        (VIDEO_MME, "When?\nA. Apples.\nB. Candles.", "Counting Problem"),
        (MVBENCH, "What?\nA. run\nB. sit", ""),
    ],
)
def test_each_layout_has_its_options_in_letters_and_its_truth(tmp_path, row, text, group):
    (question,) = read(tmp_path, row)
    assert (question.text, question.fields["truth"], question.fields["group"]) == (text, "B", group)
    if row in (BLINK, MUIR):
        assert [picture.open().size for picture in question.pictures] == [(5, 3), (5, 3)]
    else:
        (video,) = question.pictures
        name = "abc.mp4" if row is VIDEO_MME else "v.mp4"
        assert video.video and video.path == tmp_path / name
        assert video.span == (None if row is VIDEO_MME else (1.5, 3.0))


def test_a_folder_of_files_is_a_task_for_each(tmp_path):
    (tmp_path / "json").mkdir()
    for name in ("action", "order"):
        (tmp_path / f"json/{name}.json").write_text(json.dumps([MVBENCH]))
    asked = read_choices(tmp_path / "json", tmp_path / "video")
    assert [question.fields["group"] for question in asked] == ["action", "order"] and len({q.key for q in asked}) == 2


def test_mvbenchs_videos_lie_where_its_archives_put_them(tmp_path):
    """And its folders of frames have three a second, which is what cuts count by."""
    (tmp_path / "json").mkdir()
    for name in ("action_sequence", "episodic_reasoning"):
        (tmp_path / f"json/{name}.json").write_text(json.dumps([MVBENCH | {"video": "v"}]))
    frames = tmp_path / "video/tvqa/frames_fps3_hq/v"
    frames.mkdir(parents=True)
    (tmp_path / "video/star/Charades_v1_480").mkdir(parents=True)
    for number in range(12):
        still(number).save(frames / f"{number}.jpg", quality=95)
    action, episode = read_choices(tmp_path / "json", tmp_path / "video")
    assert action.picture.path == tmp_path / "video/star/Charades_v1_480/v.mp4" and action.picture.rate is None
    assert episode.picture.path == frames
    text, shown = episode.picture.show(DataConfig(video_frames=2, video_times="seconds"))
    assert [number_of(frame) for frame in shown] == [5, 7], "1.5 to 3 s are the frames 4 to 8"
    assert text == "1.7 s: <image>\n2.3 s: <image>\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": ["one"]}, "needs 2 to 10 options"),
        ({"answer": "fly"}, "the answer 'fly' is none of the options"),
        ({"question": None}, "`question` must be text"),
        ({"video": 3}, "`video` must be a file's name"),
        ({"images": [3]}, "a picture must be a file's name"),
    ],
)
def test_a_row_that_is_no_question_is_named(tmp_path, changes, message):
    with pytest.raises(DataError, match=rf"q\.json row 0: {message}"):
        read(tmp_path, MVBENCH | changes)
