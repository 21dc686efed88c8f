"""Prompts of the benchmarks, as the original puts them."""

import pytest

from megatron_moellava.evaluation.runner import Answer, make_request
from megatron_moellava.evaluation.tasks import get_task
from tests.helpers import evaluation_miniatures as miniatures
from tests.helpers.evaluation_runs import predictions_of, run, write_miniature


class Oracle:
    """Answers a request by the first key of the table that occurs in its text; last asked, first answered."""

    def __init__(self, table, default="yes", stop_after=None):
        self.table, self.default, self.stop_after = table, default, stop_after
        self.asked = []

    def generate(self, requests):
        for number, request in enumerate(reversed(list(requests))):
            if number == self.stop_after:
                raise KeyboardInterrupt
            text = request.turns[-1].text
            assert text.count("<image>") == len(request.images)
            for picture in request.images:
                assert picture.open().mode == "RGB"
            self.asked.append(request)
            yield Answer(
                request_id=request.id,
                text=next((f" {answer}\n" for key, answer in self.table.items() if key in text), self.default),
            )


@pytest.mark.parametrize(
    ("name", "aspect", "tokens", "end"),
    [
        ("vqav2", "model", 128, "phrase."),
        ("gqa", "model", 128, "phrase."),
        ("vizwiz", "model", 128, "phrase."),
        ("textvqa", "model", 128, "phrase."),
        ("pope", "model", 128, "phrase."),
        ("mme", "model", 128, "phrase."),
        ("seed", "model", 128, "directly."),
        ("scienceqa", "square", 1024, "\nAnswer with the option's letter from the given choices directly."),
        ("mmbench", "model", 1024, "\nAnswer with the option's letter from the given choices directly."),
        ("mmbench_cn", "model", 1024, "\n请直接回答选项字母。"),
        ("llava_bench", "square", 1024, "Where is this?"),
        ("mm_vet", "square", 1024, "Question 0?"),
    ],
)
def test_requests_follow_the_specification(tmp_path, name, aspect, tokens, end):
    write_miniature(name, tmp_path)
    request = make_request(get_task(name), get_task(name).read(tmp_path)[0])
    assert (request.image_aspect_ratio, request.max_new_tokens, request.temperature) == (aspect, tokens, 0.0)
    assert request.turns[0].role == "user"
    assert request.turns[0].text.startswith("<image>\n")
    assert request.turns[0].text.endswith(end)


def test_mmbench_prompt_is_hint_question_and_lettered_options(tmp_path):
    miniatures.mmbench(tmp_path)
    first, second = get_task("mmbench").read(tmp_path)
    assert first.text == "Look left.\nWhich one?\nA. cat\nB. dog\nC. cow"
    assert second.text == 'Line one\nLine two?\nA. sodium Na\nB. say "no"'
    rotated = get_task("mmbench").read(tmp_path, circular=True)
    assert [question.round for question in rotated] == [0, 1, 2, 0, 1]
    assert rotated[1].text.endswith("A. dog\nB. cow\nC. cat")
    assert rotated[1].fields["option_char"] == "BCA"


def test_a_science_question_without_a_picture_has_no_placeholder(tmp_path):
    miniatures.science_qa(tmp_path)
    engine = Oracle({}, default="A")
    run("scienceqa", tmp_path, engine)
    by_id = {request.id: request for request in engine.asked}
    assert by_id["3#0"].images == ()
    assert "<image>" not in by_id["3#0"].turns[0].text
    # The original's scorer tells the two kinds apart by the logged prompt.
    assert ["<image>" in row["prompt"] for row in predictions_of(tmp_path, "scienceqa")] == [True, True, False]
