"""One forward pass of a step: which logits come out, and what is remembered of images."""

import pickle
from dataclasses import replace

import pytest
import torch

from megatron_moellava.data import media
from megatron_moellava.data.batch import pack
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.data.loader import build_encoder
from megatron_moellava.data.sample import ImageRef, Turn, parse_record
from megatron_moellava.inference.forward import REMEMBERED_IMAGES
from megatron_moellava.inference.requests import Request
from megatron_moellava.model.kv_cache import Step
from tests.helpers.data_files import conversation
from tests.helpers.inference_models import ask, picture, tiny_engine
from tests.helpers.videos import write_video


@pytest.fixture
def engine():
    engine = tiny_engine(max_batch_size=2)
    yield engine
    from megatron_moellava import parallel

    parallel.shutdown()


def pass_over(engine, prompts, tokens=(), has_images=()):
    positions = [place for prompt in prompts for place in range(len(prompt.tokens))]
    positions += engine.cache.lengths_R[: len(tokens)]
    rows = tuple((len(tokens) + number, len(prompt.tokens)) for number, prompt in enumerate(prompts))
    step = Step(prompts=rows, decoding=len(tokens), positions_T=torch.tensor(positions))
    return engine.forward(step, prompts, tokens, has_images)


def test_a_step_gives_one_row_of_logits_per_prompt_and_per_token(engine):
    first, second = engine.prompter(ask(0)), engine.prompter(ask(1, images=0))
    assert pass_over(engine, [first]).shape == (1, engine.prompter.tokenizer.vocab_size)
    assert pass_over(engine, [second], [5], [True]).shape[0] == 2


def test_a_token_after_its_prompt_is_the_longer_prompts_last_token(engine):
    prompt = engine.prompter(ask(0))
    pass_over(engine, [prompt])
    continued = pass_over(engine, [], [17], [True])
    tokens_1S = torch.tensor([[*prompt.tokens, 17]])
    positions_1S = torch.arange(tokens_1S.shape[1])[None]
    with torch.no_grad():
        whole = engine.model(tokens_1S, positions_1S, pixels_NCHW=prompt.pixels_NCHW)[0, -1, : continued.shape[1]]
    assert torch.allclose(continued[0], whole, atol=1e-4)


def test_images_are_encoded_once_and_the_oldest_are_forgotten(engine):
    forward = engine.forward
    for _ in range(2):
        pass_over(engine, [engine.prompter(ask(0, images=2))])
    assert forward.images_encoded == 2 == len(forward.features)
    for number in range(1, REMEMBERED_IMAGES + 2):
        forward.features[str(number).encode()] = torch.zeros(1)
    pass_over(engine, [engine.prompter(ask(3, images=1))])
    assert len(forward.features) == REMEMBERED_IMAGES and b"1" not in forward.features


def test_pooled_frames_are_read_as_in_training(engine, tmp_path):
    """A picture and a video of 5 frames in pairs: 36 visual tokens of the picture, 9 of each pair and of the last frame."""
    write_video(tmp_path / "v.mp4")
    picture(1).save(tmp_path / "a.png")
    model, prompter = engine.model, engine.prompter
    data = replace(prompter.data, video_pooling="2x2x2", video_frames=5, video_times="seconds", seq_length=512)
    prompter = replace(prompter, data=data)
    text, frames = media.show_video(str(tmp_path / "v.mp4"), "v", data)
    shown = media.open_ref(ImageRef(name="a.png"), str(tmp_path), "a")[0]
    question = f"<image>\n{text}What happens?"
    request = Request(id="1", turns=(Turn(role="user", text=question),), images=(shown, *frames))
    prompt = prompter(pickle.loads(pickle.dumps(request)))  # noqa: S301 - as it goes to other ranks
    assert prompt.tiles == (1, 2, 2, 1) and prompt.widths == (36, 9, 9, 9) and prompt.tokens.count(IMAGE_TOKEN) == 63

    record = {"id": "1", "image": ["a.png", *["v.mp4"] * 5], "conversations": conversation(question, "It gets light.")}
    sample = parse_record(record, origin="row 1")
    refs = (sample.images[0], *(replace(ref, frame=(i, 5)) for i, ref in enumerate(sample.images[1:])))
    encoder = build_encoder(data, prompter.tokenizer, model.tower, "v1")
    encoded = media.encoded(encoder, replace(sample, images=refs), str(tmp_path), "row 1", model.tower, data)
    pixels = [part for part, _ in media.pixels_of(encoded, str(tmp_path), "row 1", model.tower, data)]
    batch = pack([encoded], pixels, 512, 0, model.tower.pixel_shape)
    assert batch.pools == ((1, 1), (2, 2), (2, 2), (1, 2)) and batch.counts.image_rows == 63
    with torch.no_grad():
        trained = model.embed(batch.tokens_BS, batch.pixel_values_NCHW, image_rows=63, pools=batch.pools)
        (asked,) = engine.forward._embed_prompts([prompt], [0])
    rows = trained[(batch.tokens_BS[0] == IMAGE_TOKEN), 0]
    assert torch.allclose(rows, asked[torch.tensor(prompt.tokens) == IMAGE_TOKEN, 0], atol=1e-5)
    assert prompter.tokenizer.decode([t for t in prompt.tokens if t >= 0]).count(" s: ") == 3  # one time for each pair
