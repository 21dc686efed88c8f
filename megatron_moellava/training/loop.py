"""The training loop: batches -> Megatron-Core's schedules -> update -> log -> checkpoint.

The loss of a step is the mean over all loss tokens of the global batch: sum(losses * mask) / number of loss tokens,
wherever the tokens are. `global_loss_scale` makes Megatron-Core's averages over micro-batches and ranks come out so.
"""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_moellava import parallel, platform
from megatron_moellava.checkpoint.base import base_of, base_to_load, name_of_base
from megatron_moellava.checkpoint.description import RunDescription, read_description
from megatron_moellava.checkpoint.folders import AVERAGE, require_checkpoint
from megatron_moellava.compiled import compile_elementwise
from megatron_moellava.config import Component, DataError, MoELlavaError, OptimizerConfig, RunConfig, from_dict
from megatron_moellava.conversion.place_experts import Placing, placed
from megatron_moellava.data.batch import Batch, Counts, counts_of, total
from megatron_moellava.data.loader import Loader
from megatron_moellava.exit_codes import INTERRUPTED
from megatron_moellava.model.build import build_model
from megatron_moellava.model.fp8_emulation import Emulation, emulate_fp8
from megatron_moellava.model.fp8_engine import EngineHistories, engine_histories
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.model.roles import freeze
from megatron_moellava.model.weights import load_with_base
from megatron_moellava.routing.records import routing_record
from megatron_moellava.routing.statistics import RoutingStatistics
from megatron_moellava.stages import PREFERENCE, trained_roles
from megatron_moellava.training import checkpoint as checkpoints
from megatron_moellava.training.background import BackgroundSave
from megatron_moellava.training.broadcast import broadcast_batch
from megatron_moellava.training.distillation import DistillationLoss
from megatron_moellava.training.first_gradients import FirstGradients, require_trained
from megatron_moellava.training.held_out import HeldOut
from megatron_moellava.training.loss_scale import share_loss_scale
from megatron_moellava.training.max_activations import MaxActivations
from megatron_moellava.training.metrics import (
    StepLog,
    imbalance,
    load_imbalance,
    prefix_of,
    router_losses,
    routing_summary,
)
from megatron_moellava.training.non_finite_hunt import NonFiniteHunt
from megatron_moellava.training.non_finite_report import NonFiniteReport
from megatron_moellava.training.optimizer import (
    ExpertBiases,
    Update,
    build_optimizer,
    build_scheduler,
    distributed_optimizers,
    overlaps,
    rate_after,
    role_rates,
    wrap_data_parallel,
)
from megatron_moellava.training.places import better_places, orders_of, said_of, take_places
from megatron_moellava.training.preference import PairLoss, next_shift
from megatron_moellava.training.profiling import Profiler, phase
from megatron_moellava.training.run_record import run_record
from megatron_moellava.training.schedule import run_schedule, scale_router_losses
from megatron_moellava.training.stragglers import Stragglers
from megatron_moellava.training.throughput import Throughput
from megatron_moellava.training.watchdog import Watchdog
from megatron_moellava.training.weight_average import averages_in_place
from megatron_moellava.validation.checkpoints import check_resumable

from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads

Objective = PairLoss | DistillationLoss  # what a step lowers, where that is not the mean loss of its labels
BEST = "best"  # folder below checkpoint.save
NO_GRADIENT = (
    "do its rows have answers, and pictures where the projector alone is trained? is training.trains as it should be?"
)


COMPILING = {  # with Transformer Engine?
    False: "the first step takes half a minute more, in which torch.compile makes kernels; later runs find them",
    True: "of no effect, since Transformer Engine's modules have kernels of their own",
}


class TrainingDiverged(MoELlavaError):
    """Loss or gradient was not finite too often in a row."""

    exit_code = 3


