"""A whole training step, ours beside a padded one: useful tokens (they carry a loss or an image) per second.

  python -m benchmarks.train_step [--samples 128] [--batch 8] [--rounds 3] [--deepspeed FOLDER]

Stage 3 (experts, router, dense FFNs and projector are trained) on the same weights and the same samples, whose lengths
follow LLaVA's 665k mix divided by four: images of 144 visual tokens, at most 512 tokens. Forward, backward, AdamW of the
recipe's global batch, 128 samples, on one process.

ours     tools/train.py's trainer: samples packed into rows of 2,048 (8,192 divided by four; a padded batch has more),
         dropless grouped experts, distributed optimizer
compiled the same with training.compile=true
padded   transformers' LlavaForConditionalGeneration in bf16 with DeepSpeed's MoE layer (gate, einsum dispatch, experts,
         capacity factor 1.5), samples batched as the original does it on eight GPUs: grouped by modality, cut into 16
         micro-batches of 8 samples and as equal total lengths as possible, padded to the longest. Width over tokens per
         batch, which decides what the dispatch costs beside the experts, is about that of the original's recipes
         (StableLM-2 with 5,632 and 8 samples of about 1,000).
recipe   the same with gradient checkpointing, which all of the original's recipes have
eager    as "padded", but transformers' own experts, one after another, instead of DeepSpeed's
bound    the products of our step alone (`costs/stage_work.py`: the packed positions, what stage 3 trains), each as a dense
         product: no attention, no element-wise work, no optimizer, nothing between operations
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import finish, keep_kernels, median, ratio, say, take_turns
from benchmarks.moe_layer import SwiGLU, deepspeed_layer, import_deepspeed
from benchmarks.reference import Sizes, write_reference
from benchmarks.synthetic import QUARTER, make_samples, packed_rows, trainer_of, useful_tokens
from megatron_moellava import parallel
from megatron_moellava.backbones import get_backbone
from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.compiled import compile_elementwise
from megatron_moellava.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.costs.flops import Product
from megatron_moellava.costs.layout import Layout
from megatron_moellava.costs.shapes import model_from_json
from megatron_moellava.costs.stage_work import stage_work
from megatron_moellava.data.batch import Batch
from megatron_moellava.data.encode import IGNORE_INDEX, IMAGE_TOKEN
from megatron_moellava.data.modality import epoch_order
from megatron_moellava.model.weights import load_weights
from megatron_moellava.towers import get_tower
from megatron_moellava.training.loop import Trainer

SIZES = Sizes(
    hidden=512,
    layers=4,
    experts=4,
    ffn=1408,
    vocabulary=QUARTER.vocabulary,
    image=QUARTER.image,
    tower_layers=4,
    tower_hidden=128,
)
AUX_LOSS = 0.01
# Samples are cut at 512, as the original's at 2,048; a row holds fewer tokens than a padded batch.
ROW = 4 * QUARTER.seq_length
CHUNKS = 16  # micro-batches of a global batch: 8 GPUs, 2 steps of accumulation


def our_trainer(folder: Path, rows: list[Batch], compiled: bool = False) -> Trainer:
    if not (folder / "megatron").exists():
        import_checkpoint(folder, save=folder / "megatron", dtype="bfloat16", seed=1)
    checkpoint = require_checkpoint(folder / "megatron")
    model = model_from_json(read_description(checkpoint).model)
    run = RunConfig(
        model=ModelConfig(backbone=str(checkpoint), tower=str(checkpoint)),
        moe=replace(model.required_moe, moe_aux_loss_coeff=AUX_LOSS),
        data=DataConfig(seq_length=ROW),
        training=TrainingConfig(stage=3, precision="bf16", global_batch_size=len(rows), compile=compiled),
        optimizer=OptimizerConfig(lr=1e-5),
    )
    trainer = trainer_of(run, rows)
    load_weights(checkpoint, trainer.chunks)
    trainer.optimizer.reload_model_params()
    return trainer


def products_alone(trainer: Trainer, rows: list[Batch]):
    """All products of one step, forward and backward, without autograd."""
    backbone, tower = get_backbone(trainer.run.model.backbone), get_tower(trainer.run.model.tower)
    layout = Layout(run=trainer.run, backbone=backbone, tower=tower, world_size=1)
    images = sum(len(row.pixel_values_NCHW) for row in rows) / len(rows)
    work = [item for item in stage_work(layout, 0, ROW, ROW, images) if isinstance(item, Product)]
    operands = [
        (item, *(torch.randn(round(size), round(other)).bfloat16() for size, other in sides(item))) for item in work
    ]

    def step() -> None:
        for _ in rows:
            for item, input_NI, weight_IO, grad_NO in operands:
                for _ in range(item.times):
                    input_NI @ weight_IO
                    if item.input_gradient:
                        grad_NO @ weight_IO.t()
                    if item.weight_gradient:
                        input_NI.t() @ grad_NO

    return step


def sides(item: Product) -> tuple[tuple[float, float], ...]:
    """Shapes of input, weight and gradient of the output."""
    return (item.rows, item.inner), (item.inner, item.columns), (item.rows, item.columns)


# --- padded -----------------------------------------------------------------------------------------------------------


class DeepSpeedExperts(torch.nn.Module):
    """DeepSpeed's layer with the weights of a transformers MoE block, in its place."""

    def __init__(self, moe_class, block):
        super().__init__()
        self.moe = deepspeed_layer(moe_class, SIZES.hidden, SIZES.ffn, SIZES.experts)
        gate, experts = self.moe.deepspeed_moe.gate, self.moe.deepspeed_moe.experts.deepspeed_experts
        with torch.no_grad():
            gate.wg.weight.copy_(block.gate.weight)
            for index, expert in enumerate(experts):
                assert isinstance(expert, SwiGLU)
                expert.gate_up.weight.copy_(block.experts.gate_up_proj[index])
                expert.down.weight.copy_(block.experts.down_proj[index])
        self.aux_loss = None

    def forward(self, hidden_BSH: torch.Tensor) -> torch.Tensor:
        output, self.aux_loss, _ = self.moe(hidden_BSH)
        return output


