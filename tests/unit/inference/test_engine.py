"""The engine says what the model says: cached, batched and interleaved answers equal the uncached model's, one by one."""

import platform
from dataclasses import replace

import pytest
import torch

from megatron_moellava import parallel
from megatron_moellava.config import DataError, MoEConfig
from megatron_moellava.data.quantities import MODALITY
from megatron_moellava.data.sample import Turn
from megatron_moellava.data.video import FRAME
from megatron_moellava.inference.packed_linear import PackedLinear, can_pack
from megatron_moellava.inference.request_state import RequestState
from megatron_moellava.inference.requests import Request, Sampling
from tests.helpers.inference_models import GATES, ask, mixed_requests, picture, tiny_engine, uncached
from tests.helpers.modalities import DEPTH

TOLERANCE = 1e-5  # measured: 3e-6, logits of size 5


@pytest.fixture(autouse=True)
def _leave_no_groups():
    yield
    parallel.shutdown()


@pytest.fixture
def seen(monkeypatch):
    """Logits that every choice was made from, by request."""
    logits: dict[str, list[torch.Tensor]] = {}
    choose = RequestState.choose

    def record(self, logits_KV, likeliest):
        logits.setdefault(self.request.id, []).append(logits_KV[0].clone())
        return choose(self, logits_KV, likeliest)

    monkeypatch.setattr(RequestState, "choose", record)
    return logits


@pytest.mark.parametrize("fast", [True, False], ids=["fast decoder", "modules"])
@pytest.mark.parametrize("gate", GATES)
def test_cached_batched_logits_equal_the_uncached_ones(gate, fast, seen):
    engine = tiny_engine(GATES[gate], max_batch_size=3)
    assert engine.forward.fast_decoder is not None
    if not fast:
        engine.forward.fast_decoder = None
    requests = mixed_requests()
    completions = {completion.request_id: completion for completion in engine.generate(requests)}
    assert len(completions) == len(requests)
    for request in requests:
        tokens = completions[request.id].tokens
        expected_TV = uncached(engine, request, tokens)
        assert torch.stack(seen[request.id]).sub(expected_TV).abs().max() < TOLERANCE
        assert expected_TV.argmax(dim=-1).tolist() == list(tokens)
    assert len({completion.tokens for completion in completions.values()}) > 2, "all answers are the same"


@pytest.mark.parametrize("backbone", ["phi-2-tiny", "qwen2-tiny", "stablelm-2-tiny", "minicpm-tiny", "qwen3-tiny"])
def test_every_kind_of_block_is_cached_right(backbone, seen):
    engine = tiny_engine(MoEConfig(), backbone, max_batch_size=3)
    requests = [replace(request, sampling=Sampling(max_new_tokens=5)) for request in mixed_requests()]
    for completion in engine.generate(requests):
        request = next(request for request in requests if request.id == completion.request_id)
        expected_TV = uncached(engine, request, completion.tokens)
        assert torch.stack(seen[request.id]).sub(expected_TV).abs().max() < TOLERANCE
        assert expected_TV.argmax(dim=-1).tolist() == list(completion.tokens)


@pytest.mark.parametrize(
    "tower", ["naflex-tiny", "naflex-tiny@pixel_shuffle", "siglip-tiny@newline", "siglip-tiny@onevision"]
)
def test_pictures_of_different_lengths_are_answered_as_in_one_pass(tower, seen):
    engine = tiny_engine(MoEConfig(), tower=tower, max_batch_size=3)
    sizes = [(40, 30), (30, 90), (120, 20)]
    wide = replace(ask(7, "Wide.", images=3), images=tuple(picture(n, size) for n, size in enumerate(sizes)))
    requests = [*mixed_requests(), wide, replace(ask(8, record_routing=True), images=(picture(8, (60, 20)),))]
    completions = {completion.request_id: completion for completion in engine.generate(requests)}
    for request in requests:
        completion = completions[request.id]
        expected_TV = uncached(engine, request, completion.tokens)
        assert torch.stack(seen[request.id]).sub(expected_TV).abs().max() < TOLERANCE
        assert expected_TV.argmax(dim=-1).tolist() == list(completion.tokens)
    said, prompt = completions["r8"].routing, engine.prompter(requests[-1])
    assert sum("image" in token for token in said["tokens"]) == prompt.features[0]
    if engine.model.tower.native:
        ((rows, columns),) = said["grids"]
        assert rows * columns == prompt.features[0] and columns > rows


def test_minicpm_without_multimodal_scale_is_cached_right(seen):
    """There the scale of a word's embedding depends on whether the request has images."""
    engine = tiny_engine(None, "minicpm-tiny", max_batch_size=4)
    engine.model.run = replace(
        engine.model.run, model=replace(engine.model.run.model, scale_multimodal_embeddings=False)
    )
    requests = mixed_requests()
    for completion in engine.generate(requests):
        request = next(request for request in requests if request.id == completion.request_id)
        expected_TV = uncached(engine, request, completion.tokens)
        assert torch.stack(seen[request.id]).sub(expected_TV).abs().max() < TOLERANCE


