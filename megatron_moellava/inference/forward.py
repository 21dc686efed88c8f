"""One forward pass of a step over the pipeline: embeddings on the first stage, logits on the last.

All ranks of a model-parallel group call it with the same step. Shapes: T tokens, N images, F visual tokens, D width, L
rows of logits (one for each prompt and each single token), V vocabulary.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_moellava import parallel, platform
from megatron_moellava.inference.prompts import Prompt
from megatron_moellava.inference.straight import StraightDecoder, can_go_straight
from megatron_moellava.model.kv_cache import KVCache, Step
from megatron_moellava.model.moe_llava import MoELlava

from megatron.core import parallel_state

REMEMBERED_IMAGES = 64  # visual tokens kept: the turns of a conversation encode their images once


@dataclass(slots=True)
class Forward:
    model: MoELlava
    cache: KVCache
    vocab_size: int  # of the tokenizer; the model's may be larger, and nothing can be said with the rest
    features: OrderedDict[bytes, torch.Tensor] = field(default_factory=OrderedDict)  # digest of an image's pixels
    images_encoded: int = 0
    straight: StraightDecoder | None = None

    def __post_init__(self) -> None:
        if can_go_straight():
            self.straight = StraightDecoder(self.model)

    @torch.no_grad()
    def __call__(
        self, step: Step, prompts: Sequence[Prompt], tokens: Sequence[int], has_images: Sequence[bool]
    ) -> torch.Tensor | None:
        """Logits [L, V] on the last stage, else None. `tokens` continue rows 0, 1, ... and `has_images` belongs to them."""
        self.cache.begin(step)
        embeddings_T1D = None
        if parallel.is_first_stage():
            embeddings_T1D = torch.cat(
                [*map(self._embed_prompt, prompts), *self._embed_tokens(tokens, has_images)], dim=0
            )
        else:
            self._receive(len(step.positions_T))
        if self.straight is not None:
            return self.straight(embeddings_T1D, self.cache)[:, : self.vocab_size]
        output = self.model(
            tokens_BS=None, position_ids_BS=None, embeddings_SBD=embeddings_T1D, inference_context=self.cache
        )
        if parallel.is_last_stage():
            return output[0, :, : self.vocab_size]  # [1, L, V]: Megatron's order ends here
        dist.send(output.contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank())
        return None

    def _embed_prompt(self, prompt: Prompt) -> torch.Tensor:
        tokens_1T = torch.tensor([prompt.tokens], device=platform.device())
        parts = prompt.pixels_NCHW.split(prompt.tiles) if prompt.tiles else ()
        features = [self._encode(pixels_NCHW) for pixels_NCHW in parts]
        return self.model.embed(tokens_1T, None, torch.cat(features) if features else None)

    def _embed_tokens(self, tokens: Sequence[int], has_images: Sequence[bool]) -> list[torch.Tensor]:
        """[] or [embeddings [T, 1, D]]: rows with and without images may be scaled differently."""
        if not tokens:
            return []
        tokens_1T = torch.tensor([tokens], device=platform.device())
        if all(has_images) or not any(has_images):
            return [self.model.embed(tokens_1T, None, has_images=has_images[0])]
        choose_T11 = torch.tensor(has_images, device=tokens_1T.device)[:, None, None]
        without, within = (self.model.embed(tokens_1T, None, has_images=which) for which in (False, True))
        return [torch.where(choose_T11, within, without)]

    def _encode(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """Visual tokens [N, F, D] of one image (several tiles), remembered."""
        key = hashlib.sha256(pixels_NCHW.numpy().tobytes()).digest()
        if key not in self.features:
            dtype = self.model.config.params_dtype
            self.features[key] = self.model.encode_images(pixels_NCHW.to(platform.device(), dtype))
            self.images_encoded += 1
            if len(self.features) > REMEMBERED_IMAGES:
                self.features.popitem(last=False)
        self.features.move_to_end(key)
        return self.features[key]

    def _receive(self, count: int) -> None:
        config = self.model.config
        hidden_T1D = torch.empty(count, 1, config.hidden_size, dtype=config.params_dtype, device=platform.device())
        dist.recv(hidden_T1D, src=parallel_state.get_pipeline_model_parallel_prev_rank())
        self.model.set_input_tensor(hidden_T1D)