class Trainer:
    """One stage of training on this rank. `train` runs it to the end or to an interruption."""

    def __init__(
        self,
        run: RunConfig,
        loader: Loader | None,
        train_steps: int,
        held_out: HeldOut | None = None,
        reference: str | None = None,
        teacher: str | None = None,
    ):
        """`loader` on the processes that read data (`parallel.reads_data`), None elsewhere. `reference`: the seal of that of
        stage 4. `teacher`: the digest of the logits that `training.distillation` names."""
        self.run, self.loader, self.train_steps, self.held_out = run, loader, train_steps, held_out
        compile_elementwise(run.training.compile)
        self.chunks = build_model(run)
        self.roles = roles = trained_roles(run.training)
        self.trained: dict = {}
        for chunk in self.chunks:
            self.trained |= freeze(chunk, roles)
        require_trained(self.trained, roles)
        self.routing = {component: RoutingStatistics(self.chunks, component) for component in run.mixtures}
        self.max_activations = MaxActivations(self.chunks)
        self.fp8 = self._fp8()
        self.state = checkpoints.TrainingState(iteration=0, consumed_samples=0, data=None)
        if run.training.stage == PREFERENCE:
            self.state.preference = {"reference": reference, "shift": 0.0}
        if teacher is not None:
            self.state.distillation = {"teacher": teacher}
        resumed = self._load_weights()

        self.wrapped = wrap_data_parallel(run, self.chunks)
        self.optimizer = build_optimizer(run, self.wrapped)
        self.loss_scale = share_loss_scale(run, self.optimizer, self.wrapped)
        self.scheduler = build_scheduler(run.optimizer, self.optimizer, train_steps)
        if resumed:
            self._resume(resumed)
        self.stragglers = Stragglers(run.logging.straggler_interval)
        self.non_finite_report = NonFiniteReport(gradients_stay=not overlaps(run)[0])
        debug = run.training.debug
        self.non_finite_hunt = NonFiniteHunt(self.chunks) if debug and debug.find_non_finite else None
        if debug is not None:
            platform.debug(debug.deterministic, debug.detect_anomaly)
        self.watchdog: Watchdog | None = None
        self._configure_schedules()
        self.update = Update(self.optimizer, self.loss_scale)
        self.expert_biases = ExpertBiases(self.chunks)
        self.first_gradients: FirstGradients | None = FirstGradients(self.chunks)
        self.num_microbatches = run.num_microbatches(parallel.data_parallel_size())
        title = f"stage {run.training.stage}"
        self.log = StepLog(self._log_folder(), run.logging.tensorboard, title, train_steps, self.state.iteration)
        self.log.track(run.logging, lambda: run_record(run, self.chunks[0].backbone, self.chunks[0].tower))
        self.stop_signal = None
        self._ready: list[Batch] = []  # read, and not yet trained on
        self._bad_rows = 0  # of all ranks, in this epoch
        self.throughput = Throughput(run, self.chunks[0].backbone, self.chunks[0].tower, dist.get_world_size())
        self.loss_sum: torch.Tensor | float = 0.0  # of this rank's last step, before anything is summed over ranks
        self.profiler = Profiler(run.profile, self._log_folder(), self.chunks)
        self.background = BackgroundSave() if run.checkpoint.async_save else None

    # --- start ------------------------------------------------------------------------------------------------------

    def _fp8(self) -> Emulation | EngineHistories | None:
        """What FP8 remembers from step to step; on a CPU it is also what rounds."""
        recipe = self.run.training.fp8_recipe
        if recipe is None:
            return None
        make = engine_histories if platform.HAS_TRANSFORMER_ENGINE else emulate_fp8
        return make(self.chunks, recipe, self.chunks[0].config)

    def _load_weights(self) -> Path | None:
        """Weights from `checkpoint.save` if it holds a checkpoint to go on from (returned), else from `checkpoint.load`."""
        options = self.run.checkpoint
        resumed = None
        if options.save:
            resumed = checkpoints.newest_intact(options.save, parallel.say, options.ckpt_step)
        if resumed:
            description = read_description(resumed)
            for text in check_resumable(resumed, description, self.run, self.chunks[0].backbone):
                parallel.say(f"note: goes on with another value: {text}")
        source = resumed or (require_checkpoint(options.load) if options.load else None)
        if source is not None:
            base = self._base(source)
            load_with_base(source, self.chunks, base, verified=resumed is not None)
            if resumed:
                self.state.provenance = description.provenance
            else:
                self.state.provenance = checkpoints.provenance_of(self.run, source)
        return resumed

    def _base(self, source: Path) -> Path | None:
        """The base of an adapter checkpoint. A run with adapters notes it, or that it starts from a whole model."""
        base = base_of(source, read_description(source), base_to_load(self.run.checkpoint.load))
        if self.run.training.lora is not None:
            self.state.base = name_of_base(base or source)
        return base

    def _resume(self, checkpoint: Path) -> None:
        description = read_description(checkpoint)
        self.state.iteration = description.iteration
        self.state.consumed_samples = description.consumed_samples
        self.state.validation = description.validation
        self.state.preference |= description.preference
        updates = description.optimizer_steps or 0  # None is refused before
        checkpoints.load_optimizer(checkpoint, self.optimizer, self.chunks, updates)
        if self.loss_scale is not None and description.loss_scale:
            self.loss_scale.from_json(description.loss_scale)
        self.scheduler.step(increment=updates)  # skipped steps did not move it
        self._say_schedule(description)
        loaders = checkpoints.load_rank_state(checkpoint, description, self.fp8)
        if self.loader is not None and loaders is not None:
            self.loader.load_states(loaders)

    def _say_schedule(self, description: RunDescription) -> None:
        """What the learning rate does from here, where it is another than the run before would have gone on with."""
        done, updates, before = description.iteration, description.optimizer_steps or 0, description.config
        if done > self.train_steps:
            parallel.say(
                f"note: {done} steps are done, more than the {self.train_steps} of this run: nothing is left to train"
            )
        if not before or not parallel.is_main_process():
            return
        options, steps = from_dict(OptimizerConfig, before["optimizer"]), before["training"]["train_steps"]
        if not steps:  # one epoch, whose steps only the data tell
            epoch = before["training"]["train_steps"] != self.run.training.train_steps
            rows = self.loader.rows_per_epoch() if epoch and self.loader is not None else 0
            steps = math.ceil(rows / self.run.training.global_batch_size) or self.train_steps
        then, now = rate_after(options, steps, updates), rate_after(self.run.optimizer, self.train_steps, updates)
        if then != now:
            parallel.say(
                f"note: the learning rate of step {done + 1} is {now:.3g}, by the schedule of this run ({self.train_steps} "
                f"steps, evaluated after {updates} updates); by the one before ({steps} steps) it was {then:.3g}"
            )

    def _configure_schedules(self) -> None:
        for chunk in self.chunks:
            chunk.config.finalize_model_grads_func = self._finalize_gradients
        config = self.chunks[0].config
        if overlaps(self.run)[0]:
            hooks = [wrapped.no_sync for wrapped in self.wrapped]
            config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]

    def _finalize_gradients(self, *arguments, **options) -> None:
        self.stragglers.pause(self.state.iteration + 1)
        self.non_finite_report.before_reduction(self.wrapped)
        self.expert_biases.keep()
        self._at("reducing gradients")
        finalize_model_grads(*arguments, **options)

    def _log_folder(self) -> Path | None:
        folder = self.run.logging.directory or self.run.checkpoint.save
        return Path(folder) if folder else None

    # --- loop -------------------------------------------------------------------------------------------------------

    def train(self) -> int:
        """Run to `train_steps`. Returns 0, or INTERRUPTED after SIGTERM or SIGUSR1 with a checkpoint on disk.

        Raises TrainingDiverged after `training.non_finite_patience` skipped steps in a row.
        """
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGUSR1)}
        self.watchdog = Watchdog(self.run.parallel.distributed_timeout_minutes * 60)
        try:
            code = self._train()
            if profile := self.profiler.finish(self.state.iteration):
                self.log.say(profile)
            return code
        finally:
            self.watchdog.stop()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.log.close(finished=self.state.iteration >= self.train_steps)

    def _on_signal(self, number, frame) -> None:
        self.stop_signal = number

    def _at(self, what: str) -> None:
        """Tell the watchdog what comes next."""
        if self.watchdog is not None:
            self.watchdog.at(self.state.iteration + 1, what)

    def _train(self) -> int:
        self.log.say(f"trains {', '.join(f'{role} {count:,}' for role, count in self.trained.items())} (this rank)")
        if isinstance(self.fp8, Emulation):
            self.log.say(
                f"training.fp8_recipe={self.run.training.fp8_recipe} is emulated here: FP8's rounding, not its speed"
            )
        if self.run.training.compile:
            self.log.say(f"training.compile=true: {COMPILING[platform.HAS_TRANSFORMER_ENGINE]}")
        skipped_in_a_row = 0
        for chunk in self.wrapped:
            chunk.train()
        while self.state.iteration < self.train_steps:
            self.profiler.before(self.state.iteration + 1)
            numbers, applied, sample_ids = self.step()
            show = self.state.iteration % self.run.logging.log_interval == 0
            self.log.step(self.state.iteration, numbers, show, self._sample_ids(sample_ids))
            if not applied and self.loader is not None:
                self.loader.untrained(len(sample_ids))
            if applied and numbers["grad_norm"] == 0.0:
                self.log.say(
                    f"step {self.state.iteration}: the gradient is exactly 0, so the step trains nothing; {NO_GRADIENT}"
                )
            skipped_in_a_row = 0 if applied else self._report_skipped(sample_ids, skipped_in_a_row)
            if self.background is not None:
                self._saved(self.background.poll())
            interrupted = self._any_rank_interrupted()
            done = self.state.iteration == self.train_steps
            if self.held_out is not None and (done or self.state.iteration % self.run.validation.interval == 0):
                self._validate(self.held_out)
            if done or interrupted or self.state.iteration % self.run.checkpoint.save_interval == 0:
                self.save(may_place=not (done or interrupted))
                interrupted = self._any_rank_interrupted()  # a save may take long enough to be interrupted itself
            if done or interrupted:
                self._finish_save()
            if profile := self.profiler.after(self.state.iteration):
                self.log.say(profile)
            if interrupted and not done:
                self._report_data()
                self.log.say(f"interrupted at step {self.state.iteration}; the same command continues it")
                return INTERRUPTED
        self._report_data()
        return 0

    def step(self) -> tuple[dict[str, float], bool, list[str]]:
        """One optimizer step over the global batch. Returns (numbers for the log, applied, sample ids of this rank).

        The host waits for the device once, in `update`: whether to skip a step is its decision, by the gradient norm. What
        else a log needs of the device is on its way by then; what the host knows (counts) it learns from the batches.
        `step_seconds` therefore ends when an update begins to run, as that of the step before did.
        """
        started = time.perf_counter()
        self.stragglers.begin()
        self._at("reading data")
        with phase("data"):
            self._read_ahead()
            batches = [self._next_batch() for _ in range(self.num_microbatches)]
        waited = time.perf_counter() - started
        self.stragglers.pause(self.state.iteration + 1)
        own = total(batch.counts for batch in batches)
        ranks = [counts_of(values) for values in parallel.gather_over_data_parallel(own.numbers())]
        counts = total(ranks)

        for wrapped in self.wrapped:
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self.fp8 is not None:
            self.fp8.keep()
        self.stragglers.begin()
        self._at("forward and backward pass")
        activations = self.max_activations.watch() if self._records_activations() else nullcontext()
        with activations, self.non_finite_hunt.watch() if self.non_finite_hunt else nullcontext():
            objective = self._objective(counts)
            loss_sums = self._forward_backward(batches, counts.loss_tokens, objective)
        if self.first_gradients is not None:
            self.first_gradients.check()
            self.first_gradients = None
        losses, by_layer = self._losses(loss_sums, objective.names if objective else ("loss",))
        reading = platform.ToHost(list(losses.values())) if losses else None
        self._at("updating parameters")
        scale = {"loss_scale": float(self.loss_scale.scale)} if self.loss_scale is not None else {}
        with phase("optimizer"):
            applied, grad_norm = self.update()
        lr = self.optimizer.param_groups[0]["lr"] if self.optimizer.param_groups else 0.0
        rates = role_rates(self.run.optimizer, self.optimizer)
        self._finish_update(applied)

        read = dict(zip(losses, reading.read(), strict=True)) if reading else {}
        if applied and "rewards/chosen" in read:
            self.state.preference["shift"] = next_shift(self.state.preference["shift"], read)
        seconds = time.perf_counter() - started
        self.state.iteration += 1
        self.state.consumed_samples += counts.samples
        numbers = {
            "loss": read.pop("loss", 0.0) / (1 if objective else max(counts.loss_tokens, 1)),
            "lr": lr,
            **rates,
            "grad_norm": grad_norm,
            **scale,
            "tokens_per_second": counts.real_tokens / seconds,
            **self.throughput.numbers(counts, seconds),
            "samples": counts.samples,
            "step_seconds": seconds,
            "data_wait_share": waited / seconds,
            "padding_share": 1.0 - counts.real_tokens / counts.positions,
            "skipped": 0.0 if applied else 1.0,
            **imbalance(ranks),
            **read,
        }
        if not applied:
            for statistics in self.routing.values():
                statistics.forget()  # what routers make of numbers that are not finite is no statistics
        elif self._counts_routing(self.state.iteration):
            numbers |= self._router_numbers(by_layer)
        if self._records_activations(self.state.iteration):
            layers = self.max_activations.collect(scale.get("loss_scale", 1.0))
            self.log.activations(self.state.iteration, {**scale, "layers": layers})
        numbers |= self._straggler_numbers()
        return numbers, applied, [name for batch in batches for name in batch.sample_ids]

    def _finish_update(self, applied: bool) -> None:
        """What goes on with an update, and stays as it was without one."""
        if applied:
            self.scheduler.step(increment=1)
        else:
            self.expert_biases.restore()
        if self.fp8 is not None:
            self.fp8.advance() if applied else self.fp8.forget()

    def _losses(
        self, loss_sums: list[torch.Tensor], names: tuple[str, ...]
    ) -> tuple[dict[str, torch.Tensor], dict[Component, dict[str, list[float]]]]:
        """(numbers of all ranks, still on the device: those of `names` summed on the last stage, means of the routers'
        losses; the latter by part of the model and by layer, where the routers' state is logged). Collective."""
        losses: dict[str, torch.Tensor] = {}
        self.loss_sum = 0.0
        if loss_sums:
            summed = sum(loss_sums[1:], start=loss_sums[0])
            everywhere = parallel.sum_over_data_parallel(summed)
            losses |= zip(names, everywhere.view(len(names)).unbind(), strict=True)
            self.loss_sum = summed.view(len(names))[0]
        counts, layers = self._counts_routing(self.state.iteration + 1), {}
        for component in self.routing:
            if component == "tower" and "tower" not in self.roles:
                continue  # a frozen tower runs without a graph, where there are no losses
            means, layers[component] = router_losses(self.chunks, self.num_microbatches, counts, component)
            losses |= {f"{prefix_of(component)}{name}": mean for name, mean in means.items()}
        return losses, layers

    def _read_ahead(self) -> None:
        """Read the step's micro-batches. Where the data are at fault, the run ends on all ranks, with a checkpoint."""
        before, fault = None, None
        with platform.generators_kept():
            if self.loader is not None:
                before = self.loader.state_dict()
                try:
                    self.loader.check_skipped(self._bad_rows)
                    self._ready = [next(self.loader) for _ in range(self.num_microbatches)]
                except DataError as error:
                    fault = error
        counts = [fault is not None, self.loader.num_bad if self.loader is not None else 0]
        self.stragglers.pause(self.state.iteration + 1)
        faults, self._bad_rows = parallel.sum_over_ranks(counts)  # bad rows of all ranks: judged before the next step
        self.stragglers.begin()
        if faults:
            self._end_by_data(fault, before)

    def _next_batch(self) -> Batch:
        """The next micro-batch of this data-parallel rank, on the device, on every rank that needs it.

        A loader that starts draws from the generators: dropout after a resume would be another than without it.
        """
        with platform.generators_kept():
            batch = None
            if self.loader is not None:
                batch = self._ready.pop(0) if self._ready else next(self.loader)
            return broadcast_batch(batch)

    def _end_by_data(self, fault: DataError | None, before: dict | None) -> None:
        """Save what has been trained, the data as before this step, and raise what any rank has found."""
        found: list[DataError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, fault)
        if self.state.iteration % self.run.checkpoint.save_interval and self.state.iteration:
            self.save(before)
            self._finish_save()
        raise next(error for error in found if error is not None)

    def _forward_backward(
        self, batches: list[Batch], loss_tokens: int, objective: Objective | None = None
    ) -> list[torch.Tensor]:
        scale = self.num_microbatches * parallel.data_parallel_size() / max(loss_tokens, 1)
        return run_schedule(
            partial(self._forward_step, scale=scale, objective=objective),
            self.wrapped,
            batches,
            seq_length=self.run.data.seq_length,
            micro_batch_size=self.run.training.micro_batch_size,
            forward_only=False,
        )

    def _objective(self, counts: Counts) -> Objective | None:
        """Of a step whose global batch holds `counts`; None: the mean loss of its labels."""
        scale = self.num_microbatches * parallel.data_parallel_size()
        if self.state.preference:
            return PairLoss(self.run.preference, counts, scale, self.state.preference["shift"])
        if self.run.training.distillation:
            return DistillationLoss(self.run.training.distillation, counts, scale)
        return None

    def _forward_step(self, batches: Iterator[Batch], model, scale: float, objective: Objective | None = None):
        batch = next(batches)
        if self.routing and self.run.moe is None:
            scale_router_losses(self.chunks[0].config, self.num_microbatches)
        counts = self._counts_routing(self.state.iteration + 1)
        with ExitStack() as stack:
            for statistics in self.routing.values() if counts else ():
                stack.enter_context(statistics.count(batch))
            output = model(**(model_inputs(batch) | (objective.inputs if objective else {})))
        return output, partial(objective, batch=batch) if objective else partial(global_token_mean, scale=scale)

    def _counts_routing(self, iteration: int) -> bool:
        """Whether the routers' state goes to the log in this step: every `logging.routing_interval` steps."""
        return bool(self.routing) and iteration % self.run.logging.routing_interval == 0

    def _records_activations(self, iteration: int | None = None) -> bool:
        """Whether the step to come, or that of `iteration`, records each layer's largest activation and gradient."""
        interval, number = self.run.logging.max_activations_interval, iteration or self.state.iteration + 1
        return interval > 0 and number % interval == 0

    def _router_numbers(self, by_layer: dict[Component, dict[str, list[float]]]) -> dict[str, float]:
        """Write the routers' state to the log, and sum it up for the step's own line."""
        numbers: dict[str, float] = {}
        for component, statistics in self.routing.items():
            sums = statistics.collect()
            record = routing_record(sums, by_layer.get(component))
            self.log.routing(self.state.iteration, record, component)
            load_LE = sums.choices_LME.sum(dim=1)[list(sums.layers)]
            found = routing_summary(record) | load_imbalance(load_LE, self.run.parallel.expert_model_parallel_size)
            numbers |= {f"{prefix_of(component)}{name}": value for name, value in found.items()}
        return numbers

    def _straggler_numbers(self) -> dict[str, float]:
        """Every `logging.straggler_interval` steps: which rank is the slowest, and a line on the screen if it stays so."""
        numbers, message = self.stragglers.measure(self.state.iteration)
        if message:
            self.log.say(f"step {self.state.iteration}: {message}")
        return numbers

    # --- trouble and the end ----------------------------------------------------------------------------------------

    def _sample_ids(self, sample_ids: list[str]) -> list[str] | None:
        """Of all data-parallel ranks, in their order, if the run asks for them; collective."""
        if not self.run.logging.sample_ids:
            return None
        gathered: list[list[str]] = [[]] * parallel.data_parallel_size()
        dist.all_gather_object(gathered, sample_ids, group=parallel_state.get_data_parallel_group())
        return [name for ids in gathered for name in ids]

    def _report_skipped(self, sample_ids: list[str], in_a_row: int) -> int:
        """Say whose fault it is; returns the skipped steps in a row, without those that a smaller loss scale mends."""
        whose, names = self.non_finite_report.name(float(self.loss_sum), sample_ids)
        if self.loss_scale is not None and not whose.startswith("the loss") and not self.loss_scale.at_minimum:
            scale = float(self.loss_scale.scale)
            self.log.say(
                f"step {self.state.iteration} skipped: {whose} overflows in fp16; the loss scale is now {scale:g}"
            )
            return in_a_row
        in_a_row += 1
        first = self.non_finite_hunt.found() if self.non_finite_hunt else ""
        self.log.say(f"step {self.state.iteration} skipped: {whose} is not finite; samples: {names}{first}")
        if in_a_row >= self.run.training.non_finite_patience:
            self._finish_save()
            wider = "fp16 ends at 65,504: take training.precision=bf16, or " if self.loss_scale is not None else ""
            patience = f"training.non_finite_patience={self.run.training.non_finite_patience}"
            raise TrainingDiverged(
                f"{in_a_row} steps in a row without a finite gradient, the last with samples {names}; {wider}lower "
                f"optimizer.lr, look at these samples, or raise {patience}"
            )
        return in_a_row

    def _any_rank_interrupted(self) -> bool:
        return parallel.sum_over_ranks([self.stop_signal is not None])[0] > 0

    def gather_parameters(self) -> None:
        """With `overlap_param_gather` an update reaches the other ranks in the next forward pass only; whoever reads
        parameters before that (a checkpoint) needs this."""
        if overlaps(self.run)[1]:
            for wrapped in self.wrapped:
                wrapped.start_param_sync(force_sync=True)

    def _report_data(self) -> None:
        counters: list[dict | None] = [None] * dist.get_world_size()
        dist.all_gather_object(counters, self.loader.counters() if self.loader is not None else None)
        self.log.data_report([counter for counter in counters if counter is not None])

    def save(self, data: dict | None = None, may_place: bool = False) -> None:
        """Write a checkpoint of this moment to `checkpoint.save`, if the run has one; in the background if it asks for it.

        `may_place`: experts change their places with it, where the run wants that and it pays.
        """
        options = self.run.checkpoint
        if options.save is None:
            return
        self._finish_save()
        model = self.chunks[0].sizes()
        placings = better_places(self.run, model, self.log.folder, self.state) if may_place else []
        if placings:
            self.state.provenance = placed(self.state.provenance, orders_of(placings), self.state.iteration)
        path = self._write(Path(options.save), options.keep, self.background, data, placings)
        self._saved(path if self.background is None else None)
        if placings:
            self._at("taking experts in their new places")
            take_places(path, self.chunks, self.optimizer)
            self.log.say(f"step {self.state.iteration}: {said_of(placings, model)}")

    def _write(
        self,
        folder: Path,
        keep: int,
        background: BackgroundSave | None,
        data: dict | None = None,
        placings: Sequence[Placing] = (),
    ) -> Path:
        self._at("writing a checkpoint")
        self.gather_parameters()
        if self.loader is not None and data is None:
            data = self.loader.state_dict()
        scale = self.loss_scale.to_json() if self.loss_scale is not None else {}
        self._share_shift()
        state = replace(self.state, data=data, loss_scale=scale, fp8=self.fp8.state() if self.fp8 is not None else [])
        # A scheduler may signal every process of a job, and processes that megatron-core's save forks would die of it.
        waiting = {signal.SIGTERM, signal.SIGUSR1}
        signal.pthread_sigmask(signal.SIG_BLOCK, waiting)
        try:
            with phase("save"):
                return checkpoints.save_checkpoint(
                    folder, self.run, self.chunks, state, self.optimizer, keep, background, orders_of(placings)
                )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, waiting)

    def _share_shift(self) -> None:
        """The main process's, whose pipeline stage knows it, on every rank; of stage 4. Collective."""
        if self.state.preference:
            own = self.state.preference["shift"] if parallel.is_main_process() else 0.0
            (self.state.preference["shift"],) = parallel.sum_floats_over_ranks([own])

    def _validate(self, held_out: HeldOut) -> None:
        """Losses on held-out data, and the checkpoint with the best mean of them in a folder of its own."""
        self._finish_save()
        self._at("validating")
        self.gather_parameters()
        if self.fp8 is not None:
            self.fp8.keep()
        scores, averaged = held_out(self.wrapped), []
        if self.run.validation.ema:
            with averages_in_place(distributed_optimizers(self.optimizer), self.wrapped):
                averaged = [replace(score, name=f"{score.name}/{AVERAGE}") for score in held_out(self.wrapped)]
        if self.fp8 is not None:
            self.fp8.forget()
        loss = sum(score.loss for score in scores) / len(scores)
        before = self.state.validation.get("loss", math.inf)
        if loss < before:
            self.state.validation = {"loss": loss, "iteration": self.state.iteration}
        options, is_best = self.run.checkpoint, loss < before
        self.log.validation(self.state.iteration, scores + averaged, " | the best so far" if is_best else "")
        if is_best and options.save is not None and self.run.validation.best:
            path = self._write(Path(options.save) / BEST, keep=1, background=None)
            checkpoints.keep_only(path)
            self._saved(path)

    def _finish_save(self) -> None:
        if self.background is not None:
            self._at("finishing a checkpoint")
            self._saved(self.background.finish())

    def _saved(self, path: Path | None) -> None:
        if path is not None:
            self.log.say(f"checkpoint {path}")


def global_token_mean(losses_BS: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss for the schedule, sum for the log). Megatron-Core averages the former over micro-batches and ranks."""
    total = losses_BS.sum()
    return total * scale, total.detach()