def test_a_gate_that_drops_treats_every_request_as_if_it_had_come_alone(seen):
    """Eight experts with an evaluation capacity of 0.5: prompts lose choices, and which ones must not depend on company."""
    moe = MoEConfig(
        num_moe_experts=8,
        router="original",
        moe_expert_capacity_factor=1.5,
        eval_capacity_factor=0.5,
        second_choice="deterministic",
    )
    engine = tiny_engine(moe, max_batch_size=4)
    together = {completion.request_id: completion.tokens for completion in engine.generate(mixed_requests())}
    alone = {}
    for request in mixed_requests():
        alone |= {completion.request_id: completion.tokens for completion in engine.generate([request])}
    assert together == alone


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN's layouts are x86's")
def test_weights_are_packed_and_give_the_same_products():
    """Where packing fails nothing but the speed changes, so that a torch without it would not be noticed."""
    assert can_pack(torch.float32)
    x, weight, bias = torch.randn(8, 48), torch.randn(32, 48), torch.randn(32)
    for packs in (True, False):
        product = PackedLinear(packs)
        torch.testing.assert_close(product(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
        assert bool(product._packed) == packs


def test_a_finished_row_makes_room_without_waiting_for_the_others():
    engine = tiny_engine(max_batch_size=2)
    requests = [ask(0, max_new_tokens=20), *(ask(number, max_new_tokens=2) for number in range(1, 6))]
    order = [completion.request_id for completion in engine.generate(requests)]
    assert order[-1] == "r0"
    assert engine.steps <= 21, "the long answer had to wait"


def test_an_image_is_encoded_once_over_the_turns_of_a_conversation():
    engine = tiny_engine()
    first = ask(0)
    (answer,) = engine.generate([first])
    turns = (*first.turns, Turn(role="assistant", text=answer.text), Turn(role="user", text="Sure?"))
    list(engine.generate([replace(first, id="again", turns=turns)]))
    assert engine.forward.images_encoded == 1


def test_images_of_a_step_go_through_the_tower_together(monkeypatch):
    monkeypatch.setattr("megatron_moellava.inference.forward.REMEMBERED_IMAGES", 1)  # fewer than the step needs
    requests = [ask(0), replace(ask(0), id="same"), ask(1), ask(2, images=0)]
    alone = {request.id: next(tiny_engine().generate([request])).tokens for request in requests}
    engine, passes = tiny_engine(max_batch_size=4), []
    encode = engine.model.encode_images
    monkeypatch.setattr(engine.model, "encode_images", lambda *images: passes.append(len(images[0])) or encode(*images))
    together = {completion.request_id: completion.tokens for completion in engine.generate(requests)}
    assert passes == [2], "two different images"
    assert together == alone
    assert len(engine.forward.features) == 1


def test_sampling_repeats_with_its_seed_and_differs_with_another():
    engine = tiny_engine(max_batch_size=4)

    def texts(*seeds):
        requests = [ask(0, temperature=1.5, top_p=0.95, seed=seed, max_new_tokens=12) for seed in seeds]
        requests = [replace(request, id=f"s{number}") for number, request in enumerate(requests)]
        return {completion.request_id: completion.tokens for completion in engine.generate(requests)}

    both = texts(3, 4)
    assert both["s0"] != both["s1"]
    assert texts(3)["s0"] == both["s0"]


def test_a_tiny_top_p_is_greedy():
    engine = tiny_engine()
    (greedy,) = engine.generate([ask(0)])
    (sampled,) = engine.generate([ask(0, temperature=1.0, top_p=1e-6)])
    assert sampled.tokens == greedy.tokens


def test_streamed_text_is_the_answer_and_cancelling_frees_the_row():
    engine = tiny_engine(max_batch_size=1)
    (whole,) = engine.generate([ask(0, max_new_tokens=9)])
    events = list(engine.stream(ask(0, max_new_tokens=9)))
    assert "".join(event.delta for event in events) == whole.text == events[-1].completion.text
    engine.submit(ask(1))
    engine.step()
    engine.cancel("r1")
    assert not engine.busy
    (again,) = engine.generate([ask(0, max_new_tokens=9)])
    assert again.tokens == whole.tokens


def test_a_stop_string_ends_the_answer_before_it():
    engine = tiny_engine()
    (whole,) = engine.generate([ask(0, max_new_tokens=12)])
    mark = whole.text[len(whole.text) // 2 :][:3]
    (cut,) = engine.generate([ask(0, max_new_tokens=12, stop=(mark,))])
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(mark)]
    streamed = "".join(event.delta for event in engine.stream(ask(0, max_new_tokens=12, stop=(mark,))))
    assert streamed == cut.text, "a part of the stop string was shown"


def test_routing_is_what_the_routers_of_an_uncached_pass_choose():
    engine = tiny_engine(MoEConfig(), max_batch_size=3)
    requests = [ask(0, record_routing=True, max_new_tokens=7), ask(1, "other"), ask(2, record_routing=True)]
    completions = {completion.request_id: completion for completion in engine.generate(requests)}
    assert completions["r1"].routing is None
    found = completions["r0"].routing
    with engine.token_weights.recording():
        uncached(engine, requests[0], completions["r0"].tokens)
    for layer in found["layers"]:
        chosen_TK = engine.token_weights.weights_TE[layer["layer"]].topk(2).indices
        assert [sorted(row) for row in layer["experts"]] == [sorted(row) for row in chosen_TK.tolist()]
    prompt = engine.prompter(requests[0])
    assert [token.get("patch") for token in found["tokens"] if "image" in token] == list(
        range(prompt.tokens.count(-200))
    )
    assert sum(token.get("answer", False) for token in found["tokens"]) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": Sampling(max_new_tokens=100_000)}, "positions"),
        ({"sampling": Sampling(temperature=-1.0)}, "temperature"),
        ({"sampling": Sampling(num_beams=99)}, "num_beams"),
        ({"images": ()}, None),
        ({"turns": ()}, "last turn"),
        ({"turns": (Turn(role="user", text="a"), Turn(role="user", text="b"))}, "alternate"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_before_it_is_queued(change, message):
    engine = tiny_engine(max_batch_size=2)
    request = replace(ask(0), **change)
    if message is None:  # without images the placeholder is just text
        assert list(engine.generate([request]))
        return
    with pytest.raises(DataError, match=message):
        engine.submit(request)
    assert not engine.busy
    assert isinstance(request, Request)


def film(number: int, frames: int = 4) -> tuple:
    """Frames of a video, as they are shown."""
    found = tuple(picture(10 * number + index) for index in range(frames))
    for index, frame in enumerate(found):
        frame.info[FRAME] = (index, frames)
    return found


def test_videos_of_a_tower_that_takes_them_whole_are_answered_as_in_one_pass(seen):
    """Two videos in a question, a text alone, and a second turn, whose video is not encoded again."""
    engine = tiny_engine(MoEConfig(), tower="languagebind-video-tiny", max_batch_size=3, prefix_cache=2**20)
    turns = (Turn(role="user", text=f"{'<image>' * 4} and {'<image>' * 4} are?"),)
    first = Request(id="films", turns=turns, images=(*film(1), *film(2)), sampling=Sampling(max_new_tokens=4))
    for request in (replace(ask(3, images=0), sampling=first.sampling), first):
        (completion,) = engine.generate([request])
        expected_TV = uncached(engine, request, completion.tokens)
        assert torch.stack(seen[request.id]).sub(expected_TV).abs().max() < TOLERANCE
    assert engine.forward.images_encoded == 2
    again = (*turns, Turn(role="assistant", text="films"), Turn(role="user", text=f"{'<image>' * 4} too?"))
    request = replace(first, id="again", turns=again, images=(*first.images, *film(3)))
    (completion,) = engine.generate([request])
    assert torch.stack(seen["again"]).sub(uncached(engine, request, completion.tokens)).abs().max() < TOLERANCE
    assert engine.forward.images_encoded == 3
    assert completion.num_cached_tokens > 8 * engine.model.tower.num_features, "the films of the first turn"


@pytest.mark.parametrize(("images", "what"), [((picture(1),), "a picture"), (film(1, 3), "3 frames of a video")])
def test_a_tower_for_videos_is_asked_of_nothing_else(images, what):
    engine = tiny_engine(tower="languagebind-video-tiny")
    request = Request(id="r1", turns=(Turn(role="user", text="<image>" * len(images)),), images=images)
    with pytest.raises(DataError, match=f"request r1: shows {what}, and languagebind-video-tiny attends across the 4"):
        engine.prompter(request)


@pytest.mark.parametrize("tower", ["naflex-tiny", "siglip-tiny@newline"])
def test_a_modalitys_own_tower_beside_pictures_of_different_lengths(tower, seen):
    """A depth map between two pictures that have grids, and one alone."""
    depth = replace(DEPTH, tower="clip-tiny", projector="own")
    engine = tiny_engine(MoEConfig(), tower=tower, modalities=(depth,), max_batch_size=2)
    maps = [picture(n, (50, 30)) for n in (3, 4)]
    for shown in maps:
        shown.info[MODALITY] = "depth"
    pictures = (picture(1, (60, 20)), maps[0], picture(2, (20, 70)))
    requests = [replace(ask(5, "Mixed.", images=3), images=pictures), replace(ask(6), images=(maps[1],))]
    requests.append(replace(requests[0], id="record", record_routing=True))
    for completion in engine.generate(requests):
        request = next(request for request in requests if request.id == completion.request_id)
        prompt = engine.prompter(request)
        count = prompt.features[list(prompt.modalities).index("depth")]
        assert count == (36 if engine.model.tower.native else 3 * 36), "those of its own tower, and of its own tiles"
        expected_TV = uncached(engine, request, completion.tokens)
        assert torch.stack(seen[request.id]).sub(expected_TV).abs().max() < TOLERANCE
        if completion.routing and engine.model.tower.native:
            assert completion.routing["grids"][1] == [6, 6]
