"""The training engine: Megatron's schedules run forward and backward, DeepSpeed holds the optimizer state.

Two paths, chosen by the ZeRO stage:

- **ZeRO 0, 1**: Megatron's schedule (plain, 1F1B or interleaved) runs forward and backward over the chunks inside
  DeepSpeed's engine and leaves local gradients. Then the partial sums of sequence parallelism and tied embeddings are
  reduced, then DeepSpeed reduces over data parallel and steps.
- **ZeRO 2, 3** (no pipeline): `engine(…)`, `engine.backward`, `engine.step`, since these stages communicate gradients
  and weights during the passes. The sums of sequence parallelism are computed in hooks, before DeepSpeed reads the
  gradients.

The host waits for the device once a step: `Engine._settle`, just before the update, reads all that it must know (loss,
norm, whether to update, labels, the caller's flags) from one tensor, summed over all ranks at once. On the second path,
and at ZeRO 1, the norm exists only inside DeepSpeed's step, so the optimizer in it asks (`Engine._blocked`).
"""

import contextlib
import functools
import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from elas import accelerator
from elas.config import Config
from elas.config.deepspeed import offloads_optimizer, read_deepspeed_json, zero_stage
from elas.data.batches import Batch
from elas.engine import grads
from elas.engine.deepspeed import deepspeed_config, fit_buckets, fit_sub_groups, quiet_deepspeed
from elas.engine.losses import Count, LossModel, mean_loss
from elas.engine.matrices import layer_matrices
from elas.engine.micro_batches import Abandoned, MicroBatches, idle_output
from elas.engine.muon_cycle import MuonCycle
from elas.engine.zero import local_weights
from elas.extensions import load_deepspeed
from elas.model.provider import build_chunks
from elas.optim.adamw import build_adamw
from elas.optim.loro import build_loro, factor_scale, refresh
from elas.optim.muon import build_muon
from elas.parallel import DeepSpeedGroups, Layout, data_group, tensor_group


@dataclass(frozen=True)
class _Outcome:
    """A step's facts on the host, the same on every rank."""

    loss: float
    norm: float
    """As DeepSpeed has it: −1 where it is not finite, or infinite."""
    labels: int
    left: bool
    """Whether any rank abandoned its passes."""
    flags: list[float]

    @property
    def blocked(self) -> bool:
        """Whether weights and moments must stay as they are."""
        return self.left or not 0 <= self.norm < math.inf


@dataclass
class _Step:
    """A step under way: what `Engine._settle` needs, and what it found."""

    losses: list[torch.Tensor]
    labels: Count
    """Counted labels of the global batch: a number, or 0-dim fp64."""
    flags: Callable[[], list[float]]
    norm: torch.Tensor | None = None
    """The gradient norm at ZeRO 0; DeepSpeed holds it at other stages."""
    outcome: _Outcome | None = None


