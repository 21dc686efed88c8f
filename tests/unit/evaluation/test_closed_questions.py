"""Short answers from one forward pass are those of greedy decoding."""

import itertools

import numpy as np
import pytest
from PIL import Image

from megatron_moellava import parallel
from megatron_moellava.config import DataError
from megatron_moellava.data.encode import IGNORE_INDEX
from megatron_moellava.data.encoder import Encoder
from megatron_moellava.data.sample import Turn
from megatron_moellava.evaluation.closed_questions import Plan, predict
from megatron_moellava.inference.requests import Request, Sampling
from tests.helpers.data_files import write_images
from tests.helpers.inference_models import tiny_engine

ROWS = [
    {"image": name, "question": question, "answer": answer}
    for name in ("a.png", "b.png")
    for question, answer in (("what color is it?", "red"), ("is it red?", "yes"), ("which shape?", "circle"))
]


@pytest.fixture(params=["clip-tiny", "naflex-tiny"])
def asked(tmp_path, request):
    """(engine, encoder, image folder)"""
    engine = tiny_engine(tower=request.param)
    prompter = engine.prompter
    encoder = Encoder(
        template=prompter.template,
        tokenizer=prompter.tokenizer,
        num_features=prompter.tower.num_features,
        max_length=256,
    )
    yield engine, encoder, write_images(tmp_path)
    parallel.shutdown()


def test_the_first_token_that_differs_is_what_greedy_decoding_says(asked):
    engine, encoder, folder = asked
    found = predict([engine.model], encoder, ROWS, folder)
    assert len(found) == len(ROWS)
    for row, said in zip(ROWS, found, strict=True):
        request = Request(
            id="r",
            turns=(Turn(role="user", text=f"<image>\n{row['question']}"),),
            images=(Image.open(folder / row["image"]),),
            sampling=Sampling(max_new_tokens=8),
            image_aspect_ratio="pad",
        )
        (completion,) = engine.generate([request])
        assert completion.text.strip().startswith(said["prediction"])
        assert said["loss"] > 0


def test_several_answers_at_once_are_judged_one_by_one_given_the_true_ones_before(asked):
    engine, encoder, folder = asked
    answers = ["red", "a blue circle", "yes"]
    row = {"image": "a.png", "question": "what is it?", "answer": "; ".join(answers), "answers": answers}
    (said,) = predict([engine.model], encoder, [row], folder)
    assert sum(part["loss"] for part in said["parts"]) == pytest.approx(said["loss"])
    plan = Plan(encoder, [row], folder, False, engine.model.tower, engine.prompter.data)
    ((packed,), _) = plan.of_rank(0, 1)
    labels = packed[0][1].labels_S
    truth = labels[labels != IGNORE_INDEX]
    parts = plan._parts(answers, truth, truth, np.ones(len(truth)))  # so that a part's loss is how many tokens it has
    assert [part["prediction"] for part in parts] == answers
    ends = [0, *itertools.accumulate(round(part["loss"]) for part in parts)]
    assert ends[-1] == len(truth)
    for answer, (first, last) in zip(answers, itertools.pairwise(ends), strict=True):
        assert encoder.tokenizer.decode(truth[first:last].tolist()).strip("; ") == answer
    for token in range(len(truth)):
        guess = truth.copy()
        guess[token] += 1
        judged = plan._parts(answers, truth, guess, np.ones(len(truth)))
        right = [part["prediction"] == answer for part, answer in zip(judged, answers, strict=True)]
        assert right == [not first <= token < last for first, last in itertools.pairwise(ends)]


def test_answers_that_are_not_the_answer_are_refused(asked):
    engine, encoder, folder = asked
    row = {"image": "a.png", "question": "what is it?", "answer": "red, yes", "answers": ["red", "yes"]}
    with pytest.raises(DataError, match="question 0: answer is not its answers with '; ' between"):
        predict([engine.model], encoder, [row], folder)


def test_blank_pictures_tell_what_the_words_alone_give_away(asked):
    engine, encoder, folder = asked
    seen, blank = (predict([engine.model], encoder, ROWS, folder, blank=which) for which in (False, True))
    losses = [[row["loss"] for row in part] for part in (seen, blank)]
    if not engine.model.tower.native:  # there a grey picture still has its shape
        assert losses[1][:3] == pytest.approx(losses[1][3:], abs=1e-4), "both pictures are grey"
    assert losses[0] != losses[1]


def test_questions_share_rows_and_ranks_get_equally_many(asked):
    engine, encoder, folder = asked
    plan = Plan(encoder, ROWS, folder, False, engine.model.tower, engine.prompter.data)
    whole, own = plan.of_rank(0, 1)
    assert sorted(index for row in whole for index, _ in row) == list(range(len(ROWS))) and own == len(whole)
    assert all(sum(len(sample) for _, sample in row) <= encoder.max_length for row in whole)
    shares = [plan.of_rank(rank, 4) for rank in range(4)]
    assert len({len(part) for part, _ in shares}) == 1, "experts meet across ranks"
    assert sum(own for _, own in shares) == len(whole)
