"""The batch of step n + 1 is sampled while step n trains, one update stale."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from torch import Tensor

from ogls.policy.policy import Policy
from ogls.records import Batch
from ogls.rollout.guard import PATIENCE
from ogls.rollout.sampler import Sampler
from ogls.system.step_metrics import StepMetrics, timed
from ogls.system.watchdog import time_limit


class OneStepOff:
    """OneStepOff has a thread make the batch of the next step, with an engine in a process of its own.

    The engine takes the weights before the step changes them. A copy of them is kept until the batch is made, and in
    checkpoints: a run that goes on, or one whose engine failed, then makes the same batch from the same weights.

    Args:
        make: function from a step and a sampler to the batch of that step
        sampler: source of graded rollouts, whose engine copies weights
        policy: student that is trained
        weights: weights that the next batch is made from, out of a checkpoint; None takes the policy's present ones
    """

    def __init__(
        self,
        make: Callable[[int, Sampler], Batch],
        sampler: Sampler,
        policy: Policy,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        self._make, self._sampler, self._policy, self.weights = make, sampler, policy, weights
        self._step = -1
        self._batch: Future[Batch] | None = None

    def take(self, more: bool) -> Batch:
        """Returns the batch of the step that trains next; with `more`, a thread begins to make the one after it."""
        step = self._policy.version
        metrics = StepMetrics("training", step + 1)
        with metrics.recording():
            if self._batch is not None:
                assert self._step == step, (self._step, step)
                with timed("wait"):
                    self.settle()
                batch = self._batch.result()
            elif self.weights is not None:
                batch = self._behind(step)
            else:
                self._sampler.hold()
                batch = self._make(step, self._sampler)
            assert batch.policy_version == (step if self.weights is None else step - 1)
            self._step, self._batch = step + 1, None
            if more:
                self._sampler.hold()  # may fail: a checkpoint then needs the weights that this batch was made from
        self.weights = {name: p.detach().clone() for name, p in self._policy.trainable().items()}
        if more:
            self._begin()
        return replace(batch, metrics=batch.metrics | metrics.metrics(), phases=(*batch.phases, *metrics.phases))

    def settle(self) -> None:
        """Waits for the batch under way, so that the engine is free. If the engine failed, the batch is made again."""
        if self._batch is None:
            return
        try:
            with time_limit("sampling beside the training", PATIENCE, signs=lambda: self._sampler.beats):
                self._batch.result()
        except ValueError:
            raise
        except Exception as error:
            self._batch = Future()
            self._batch.set_result(self._behind(self._step, error))

    def _begin(self) -> None:
        step, sampler, batch = self._step, self._sampler.beside(), Future()

        def run() -> None:
            try:
                batch.set_result(self._make(step, sampler))
            except BaseException as error:
                batch.set_exception(error)

        self._batch = batch
        threading.Thread(target=run, name=f"ogls-batch-{step}", daemon=True).start()

    def _behind(self, step: int, failure: Exception | None = None) -> Batch:
        """Returns the batch of `step`, made from the weights of the version before it."""
        assert self.weights is not None
        with self._policy.swapped(self.weights, version=step - 1):
            if failure is not None:
                self._sampler.rebuild(failure)
            self._sampler.hold()
            return self._make(step, self._sampler)