class Engine:
    """The model and its optimizer state on this rank.

    Args:
        config: a validated configuration.
        layout: this rank's place in the layout; process groups must exist.
        between: counts micro-batches and decides when to abandon a step; with None, no step is abandoned.

    Attributes:
        chunks: this rank's parts of the model.
        stage: ZeRO stage.
        deepspeed: DeepSpeed's engine.
        base_optimizer: the optimizer inside DeepSpeed's: AdamW, LORO or Muon.
        muon: moves matrices within the optimizer's step; None with another optimizer.
        between: `between.mark` names the next operation.
        labels: number of labels in the last step's global batch that count, without padding of a document's sample.
        data_s: seconds that the last step waited for its batch on this rank.
        flags: the sums over all ranks of the flags given to the last step, also if it was abandoned.
    """

    deepspeed: Any  # DeepSpeed's types say little: what holds depends on the ZeRO stage
    base_optimizer: Any

    def __init__(self, config: Config, layout: Layout, between: MicroBatches | None = None):
        import deepspeed

        self.config, self.layout = config, layout
        self.chunks = build_chunks(config)
        self.micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * layout.dp)
        self.stage = zero_stage(read_deepspeed_json(config))
        self.uses_schedule = self.stage <= 1
        accumulated = 1 if self.uses_schedule else self.micro_batches  # by DeepSpeed; Megatron's schedules do it first
        settings = deepspeed_config(config, micro_batches=accumulated, dp=layout.dp)
        if not self.uses_schedule:
            grads.sum_sequence_partial_in_backward(self.chunks)
        self._mark_replicated()
        # DeepSpeed hooks the forward of the module it is given. A `ModuleList` has none, so that Megatron's schedule
        # can call the chunks without DeepSpeed's hooks.
        module = torch.nn.ModuleList(self.chunks) if self.uses_schedule else LossModel(self.chunks[0])
        fit_buckets(settings, self.chunks)
        fit_sub_groups(settings, self.chunks, config, layout.dp)
        offload = offloads_optimizer(settings)
        load_deepspeed(offload=offload)
        self._running: _Step | None = None  # `_blocked` looks at it from the first step on, which DeepSpeed takes
        self._of_muon: set[int] = set()
        if config.optimizer.kind == "loro":
            scale = factor_scale(config.low_rank.rank, config.model.hidden_size)
            self.base_optimizer = build_loro(module, config.optimizer, scale=scale, blocked=self._blocked)
        elif config.optimizer.kind == "muon":
            matrices = {id(rows.parameter): rows.parameter for rows in layer_matrices(self.chunks)}
            self._of_muon = set(matrices)
            self.base_optimizer = build_muon(module, matrices.values(), config.optimizer, blocked=self._blocked)
        else:
            self.base_optimizer = build_adamw(module, config.optimizer, offload=offload, blocked=self._blocked)
        quiet_deepspeed()
        with contextlib.redirect_stdout(io.StringIO()):  # suppresses a line that every rank prints about an op
            deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        with accelerator.shared_gloo_groups():
            self.deepspeed, *_ = deepspeed.initialize(
                model=module,
                optimizer=self.base_optimizer,
                config=settings,
                mpu=DeepSpeedGroups(),
                dist_init_required=False,
            )
        if self.stage == 0 and config.train.dtype == "bfloat16":
            # DeepSpeed's unfused optimizer takes a step with zero gradients to allocate its state. If kept, that step
            # would count in Adam's bias correction, and bf16 at ZeRO 0 would drift from the other stages.
            self.deepspeed.optimizer.optimizer.state.clear()
            # It reads from the device for every parameter whether its gradient is finite; `_update` looks at the norm.
            self.deepspeed.optimizer.overflow_checker.check = lambda *_: False
        if config.optimizer.kind in ("loro", "muon"):
            refresh(self.base_optimizer.state.values())  # undoes the step that ZeRO takes to allocate its state
        self.muon = MuonCycle(self, config.optimizer) if config.optimizer.kind == "muon" else None

        self.labels, self.flags, self.data_s = 0, [], 0.0
        self._accumulation = None
        self._last: list[Batch] = []
        self.between = between or MicroBatches()
        # The ranks that must abandon a pass together, since they communicate in it: all ranks under ZeRO 2 and 3.
        self._abandon_with = tensor_group() if self.uses_schedule else None
        if self.uses_schedule and config.train.dtype == "bfloat16" and self.micro_batches > 1:
            self._accumulation = grads.Fp32Accumulation(self.chunks)

    def _mark_replicated(self) -> None:
        """Mark the last stage's copy of a tied embedding, so that the gradient norm does not count it twice."""
        if not self.config.model.tie_embeddings or self.layout.pp == 1:
            return
        for chunk in self.chunks:
            if chunk.post_process and not chunk.pre_process:
                weight: Any = chunk.shared_embedding_or_output_weight()
                weight.ds_pipe_replicated = True

    def moments(self, parameter: torch.nn.Parameter) -> tuple[str, ...]:
        """Names of the moments that the optimizer keeps of a parameter."""
        return ("exp_avg",) if id(parameter) in self._of_muon else ("exp_avg", "exp_avg_sq")

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next step in every parameter group."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr

    def step(self, batches: Iterator[Batch], flags: Callable[[], list[float]] = list) -> tuple[float, float]:
        """Forward, backward and update on one global batch.

        Args:
            batches: yields this data-parallel rank's micro-batches in order.
            flags: called once after the passes; its numbers, as many on every rank, are summed over all ranks with the
                loss and then stand in `self.flags`, at no cost of their own.

        Returns:
            Mean loss over the global batch and the gradient norm before clipping; the same on every rank. If the norm
            is not finite, nothing was updated.

        Raises:
            Abandoned: the run was asked to stop and the step abandoned before its update; raised on every rank.
        """
        self.between.mark("reading the batch")
        begun = time.perf_counter()
        micro = self._last = [next(batches) for _ in range(self.micro_batches)]
        self.data_s = time.perf_counter() - begun
        labels, counted = self._counted(micro)
        running = self._running = _Step([], labels, flags)
        try:
            if self.uses_schedule:
                running.losses += self._pass_schedule(micro, counted)
                self._update(running)
            else:
                self._pass_deepspeed(micro, counted, running.losses)
            outcome = self._settle(running)
        finally:
            self._running = None
        self.labels, self.flags = outcome.labels, outcome.flags
        if outcome.left:
            self.between.left = True
            raise Abandoned
        return outcome.loss, outcome.norm if outcome.norm >= 0 else math.nan

    def pass_again(self) -> None:
        """Repeat forward and backward on the batch of the last step, without an update; leaves gradients behind."""
        _, counted = self._counted(self._last)
        self.between.begin("the bad batch again", self.micro_batches, len(self.chunks))
        if self.uses_schedule:
            self._pass_schedule(self._last, counted)
            return
        for tokens, labels in self._last:
            self.deepspeed.backward(self.deepspeed(tokens, labels, counted))

    def _blocked(self) -> bool:
        """Asked by the optimizer before it updates, on every rank; not so in the step with which DeepSpeed sets up."""
        return self._running is not None and self._settle(self._running).blocked

    def _settle(self, step: _Step) -> _Outcome:
        """All that the host must know of a step, once per step: one all-reduce over all ranks, one read."""
        if step.outcome is not None:
            return step.outcome
        device = torch.cuda.current_device()
        norm = getattr(self.deepspeed.optimizer, "_global_grad_norm", None) if step.norm is None else step.norm
        if not torch.is_tensor(norm):  # where DeepSpeed skipped the step, or the first one was abandoned
            norm = torch.tensor(math.nan if norm is None else norm, device=device)
        # A pageable copy without `non_blocking` would wait for the device.
        ours = torch.tensor([0.0, self.between.left, *step.flags()], dtype=torch.float64).to(device, non_blocking=True)
        if self._knows_loss and step.losses:
            ours[0] += torch.stack([loss.double() for loss in step.losses]).mean()
        dist.all_reduce(ours)
        found = [norm, step.labels] if torch.is_tensor(step.labels) else [norm]  # known on every rank already
        numbers = torch.cat([ours, *(one.to(device, torch.float64).reshape(1) for one in found)]).tolist()
        labels = numbers.pop() if len(found) == 2 else step.labels
        loss, left, *flags, norm = numbers
        step.outcome = _Outcome(loss / self.layout.dp, norm, int(labels), left > 0, flags)
        return step.outcome

    @torch.no_grad()
    def evaluate(self, micro: list[Batch]) -> tuple[float, int]:
        """Forward without gradients; every rank must call it with the same number of micro-batches.

        Args:
            micro: this data-parallel rank's micro-batches, a number that an interleaved schedule allows.

        Returns:
            The sum of the losses (nats) over all ranks' counted labels, and the number of these labels. Add up both
            before dividing, since batches may have different numbers. The same on every rank.

        Raises:
            Abandoned: the run was asked to stop during the evaluation; raised on every rank.
        """
        if self.uses_schedule:
            sums = self._pass_schedule(micro, counted=1.0, forward_only=True)  # the sum over one label
        else:
            self.deepspeed.eval()
            sums = []
            for tokens, labels in micro:
                if self.between.next(self._abandon_with):
                    break
                sums.append(self.deepspeed(tokens, labels, 1.0).detach())
            self.deepspeed.train()
        total = torch.tensor([0.0, 0.0, self.between.left], dtype=torch.float64)
        total = total.to(torch.cuda.current_device(), non_blocking=True)
        if self._knows_loss and sums:
            total[0] = torch.stack(sums).double().sum()
            total[1] = torch.stack([(labels >= 0).sum() for _, labels in micro]).sum()
        dist.all_reduce(total)
        loss, count, left = total.tolist()
        if left:
            self.between.left = True
            raise Abandoned
        return loss, int(count)

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether every weight of the model is finite; the same on every rank."""
        weights = [local_weights(p, self.stage, self.layout.dp_rank) for c in self.chunks for p in c.parameters()]
        return grads.all_finite(weights)

    def _counted(self, micro: list[Batch]) -> tuple[Count, torch.Tensor | None]:
        """Counted labels of the global batch, and their average per micro-batch (0-dim fp32; None if all count)."""
        if self.config.data.packing == "packed":
            return self.config.train.global_batch_size * self.config.model.seq_length, None
        count = torch.stack([(labels >= 0).sum() for _, labels in micro]).sum().double()
        dist.all_reduce(count, group=data_group())
        # fp32, since a 0-dim fp64 tensor would make the loss fp64, which a float does not.
        return count, (count / (len(micro) * self.layout.dp)).float()

    def _pass_schedule(
        self, micro: list[Batch], counted: Count | None = None, forward_only: bool = False
    ) -> list[torch.Tensor]:
        def forward_step(iterator, model):
            tokens, labels = next(iterator)
            abandoned = self.between.next(self._abandon_with)
            if abandoned and self.layout.pp == 1:
                raise Abandoned

            def loss_function(loss: torch.Tensor):
                return loss, {"loss": loss.detach().clone()}  # the schedule scales `loss` in place

            if abandoned:
                shards = self.layout.tp if self.layout.sequence_parallel else 1
                return idle_output(model, tokens, shards), loss_function
            return mean_loss(model, tokens, labels, counted), loss_function

        iterators = [iter(micro) for _ in self.chunks]
        model: Any = self.chunks if len(self.chunks) > 1 else self.chunks[0]
        schedule = functools.partial(
            get_forward_backward_func(),
            forward_step_func=forward_step,
            data_iterator=iterators if len(self.chunks) > 1 else iterators[0],
            model=model,
            num_microbatches=len(micro),
            seq_length=self.config.model.seq_length,
            micro_batch_size=self.config.train.micro_batch_size,
            forward_only=forward_only,
        )
        try:
            return [result["loss"] for result in schedule()]
        except Abandoned:  # on this rank; `step` and `evaluate` raise it on all ranks
            return []

    def _pass_deepspeed(self, micro: list[Batch], counted: Count | None, losses: list[torch.Tensor]) -> None:
        """Passes and update; `losses` are complete when the optimizer in the last `step` asks whether it may update."""
        for tokens, labels in micro:
            if self.between.next(self._abandon_with):
                break
            loss = self.deepspeed(tokens, labels, counted)
            losses.append(loss.detach())
            self.deepspeed.backward(loss)
            self.deepspeed.step()

    def _update(self, step: _Step) -> None:
        self.between.mark("reducing gradients and updating")
        if self._accumulation is not None:
            self._accumulation.hand_over()
        if self.between.left:
            grads.fill_missing(self.chunks)
        grads.sum_sequence_partial(self.chunks)
        grads.sum_tied_embeddings(self.chunks)
        if self.stage == 0:
            grads.average_over_data_parallel(self.chunks)
            step.norm = grads.grad_norm(self.chunks)
            if self._settle(step).blocked:
                for chunk in self.chunks:
                    chunk.zero_grad(set_to_none=True)
                return
            # Not DeepSpeed's clipping: its bf16 optimizer computes the norm of tensors that lack the marks of
            # replicated and tied parameters, and so would count these more than once.
            self.base_optimizer.clip_scale = grads.clip_scale(step.norm, self.config.optimizer.clip_grad)
        else:
            self.deepspeed.optimizer.reduce_gradients(pipeline_parallel=True)
        self.deepspeed.step()

    @property
    def _knows_loss(self) -> bool:
        """Whether this rank contributes its losses to sums: one rank per data-parallel replica does."""
        return self.layout.is_last_stage and self.layout.tp_rank == 0
