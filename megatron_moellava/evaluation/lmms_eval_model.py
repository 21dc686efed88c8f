"""A checkpoint under lmms-eval: its requests become those of inference/, its ranks those of the layout.

  python -m lmms_eval --model megatron_moellava --model_args pretrained=runs/stage3 --tasks pope --batch_size 16

lmms-eval deals the questions out to all ranks. Ranks of one tensor- or pipeline-parallel group must compute the same
questions, so they put their shares together, answer them all, and each hands back its own.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from megatron_moellava.config import ConfigError, ParallelConfig
from megatron_moellava.data.sample import Turn
from megatron_moellava.evaluation.generation import completions
from megatron_moellava.evaluation.visuals import shown
from megatron_moellava.inference.load import load_for_inference
from megatron_moellava.inference.requests import Request, Sampling

from megatron.core import parallel_state

_HARNESS_STOP = "\n\n"  # lmms-eval's few-shot delimiter, given where a task names no stop; LLaVA's answers may hold it
_ONLY_GENERATES = "megatron_moellava generates answers; choose the task's generate_until variant instead of {}"


class MegatronMoELlava(lmms):
    """The model `megatron_moellava` of lmms-eval."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 16,
        tokenizer: str = "",
        template: str = "",
        precision: str = "",
        image_aspect_ratio: str = "model",
        max_new_tokens: int = 1024,
        max_batch_size: int | None = None,
        device: str | None = None,
        **layout: Any,
    ) -> None:
        """`pretrained`: a checkpoint folder. `max_new_tokens`: where a task does not say. `layout`: fields of
        ParallelConfig. lmms-eval always passes max_batch_size and device; the engine and the layout decide those."""
        super().__init__()
        if unknown := sorted(set(layout) - set(ParallelConfig.__dataclass_fields__)):
            raise ConfigError(f"model_args: {unknown[0]} is neither an argument nor a field of parallel")
        if not str(batch_size).isdigit():
            raise ConfigError(f"batch_size={batch_size!r} must be a number: how many questions are answered at once")
        self.image_aspect_ratio, self.max_new_tokens = image_aspect_ratio, max_new_tokens
        self.engine = load_for_inference(
            pretrained,
            tokenizer=tokenizer,
            template=template,
            precision=precision,
            layout=ParallelConfig(**layout),
            max_batch_size=int(batch_size),
        )
        self.device = next(self.engine.model.parameters()).device  # lmms-eval's own collectives use it
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answers to this rank's requests, in their order. Collective."""
        found: dict[str, GenerationResult] = {}
        bar = tqdm(total=len(requests), desc="megatron_moellava", unit="question", disable=self.rank > 0)
        mine = (self._request(number, instance.args) for number, instance in enumerate(requests))
        for completion in completions(self.engine, _of_the_group(mine, len(requests))):
            found[completion.request_id] = GenerationResult(
                text=completion.text.strip(),
                token_counts=TokenCounts(
                    input_tokens=completion.num_prompt_tokens, output_tokens=len(completion.tokens)
                ),
            )
            bar.update(completion.request_id.startswith(f"{self.rank}-"))
        bar.close()
        return [found[f"{self.rank}-{number}"] for number in range(len(requests))]

    def _request(self, number: int, arguments: tuple) -> Request:
        context, options, doc_to_visual, doc_id, task, split = arguments
        return make_request(
            f"{self.rank}-{number}",
            context,
            doc_to_visual(self.task_dict[task][split][doc_id]) or (),
            {"max_new_tokens": self.max_new_tokens} | options,
            self.image_aspect_ratio,
            self.engine.prompter.data,
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: raises ConfigError."""
        raise ConfigError(_ONLY_GENERATES.format("multiple_choice or loglikelihood"))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: raises ConfigError."""
        raise ConfigError(_ONLY_GENERATES.format("generate_until_multi_round"))


def make_request(id: str, context: str, visuals: Sequence, options: dict, image_aspect_ratio: str, data) -> Request:
    """Pictures and videos stand before the text, as in moellava evaluate, unless the text says itself where they belong.

    `data`: DataConfig of the checkpoint. Raises DataError for what is neither.
    """
    text, images = shown(id, context, visuals, data)
    return Request(
        id=id,
        turns=(Turn(role="user", text=text),),
        images=images,
        sampling=_sampling(options),
        image_aspect_ratio=image_aspect_ratio,
    )


def _sampling(options: dict) -> Sampling:
    """Options of Hugging Face's `generate`, as tasks give them: do_sample=False means greedy whatever else stands."""
    until = options.get("until") or ()
    until = (until,) if isinstance(until, str) else until
    greedy = options.get("do_sample") is False or not options.get("temperature")
    return Sampling(
        max_new_tokens=int(options["max_new_tokens"]),
        temperature=0.0 if greedy else float(options["temperature"]),
        top_p=float(options.get("top_p") or 1.0),
        num_beams=int(options.get("num_beams") or 1),
        stop=tuple(stop for stop in until if stop not in ("", _HARNESS_STOP)),
    )


def _of_the_group(mine: Iterator[Request], count: int) -> Iterator[Request]:
    """Requests of all ranks of the model-parallel group, in one order on all of them, each opened when it is needed."""
    group = parallel_state.get_model_parallel_group()
    counts = [count] * group.size()
    dist.all_gather_object(counts, count, group=group)
    for _ in range(max(counts)):
        box: list[Request | None] = [None] * group.size()
        dist.all_gather_object(box, next(mine, None), group=group)
        yield from (request for request in box if request is not None)
