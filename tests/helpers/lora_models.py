"""Tiny models of transformers with adapters of `peft`, and our own beside them: the same weights and rows on both sides."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import RunConfig, from_dict, set_override
from megatron_moellava.conversion.adapters import lines
from megatron_moellava.conversion.huggingface import as_transformers
from megatron_moellava.conversion.layout import OWN
from megatron_moellava.costs.adapters import PREFIX
from megatron_moellava.costs.shapes import Model
from megatron_moellava.data.batch import Batch
from megatron_moellava.data.encode import IGNORE_INDEX, IMAGE_TOKEN
from megatron_moellava.training.loop import Trainer
from tests.helpers.batches import Repeated

LENGTH, VISUAL, SIDE = 24, 16, 28  # of a row, of a picture, of its sides
# A large epsilon: where a gradient is nothing but rounding, Adam would blow the rounding up to a full step.
LR, DECAY, EPS = 1e-3, 0.1, 1e-4


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Two rows; with `pictures` the first sixteen places of each are a picture."""

    pictures: bool
    vocabulary: int

    def tokens(self, image_token: int) -> torch.Tensor:
        tokens_BS = torch.randint(3, self.vocabulary, (2, LENGTH), generator=torch.Generator().manual_seed(3))
        if self.pictures:
            tokens_BS[:, :VISUAL] = image_token
        return tokens_BS

    @property
    def labels(self) -> torch.Tensor:
        labels_BS = self.tokens(IGNORE_INDEX).roll(-1, 1)
        labels_BS[:, -1] = IGNORE_INDEX
        return labels_BS

    @property
    def pixels(self) -> torch.Tensor:
        shape = (2 if self.pictures else 0, 3, SIDE, SIDE)
        return torch.randn(shape, generator=torch.Generator().manual_seed(4))

    def batch(self) -> Batch:
        tokens_BS = self.tokens(IMAGE_TOKEN)
        return Batch(
            tokens_BS=tokens_BS,
            labels_BS=self.labels,
            position_ids_BS=torch.arange(LENGTH).expand_as(tokens_BS),
            padding_mask_BS=torch.ones_like(tokens_BS, dtype=torch.bool),
            cu_seqlens=None,
            max_seqlen=LENGTH,
            pixel_values_NCHW=self.pixels,
            sample_ids=[],
            tags=["", ""],
        )


def lora_run(base: Path, save: Path, **more) -> RunConfig:
    """A run with adapters on `base`, without a loss that transformers does not have."""
    folder, described = require_checkpoint(base), read_description(require_checkpoint(base)).model
    tree: dict = {"moe": described["moe"] and described["moe"] | {"moe_aux_loss_coeff": 0.0}}
    settings = {
        "model.backbone": str(folder),
        "model.tower": str(folder),
        "data.packing": False,
        "data.seq_length": LENGTH,
        "training.stage": 2,
        "training.precision": "fp32",
        "training.micro_batch_size": 2,
        "training.global_batch_size": 2,
        "optimizer.lr": LR,
        "optimizer.lr_decay_style": "constant",
        "optimizer.lr_warmup_fraction": 0.0,
        "optimizer.weight_decay": DECAY,
        "optimizer.adam_eps": EPS,
        "optimizer.clip_grad": 0.0,
        "checkpoint.load": str(base),
        "checkpoint.save": str(save),
        "logging.tensorboard": False,
    }
    for name, value in (settings | more).items():
        set_override(tree, name, value)
    return from_dict(RunConfig, tree)


def started(run: RunConfig, rows: Rows) -> Trainer:
    """A trainer whose B's are not zero, so that every A has a gradient at once."""
    trainer = Trainer(run, None, 10)
    trainer.loader = Repeated([rows.batch()])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in trainer.chunks[0].adapters.named_parameters():
            if not name.endswith(".a"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    trainer.optimizer.reload_model_params()
    for chunk in trainer.wrapped:
        chunk.train()
    return trainer


def step_with_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """One step; the gradients before it, by the names of `peft`."""
    model = trainer.chunks[0]
    kept: dict[str, torch.Tensor] = {}
    update = trainer.update

    def keep():
        for adapter in model.adapters:
            for name, parameter in adapter.named_parameters():
                kept[f"{PREFIX}{adapter.adapted.name}.{name}"] = parameter.main_grad.clone().flatten()
        trainer.update = update
        return update()

    trainer.update = keep
    _, applied, _ = trainer.step()
    assert applied
    whole = as_transformers(Model(backbone=model.backbone, tower=model.tower, moe=trainer.run.moe))
    return {
        line.name: kept[line.part.source][line.part.start :][: line.part.count].view(line.shape)
        for line in lines(whole, trainer.run.training.lora, OWN)
    }


class Theirs:
    """A model of `peft` that trains as ours does."""

    def __init__(self, model: torch.nn.Module, rows: Rows):
        self.model, self.rows = model.train(), rows
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices, vectors = ([p for p in trained if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=EPS)

    def logits(self) -> torch.Tensor:
        inputs = {"input_ids": self.rows.tokens(self.model.config.image_token_id)}
        if self.rows.pictures:
            inputs["pixel_values"] = self.rows.pixels
        return self.model(**inputs).logits[..., : self.rows.vocabulary]

    def step(self) -> dict[str, torch.Tensor]:
        """The gradients of one step, by name."""
        self.optimizer.zero_grad()
        logits_NV, labels_N = self.logits().flatten(0, 1), self.rows.labels.flatten()
        torch.nn.functional.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE_INDEX).backward()
        found = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.step()
        return {name.replace(".default.", "."): gradient for name, gradient in found.items()}
