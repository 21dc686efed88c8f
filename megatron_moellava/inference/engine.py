"""Continuous batching: each step is one forward pass over whole prompts of new requests and one token of running ones.

A request enters as soon as a cache row is free and leaves when it ends; nobody waits for the longest of a batch, and no
row is padded. Rows stay dense: the last one moves into a gap. Requests do not influence each other: experts have room for
every token, except that a prompt whose gate can drop tokens (the original router with more experts than its evaluation
capacity covers) gets a step of its own, as if it had come alone.

All ranks of a model-parallel group run the same engine on the same requests; the last stage chooses and tells the others.
Data-parallel ranks have requests of their own, and where experts are shared between them they step together until all
are done; or, `replicated`, all ranks follow the same requests (serving).
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import count

import torch
import torch.distributed as dist

from megatron_moellava import platform
from megatron_moellava.config import DataError
from megatron_moellava.inference.cache_memory import GIB, CacheMemory
from megatron_moellava.inference.forward import Forward
from megatron_moellava.inference.grammar import Grammars
from megatron_moellava.inference.prefix_cache import PrefixCache
from megatron_moellava.inference.prompts import Prompt, Prompter
from megatron_moellava.inference.request_state import RequestState, answers_to
from megatron_moellava.inference.requests import Completion, Event, Request, check_sampling
from megatron_moellava.inference.sampling import Beam, Choice, likeliest_tokens
from megatron_moellava.model.experts import GroupedLinear
from megatron_moellava.model.kv_cache import KVCache, Step
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.model.original_gate import OriginalGate
from megatron_moellava.routing.token_weights import TokenWeights

from megatron.core import parallel_state


class Engine:
    """Requests in, events out, one `step` at a time; every rank of a model-parallel group makes the same calls."""

    def __init__(
        self,
        model: MoELlava,
        prompter: Prompter,
        *,
        max_batch_size: int = 32,
        max_sequence_length: int = 0,
        max_prompt_tokens: int = 8192,
        memory_limit: float | None = None,
        prefix_cache: float = 0.0,
        replicated: bool = False,
        seed: int = 0,
    ):
        """`max_sequence_length`: prompt and answer of one request, 0: all positions of the model. `max_prompt_tokens`: new
        prompts of one step together (a longer single prompt gets a step of its own). `memory_limit`: GiB that keys and
        values of all running requests may take on each rank; None: on a GPU most of what is free beside the weights, else
        no limit. Requests that do not fit beside the running ones wait. `prefix_cache`: GiB beside it for those of answered
        conversations, whose next turn then reads only what is new. Collective."""
        limit = model.backbone.max_position_embeddings
        self.model, self.prompter, self.replicated, self.seed = (
            model.eval().requires_grad_(False),
            prompter,
            replicated,
            seed,
        )
        self.max_batch_size, self.max_prompt_tokens = max_batch_size, max_prompt_tokens
        self.max_sequence_length = min(max_sequence_length or limit, limit)
        self.cache = KVCache(max_batch_size, self.max_sequence_length)
        self.memory = CacheMemory.of(model, memory_limit)
        self.forward = Forward(model, self.cache, prompter.tokenizer.vocab_size)
        self.token_weights = TokenWeights(model)
        self.grammars = Grammars(prompter.tokenizer, prompter.stop_ids)
        self.waiting: deque[tuple[RequestState, ...]] = deque()  # the answers of each request
        self.rows: list[RequestState] = []  # owner of each cache row in use
        self.steps = self.generated_tokens = self.read_tokens = self.cached_tokens = 0
        self._numbers = count()
        self._gates = [module for module in model.modules() if isinstance(module, OriginalGate)]
        kept = 0.0 if self._prompts_go_alone() else prefix_cache * GIB  # what a gate drops depends on the whole prompt
        depends = not model.run.model.scale_multimodal_embeddings
        self.prefixes = PrefixCache(kept, self.memory.bytes_per_position, words_depend_on_images=depends)
        for module in model.modules():
            if isinstance(module, GroupedLinear):
                module.fuse()

    # --- what callers use -------------------------------------------------------------------------------------------

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """The completions of each request, one per answer that it asks for, each as soon as it is finished."""
        for request in requests:
            self.submit(request)
        while self.anyone_busy():
            yield from (event.completion for event in self.step() if event.completion is not None)

    def stream(self, request: Request) -> Iterator[Event]:
        """The events of one request."""
        self.submit(request)
        while self.anyone_busy():
            yield from (event for event in self.step() if event.request_id == request.id)

    def submit(self, request: Request, prompt: Prompt | None = None) -> None:
        """Queue a request. `prompt`: what `prepare` made of it. Raises DataError when it cannot be answered."""
        prompt = prompt or self.prepare(request)
        seed = self.seed + 7919 * next(self._numbers)
        self.waiting.append(answers_to(request, prompt, self.prompter, self.grammars, seed))

    def fit(self, request: Request) -> tuple[Request, Prompt]:
        """`prepare`, with an answer no longer than the room that the prompt leaves. Raises DataError when it leaves none."""
        prompt = self.prompter(request)
        room = self.max_sequence_length - len(prompt.tokens)
        if room < 1:
            raise DataError(
                f"the conversation has {len(prompt.tokens)} tokens, and this model's {self.max_sequence_length} positions "
                "are full; begin a new one"
            )
        tokens = min(request.sampling.max_new_tokens, room)
        request = replace(request, sampling=replace(request.sampling, max_new_tokens=tokens))
        return request, self.prepare(request, prompt)

    def prepare(self, request: Request, prompt: Prompt | None = None) -> Prompt:
        """Tokens and pixels; may run in another thread than the engine. Raises DataError when it does not fit."""
        sampling = request.sampling
        check_sampling(sampling, self.max_batch_size)
        prompt = prompt or self.prompter(request)
        needed = len(prompt.tokens) + sampling.max_new_tokens
        if needed > self.max_sequence_length:
            raise DataError(
                f"prompt of {len(prompt.tokens)} tokens and max_new_tokens={sampling.max_new_tokens} exceed the "
                f"{self.max_sequence_length} positions of this model; ask for fewer tokens or send a shorter prompt"
            )
        self.memory.check(sampling.num_beams * sampling.n, needed)
        if sampling.json_schema:
            self.grammars.start(sampling.json_schema)
        return prompt

    def cancel(self, request_id: str) -> None:
        """Forget a request; it gives no more events."""
        self.waiting = deque(item for item in self.waiting if item[0].request.id != request_id)
        for running in self._running():
            if running.request.id == request_id:
                self._release(running)

    @property
    def busy(self) -> bool:
        """Whether there is a request that has not ended."""
        return bool(self.waiting or self.rows)

    def anyone_busy(self) -> bool:
        """Whether this rank must step: it has work, or another rank's tokens may need its experts."""
        if not self._steps_together():
            return self.busy
        flag = torch.tensor(int(self.busy), device=platform.device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    # --- a step -----------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """One forward pass, and what it made certain."""
        admitted = self._admit()
        decoding = [] if admitted and self._prompts_go_alone() else list(self.rows)
        if not admitted and not decoding:
            self._step_for_others()
            return []
        logits_LV = self._run(admitted, decoding)
        self.steps += 1
        begun = [running for answers in admitted for running in answers]
        for running in begun:
            self.rows += [running] * running.width
        order = begun + list({id(running): running for running in decoding}.values())
        choices = self._agree(self._choose(logits_LV, admitted, decoding) if logits_LV is not None else None)
        events = [self._advance(running, choice) for running, choice in zip(order, choices, strict=True)]
        return [event for event in events if event is not None]

    def _admit(self) -> list[tuple[RequestState, ...]]:
        """Requests whose prompts join this step, with the cache rows of their answers."""
        admitted: list[tuple[RequestState, ...]] = []
        tokens, used = 0, len(self.rows)
        longest = max((running.most_tokens for running in self.rows), default=0)
        while self.waiting:
            answers = self.waiting[0]
            width = sum(running.width for running in answers)
            if used + width > self.max_batch_size:
                break
            longest = max(longest, answers[0].most_tokens)
            if used and not self.memory.fits(used + width, longest):
                break
            tokens += len(answers[0].prompt.tokens)
            if admitted and (tokens > self.max_prompt_tokens or self._prompts_go_alone()):
                break
            for running in answers:
                running.rows = list(range(used, used + running.width))
                used += running.width
            admitted.append(self.waiting.popleft())
        return admitted

    def _prompts_go_alone(self) -> bool:
        return any(
            gate.moe.eval_capacity_factor * gate.moe.moe_router_topk < gate.moe.num_moe_experts
            for gate in self._gates[:1]
        )

    def _run(
        self, admitted: Sequence[tuple[RequestState, ...]], decoding: Sequence[RequestState]
    ) -> torch.Tensor | None:
        """A request's prompt runs once, in the first of its rows; the others get copies."""
        prompts = [answers[0].prompt for answers in admitted]
        pasts = tuple(self.prefixes.past(answers) for answers in admitted)
        places = [
            range(past.length if past else 0, len(prompt.tokens)) for prompt, past in zip(prompts, pasts, strict=True)
        ]
        positions = [position for place in places for position in place]
        self.read_tokens += len(positions)
        self.cached_tokens += sum(past.length for past in pasts if past)
        positions += self.cache.lengths_R[: len(decoding)]
        step = Step(
            prompts=tuple((answers[0].rows[0], len(place)) for answers, place in zip(admitted, places, strict=True)),
            pasts=pasts,
            decoding=len(decoding),
            positions_T=torch.tensor(positions, device=platform.device()),
        )
        tokens = [running.next_tokens()[running.rows.index(row)] for row, running in enumerate(decoding)]
        for gate in self._gates:
            gate.drops = bool(admitted) and self._prompts_go_alone()
        recorded = any(running.record for running in (*(answers[0] for answers in admitted), *decoding))
        with self.token_weights.recording() if recorded else nullcontext():
            logits_LV = self.forward(step, prompts, tokens, [running.has_images for running in decoding])
        if recorded:
            self._record(admitted, [len(place) for place in places], decoding)
        for answers in admitted:
            first, *others = [row for running in answers for row in running.rows]
            for row in others:
                self.cache.copy_row(first, row)
        return logits_LV

    def _record(
        self,
        admitted: Sequence[tuple[RequestState, ...]],
        lengths: Sequence[int],
        decoding: Sequence[RequestState],
    ) -> None:
        start = 0
        parts = [*zip(admitted, lengths, strict=True), *(((running,), 1) for running in decoding)]
        for answers, length in parts:
            for running in answers:
                if running.record and running.beams is None:
                    running.record.add(self.token_weights.weights_TE, slice(start, start + length))
            start += length

    def _choose(
        self,
        logits_LV: torch.Tensor,
        admitted: Sequence[tuple[RequestState, ...]],
        decoding: Sequence[RequestState],
    ) -> list:
        """A choice for each answer: those of requests admitted, then the others by their first row."""
        likeliest = likeliest_tokens(logits_LV)
        choices = [
            running.choose(logits_LV[line : line + 1], likeliest[line])
            for line, answers in enumerate(admitted)
            for running in answers
        ]
        first = len(admitted)
        for running in {id(running): running for running in decoding}.values():
            line = first + running.rows[0]
            logits_KV = (
                logits_LV[line : line + 1] if running.width == 1 else logits_LV[[first + row for row in running.rows]]
            )
            choices.append(running.choose(logits_KV, likeliest[line]))
        return choices

    def _advance(self, running: RequestState, choice: Choice | list[Beam]) -> Event | None:
        delta, sources = running.accept(choice)
        self.generated_tokens += 1
        if running.finish_reason:
            self._release(running)
            event = running.complete()
            return replace(event, delta=delta + event.delta)
        if sources:
            self.cache.reorder(running.rows, [running.rows[source] for source in sources])
        if not delta:
            return None
        logprobs = running.certain_logprobs()
        return Event(request_id=running.request.id, index=running.index, delta=delta, logprobs=logprobs)

    def _release(self, running: RequestState) -> None:
        """Give its rows back; the last rows move into the gaps."""
        self.prefixes.remember(running, self.cache)
        for row in sorted(running.rows, reverse=True):
            last = len(self.rows) - 1
            if row != last:
                owner = self.rows[row] = self.rows[last]
                owner.rows[owner.rows.index(last)] = row
                self.cache.copy_row(last, row)
            self.rows.pop()
        running.rows = []

    def _running(self) -> list[RequestState]:
        return list({id(running): running for running in self.rows}.values())

    # --- several ranks ----------------------------------------------------------------------------------------------

    def _agree(self, choices: list | None) -> list:
        """The last stage's choices, on every rank that runs the same requests."""
        group = None if self.replicated else parallel_state.get_model_parallel_group()
        size = dist.get_world_size() if group is None else group.size()
        if size == 1:
            assert choices is not None
            return choices
        ranks = range(size) if group is None else dist.get_process_group_ranks(group)
        box: list = [choices]
        dist.broadcast_object_list(box, src=ranks[-1], group=group)
        return box[0]

    def _steps_together(self) -> bool:
        shares_experts = parallel_state.get_expert_model_parallel_world_size() > 1
        return shares_experts and not self.replicated and parallel_state.get_data_parallel_world_size() > 1

    def _step_for_others(self) -> None:
        """A forward pass of one idle token: the experts of this rank serve other ranks' tokens."""
        self.cache.lengths_R[0] = 0
        step = Step(prompts=(), decoding=1, positions_T=torch.zeros(1, dtype=torch.int64, device=platform.device()))
        self.forward(step, [], [self.prompter.tokenizer.eos_id], [False])
