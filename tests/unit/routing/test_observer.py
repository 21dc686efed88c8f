"""Several watch the same routers at once: each sees what it would see alone, whoever stops first."""

from contextlib import ExitStack, nullcontext

import pytest
import torch

from megatron_moellava.inference.engine import Engine
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.routing.observer import RouterCall, RoutingObserver, is_observed
from megatron_moellava.routing.statistics import RoutingStatistics
from megatron_moellava.routing.token_weights import TokenWeights
from tests.helpers.batches import words
from tests.helpers.inference_models import GATES, ask, tiny_engine

ROUTERS = ["megatron", "one choice", "balanced by a bias", "original without noise", "original, one choice"]


def routers(engine: Engine) -> list:
    return list(RoutingObserver([engine.model]).routers.values())


def run(engine: Engine) -> torch.Tensor:
    with torch.no_grad():
        return engine.model(**(model_inputs(words()) | {"labels_BS": None}))


def counted(engine: Engine, also=nullcontext) -> torch.Tensor:
    """The statistics of one forward pass, alone or beside another observation."""
    statistics = RoutingStatistics([engine.model])
    with also(), statistics.count(words()), also():
        run(engine)
    return statistics.collect().sums_GLC


@pytest.mark.parametrize("gate", ROUTERS)
def test_a_served_request_is_recorded_while_a_training_observation_runs(gate):
    engine = tiny_engine(GATES[gate])
    (alone,) = engine.generate([ask(0, record_routing=True)])
    calls: list[int] = []
    with RoutingObserver([engine.model]).watch(lambda call: calls.append(call.layer)):
        (beside,) = engine.generate([ask(0, record_routing=True)])
        unrecorded = len(calls)
        list(engine.generate([ask(0)]))  # nothing is recorded: the other observation goes on
    assert beside.routing == alone.routing
    assert unrecorded == len(calls) - unrecorded == 2 * len(alone.tokens)
    assert not any(is_observed(router) for router in routers(engine))


@pytest.mark.parametrize("gate", ROUTERS)
def test_statistics_and_token_weights_are_what_each_is_alone(gate):
    engine = tiny_engine(GATES[gate])
    weights = TokenWeights(engine.model)
    sums_GLC = counted(engine)
    with weights.recording():
        run(engine)
    expected = weights.weights_TE
    assert torch.equal(counted(engine, weights.recording), sums_GLC)
    assert weights.weights_TE.keys() == expected.keys() == {0, 2}
    assert all(torch.equal(weights.weights_TE[layer], expected[layer]) for layer in expected)


@pytest.mark.parametrize("first_out", [0, 1, 2])
def test_observers_stop_in_any_order(first_out):
    engine = tiny_engine(GATES["megatron"])
    observer = RoutingObserver([engine.model])
    seen: list[list[int]] = [[], [], []]
    watching = [ExitStack() for _ in seen]
    for own, stack in zip(seen, watching, strict=True):
        stack.enter_context(observer.watch(lambda call, own=own: own.append(call.layer)))
    run(engine)
    for number in (first_out, (first_out + 1) % 3, (first_out + 2) % 3):
        watching[number].close()
        run(engine)
    assert sorted(len(own) for own in seen) == [2, 4, 6]
    assert len(seen[first_out]) == 2
    assert not any(is_observed(router) or router._forward_hooks for router in routers(engine))


def test_an_observer_that_fails_leaves_no_hook_behind():
    engine = tiny_engine(GATES["original without noise"])

    def broken(call: RouterCall) -> None:
        raise ValueError("the subscriber's own fault")

    with pytest.raises(ValueError, match="own fault"), RoutingObserver([engine.model]).watch(broken):
        run(engine)
    assert not any(is_observed(router) or router.gate._forward_hooks for router in routers(engine))
    assert counted(engine).any()


def test_the_fast_decoder_asks_the_module_only_while_somebody_watches():
    engine = tiny_engine(GATES["megatron"])
    called: list = []
    for router in routers(engine):
        router.register_forward_pre_hook(lambda *arguments: called.append(arguments))
    (alone,) = engine.generate([ask(0)])
    assert called == []
    with RoutingObserver([engine.model]).watch(lambda call: None):
        (watched,) = engine.generate([ask(0)])
    assert called
    assert watched.tokens == alone.tokens


@pytest.mark.parametrize("gate", ROUTERS)
def test_a_call_tells_the_logits_and_choices_that_the_router_used(gate):
    engine = tiny_engine(GATES[gate])
    calls: list[tuple] = []

    def keep(call: RouterCall) -> None:
        calls.append((call.logits_NE, call.asked_NE, call.map_NE, call.weights_NE, call.router.topk))

    with RoutingObserver([engine.model]).watch(keep):
        run(engine)
    for logits_NE, asked_NE, map_NE, weights_NE, topk in calls:
        assert logits_NE.shape == asked_NE.shape == map_NE.shape == weights_NE.shape
        assert (asked_NE.sum(dim=1) == topk).all()
        assert (asked_NE | ~map_NE).all()
        assert torch.equal(weights_NE > 0, map_NE)
        if gate.startswith(("megatron", "one", "original")):  # the best logit is asked for first
            assert asked_NE.gather(1, logits_NE.argmax(dim=1, keepdim=True)).all()