class EagerExperts(torch.nn.Module):
    """transformers' block without its shared expert, which has no width here."""

    aux_loss = 0.0

    def __init__(self, block):
        super().__init__()
        self.gate, self.experts = block.gate, block.experts

    def forward(self, hidden_BSH: torch.Tensor) -> torch.Tensor:
        hidden_TH = hidden_BSH.flatten(0, 1)
        _, weights, chosen = self.gate(hidden_TH)
        return self.experts(hidden_TH, chosen, weights).view_as(hidden_BSH)


TRAINED = ("multi_modal_projector", ".mlp.")  # stage 3


def our_step(trainer: Trainer) -> float:
    """The loss of one."""
    compile_elementwise(trainer.run.training.compile)
    return trainer.step()[0]["loss"]


class Padded:
    """Batches of the original's order, padded; a step accumulates their gradients and updates."""

    def __init__(self, model, samples, batch: int, replace, checkpointing: bool = False):
        self.model = model.to(torch.bfloat16).train()
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.experts = []
        for layer in model.model.language_model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp = replace(layer.mlp)
                self.experts.append(layer.mlp)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = any(part in name for part in TRAINED) and "vision_tower" not in name
        self.optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5)
        # The sign that stands for "text only" in the original's lengths.
        lengths = np.array([len(s) if pixels is not None else -len(s) for s, pixels in samples])
        order = epoch_order(lengths, batch, CHUNKS, torch.Generator().manual_seed(1))
        self.batches = [
            self._collate([samples[i] for i in order[start : start + batch]]) for start in range(0, len(order), batch)
        ]
        self.loss_tokens = sum(int((item["labels"] != IGNORE_INDEX).sum()) for item in self.batches)
        self.positions = sum(item["input_ids"].numel() for item in self.batches)

    def _collate(self, part) -> dict:
        longest = max(len(sample) for sample, _ in part)
        ids = torch.zeros(len(part), longest, dtype=torch.int64)
        labels, mask = torch.full_like(ids, IGNORE_INDEX), torch.zeros_like(ids)
        for row, (sample, _) in enumerate(part):
            tokens = torch.from_numpy(np.where(sample.tokens_S == IMAGE_TOKEN, SIZES.image_id, sample.tokens_S))
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            labels[row, : len(tokens)] = torch.from_numpy(sample.labels_S)
        pixels = [torch.from_numpy(pixels) for _, pixels in part if pixels is not None]
        item = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return item | ({"pixel_values": torch.cat(pixels).bfloat16()} if pixels else {})

    def step(self) -> float:
        total = 0.0
        for item in self.batches:
            labels = item["labels"]
            inputs = {name: value for name, value in item.items() if name != "labels"}
            logits = self.model(**inputs, use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
            )
            auxiliary = sum(layer.aux_loss for layer in self.experts)
            (loss / self.loss_tokens + AUX_LOSS * auxiliary / len(self.batches)).backward()
            total += loss.detach().item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / self.loss_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="samples per padded micro-batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--deepspeed", type=Path, help="folder with a deepspeed whose dispatch is an einsum")
    args = parser.parse_args()
    keep_kernels()
    samples = make_samples(args.samples, QUARTER)
    rows = packed_rows(samples, QUARTER, ROW)
    with tempfile.TemporaryDirectory() as folder:
        models = [write_reference(Path(folder), SIZES) for _ in range(3)]
        trainer, compiled = (our_trainer(Path(folder), rows, compiled=on) for on in (False, True))
        moe_class, version = import_deepspeed(args.deepspeed)
        padded = Padded(models[0], samples, args.batch, lambda block: DeepSpeedExperts(moe_class, block))
        recipe = Padded(models[1], samples, args.batch, lambda block: DeepSpeedExperts(moe_class, block), True)
        eager = Padded(models[2], samples, args.batch, EagerExperts)
        losses: dict[str, list[float]] = {"ours": [], "compiled": [], "padded": [], "recipe": [], "eager": []}
        ways = {
            "ours": lambda: losses["ours"].append(our_step(trainer)),
            "compiled": lambda: losses["compiled"].append(our_step(compiled)),
            "padded": lambda: losses["padded"].append(padded.step()),
            "recipe": lambda: losses["recipe"].append(recipe.step()),
            "eager": lambda: losses["eager"].append(eager.step()),
            "bound": products_alone(trainer, rows),
        }
        seconds = take_turns(ways, args.rounds)
        parallel.shutdown()
    useful, real = useful_tokens(samples), sum(len(sample) for sample, _ in samples)
    result = {
        "sizes": {"hidden": SIZES.hidden, "layers": SIZES.layers, "experts": SIZES.experts, "ffn": SIZES.ffn},
        "parameters": sum(parameter.numel() for parameter in trainer.chunks[0].parameters()),
        "samples": len(samples),
        "real tokens": real,
        "useful tokens": useful,
        "positions": {"ours": len(rows) * ROW, "padded": padded.positions},
        "deepspeed": version,
        "first loss": {name: values[0] for name, values in losses.items()},
        "step seconds": {name: median(values) for name, values in seconds.items()},
        "useful tokens per second": {name: useful / median(values) for name, values in seconds.items()},
        "times ours": {name: ratio(values, seconds["ours"]) for name, values in seconds.items() if name != "ours"},
        "times compiled": {name: ratio(values, seconds["compiled"]) for name, values in seconds.items()},
        "times the bound": {
            name: ratio(values, seconds["bound"]) for name, values in seconds.items() if name != "bound"
        },
    }
    say(str(result))
    finish(result)


if __name__ == "__main__":
    main()
