"""One forward pass of a step over the pipeline: embeddings on the first stage, logits on the last.

All ranks of a model-parallel group call it with the same step. Shapes: T tokens, N images, F visual tokens, D width, L
rows of logits (one for each prompt and each single token), V vocabulary.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_moellava import parallel, platform
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.inference.fast_decoder import FastDecoder, can_decode_fast
from megatron_moellava.inference.prompts import Prompt
from megatron_moellava.model.kv_cache import KVCache, Step
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.model.pooling import pooled
from megatron_moellava.routers import knows_modality

from megatron.core import parallel_state

REMEMBERED_IMAGES = 64  # visual tokens kept: the turns of a conversation encode their images once


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One image of a prompt."""

    digest: bytes  # of its pixels, and of its grid
    tiles_NCHW: torch.Tensor
    grid: tuple[int, ...] | None  # how its tokens lie (`Plan.grid`), of towers that have that
    features: int  # visual tokens
    block: int = 1  # of pooled frames: side of the blocks of visual tokens that become one
    way: str = ""  # its modality, if that is apart


@dataclass(slots=True)
class Forward:
    """The model with its cache, called once per step; keeps the visual tokens of recent images."""

    model: MoELlava
    cache: KVCache
    vocab_size: int  # of the tokenizer; the model's may be larger, and nothing can be said with the rest
    features: OrderedDict[bytes, torch.Tensor] = field(default_factory=OrderedDict)  # digest of an image's pixels
    images_encoded: int = 0
    fast_decoder: FastDecoder | None = None

    def __post_init__(self) -> None:
        if can_decode_fast():
            self.fast_decoder = FastDecoder(self.model)

    @torch.no_grad()
    def __call__(
        self, step: Step, prompts: Sequence[Prompt], tokens: Sequence[int], has_images: Sequence[bool]
    ) -> torch.Tensor | None:
        """Logits [L, V] on the last stage, else None. `tokens` continue rows 0, 1, ... and `has_images` belongs to them."""
        self.cache.begin(step)
        embeddings_T1D = None
        starts = [past.length if past else 0 for _, _, past in step.prompts_with_pasts()]
        asked = knows_modality(self.model.run.moe)
        is_image_1T = _is_image(prompts, starts, len(tokens)) if asked else None
        if parallel.is_first_stage():
            parts = [*self._embed_prompts(prompts, starts), *self._embed_tokens(tokens, has_images)]
            embeddings_T1D = torch.cat(parts, dim=0)
        else:
            self._receive(len(step.positions_T))
        if self.fast_decoder is not None and embeddings_T1D is not None:  # all stages are here
            marks_1T2 = self.model.router_mask(None, is_image_1T)
            return self.fast_decoder(embeddings_T1D, self.cache, marks_1T2)[:, : self.vocab_size]
        output = self.model(
            tokens_BS=None,
            position_ids_BS=None,
            embeddings_SBD=embeddings_T1D,
            inference_context=self.cache,
            is_image_BS=is_image_1T,
        )
        if parallel.is_last_stage():
            return output[0, :, : self.vocab_size]  # [1, L, V]: Megatron's order ends here
        dist.send(output.contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank())
        return None

    def _embed_prompts(self, prompts: Sequence[Prompt], starts: Sequence[int]) -> list[torch.Tensor]:
        """Embeddings [T, 1, D] of each prompt from its start on."""
        images = [_images(prompt, start) for prompt, start in zip(prompts, starts, strict=True)]
        self._encode({image.digest: image for own in images for image in own})
        embedded = []
        for prompt, start, own in zip(prompts, starts, images, strict=True):
            tokens_1T = torch.tensor([prompt.tokens[start:]], device=platform.device())
            features = [self.features[image.digest] for image in own]
            features_NFD = torch.cat([part.flatten(0, -2) for part in features]) if features else None
            embedded.append(self.model.embed(tokens_1T, None, features_NFD, has_images=bool(prompt.tiles)))
        while len(self.features) > REMEMBERED_IMAGES:
            self.features.popitem(last=False)
        return embedded

    def _encode(self, images: dict[bytes, Picture]) -> None:
        """Remember the visual tokens [N, F, D] of images by their digests (of towers that `has_grids`: [F, D]).

        Those not known yet go through their tower at once.
        """
        unknown = {digest: image for digest, image in images.items() if digest not in self.features}
        if self._anyone_encodes(bool(unknown)) and not unknown:
            self.model.meet_at_experts()
        for way in dict.fromkeys(image.way for image in unknown.values()):
            new = {digest: image for digest, image in unknown.items() if image.way == way}
            pixels_NCHW = torch.cat([image.tiles_NCHW for image in new.values()])
            pixels_NCHW = pixels_NCHW.to(platform.device(), self.model.config.params_dtype)
            grids = tuple(image.grid for image in new.values() if image.grid is not None)
            features = self.model.encode_images(pixels_NCHW, grids, way)
            counts = [image.features if grids else len(image.tiles_NCHW) for image in new.values()]
            for (digest, image), own in zip(new.items(), features.split(counts), strict=True):
                own = own if image.block == 1 else pooled(own, ((len(own), image.block),))
                self.features[digest] = own.clone()  # not a view, which would keep all of them
            self.images_encoded += len(new)
        for digest in images:
            self.features.move_to_end(digest)

    def _anyone_encodes(self, mine: bool) -> bool:
        """Whether a rank that shares the tower's or the projector's experts with this one has new images in this step."""
        if not self.model.shares_experts_of("tower", "projector"):
            return mine
        flag = torch.tensor(int(mine), device=platform.device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=parallel_state.get_expert_model_parallel_group())
        return bool(flag)

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

    def _receive(self, count: int) -> None:
        config = self.model.config
        hidden_T1D = torch.empty(count, 1, config.hidden_size, dtype=config.params_dtype, device=platform.device())
        dist.recv(hidden_T1D, src=parallel_state.get_pipeline_model_parallel_prev_rank())
        self.model.set_input_tensor(hidden_T1D)


def _is_image(prompts: Sequence[Prompt], starts: Sequence[int], tokens: int) -> torch.Tensor:
    """[1, T] of a step: prompts from their starts on, then `tokens` of answers."""
    parts = [prompt.tokens[start:] for prompt, start in zip(prompts, starts, strict=True)]
    is_image = [token == IMAGE_TOKEN for part in parts for token in part] + [False] * tokens
    return torch.tensor([is_image], device=platform.device())


def _images(prompt: Prompt, start: int) -> list[Picture]:
    """The images of a prompt whose visual tokens do not come before position `start`."""
    before, found = prompt.tokens[:start].count(IMAGE_TOKEN), []
    for number, tiles_NCHW in enumerate(prompt.parts):
        if before > 0:
            before -= prompt.widths[number]
            continue
        grid = (prompt.grids[number] or None) if prompt.grids else None
        block = prompt.blocks[number] if prompt.blocks else 1
        features, way = prompt.features[number] if grid else 0, prompt.way(number)
        found.append(Picture(prompt.digests[number], tiles_NCHW, grid, features, block, way))
    assert before == 0, "a prompt is not cut within a picture"
    return found
