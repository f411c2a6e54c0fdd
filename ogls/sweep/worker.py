"""A worker asks Optuna for points, makes their runs and tells what came of them."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from types import FrameType

import optuna
from optuna import Study, TrialPruned
from optuna.trial import FrozenTrial, TrialState

from ogls.sweep import attempts, dashboard
from ogls.sweep.budget import Budget
from ogls.sweep.definition import AGAINST, Options, Settings, Sweep
from ogls.sweep.process import Failed, Killed, Stopped, TrialRun
from ogls.sweep.record import StudyRecord
from ogls.sweep.run_numbers import RunNumbers
from ogls.sweep.search_space import OPTIONS
from ogls.tracking.config import flatten

RUNS, VALUES, SECONDS, WHY = "runs", "values_by_seed", "seconds", "why"
FINALS, ACCURACIES = "finals", "accuracies"  # what its runs measured at their end, and the names of their accuracies
_OUTCOMES = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAIL: "FAILED"}


class Worker:
    """A worker makes trials until the study has enough of them, or until it is told to stop.

    Args:
        sweep: search space and objective
        settings: options of the command line
        study: Optuna's study
        record: the study in MLflow
    """

    def __init__(self, sweep: Sweep, settings: Settings, study: Study, record: StudyRecord) -> None:
        self.sweep, self.settings, self.study, self.record = sweep, settings, study, record
        self.stopping = threading.Event()
        self.budget = Budget(study, settings.device_hours, settings.jobs, self.stopping)
        self._objectives: list[Callable[[RunNumbers], float]] = [sweep.objective]
        if settings.against is not None:
            self._objectives.append(AGAINST[settings.against])

    def work(self, n_trials: int) -> None:
        """Makes trials until `n_trials` of the study are finished or under way elsewhere, or until a stop."""
        timer = threading.Timer(self.settings.timeout, self.stopping.set) if self.settings.timeout else None
        with _stops_at_signals(self.stopping):
            if timer is not None:
                timer.daemon = True
                timer.start()
            self.budget.look()
            self.budget.watch()
            while not self.stopping.is_set() and (left := n_trials - attempts.spent(self.study)) > 0:
                self.study.optimize(
                    self._trial,
                    n_trials=left,
                    n_jobs=min(self.settings.jobs, left),
                    catch=(Stopped, Killed, Failed),
                    callbacks=[self._after, lambda study, _: self._enough(n_trials)],
                )
                attempts.reclaim(self.study)
        if timer is not None:
            timer.cancel()

    def _enough(self, n_trials: int) -> None:
        if self.stopping.is_set() or attempts.spent(self.study) >= n_trials:
            self.study.stop()

    # ---- one trial ----

    def _trial(self, trial: optuna.Trial) -> float | tuple[float, ...]:
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        try:
            attempts.sign(trial)
            options = self.sweep.space(trial)
            runs = self._runs(attempts.original(frozen), options)
            trial.set_user_attr(OPTIONS, dict(options))
            trial.set_user_attr(RUNS, [run.name for run in runs])
            dashboard.note(trial, "\n\n".join(f"`{run.folder}`" for run in runs))
            if self.stopping.is_set():
                raise Stopped
            print(f"trial {trial.number}: {shown(trial.params)}", flush=True)
            return self._measure(trial, runs)
        except (Killed, Stopped) as error:
            frozen = self.study.get_trials(deepcopy=False)[trial.number]  # with the parameters of the space
            requeue = attempts.requeue_killed if isinstance(error, Killed) else attempts.requeue_stopped
            requeue(self.study, frozen)
            again = attempts.goes_on(self.study, frozen)
            trial.set_user_attr(WHY, f"{error}; {'queued again' if again else 'given up'}")
            raise
        except Failed as error:
            trial.set_user_attr(WHY, str(error))
            raise
        except TrialPruned as error:
            trial.set_user_attr(WHY, str(error))
            raise
        except BaseException:
            self.stopping.set()  # an error of the sweep itself ends all of it
            raise

    def _runs(self, number: int, options: Options) -> list[TrialRun]:
        """Returns the runs of a trial, one per seed."""
        return [
            TrialRun(
                settings=self.settings,
                number=number,
                seed=seed,
                options=options,
                parent_run_id=self.record.run_id,
                stopping=self.stopping,
            )
            for seed in range(self.settings.first_seed, self.settings.first_seed + self.settings.seeds)
        ]

    def _measure(self, trial: optuna.Trial, runs: list[TrialRun]) -> float | tuple[float, ...]:
        """Makes the runs and returns the mean of each objective over the seeds.

        The pruner sees one curve: the seeds' accuracies one after the other, each averaged with the final accuracies of
        the seeds before. The validation before training says nothing about the trial and is left out. After the last
        validation there is nothing to save, so a trial is pruned only when a step after the validation has been made.
        """
        begun = time.monotonic()
        finished: list[RunNumbers] = []
        reported: set[int] = set()
        validated, found = math.inf, ""
        for run in runs:
            before = [numbers.final_accuracy for numbers in finished] if finished else []
            offset = max(reported, default=0)
            with closing(run.watch()) as watched:
                for numbers in watched:
                    if offset + numbers.step > validated:
                        if trial.should_prune():
                            raise TrialPruned(found)
                        validated = math.inf
                    new = {s: v for s, v in numbers.accuracy.items() if s > 0 and offset + s not in reported}
                    for step, accuracy in sorted(new.items()) if self.settings.against is None else ():
                        reported.add(offset + step)
                        trial.report((math.fsum(before) + accuracy) / (len(before) + 1), offset + step)
                        validated, found = offset + step, f"at {accuracy:.4f} after step {step}"
            finished.append(run.measured())
        try:
            values = [[objective(numbers) for numbers in finished] for objective in self._objectives]
        except ValueError as error:  # the run has not measured what the objective asks for
            raise Failed(str(error)) from error
        means = tuple(math.fsum(of_seeds) / len(of_seeds) for of_seeds in values)
        if not all(map(math.isfinite, means)):
            raise Failed(f"the objective is {means[0] if len(means) == 1 else means}")
        trial.set_user_attr(VALUES, values)
        trial.set_user_attr(FINALS, _means([numbers.finals for numbers in finished]))
        trial.set_user_attr(ACCURACIES, finished[0].accuracies)
        trial.set_user_attr(SECONDS, round(time.monotonic() - begun, 1))
        return means[0] if len(means) == 1 else means

    # ---- what came of it ----

    def _after(self, study: Study, trial: FrozenTrial) -> None:
        outcome = self.settle(trial)
        shown = ", ".join(f"{value:.4f}" for value in trial.values or []) or trial.user_attrs.get(WHY, "")
        print(f"trial {trial.number}: {outcome.lower()}, {shown}", flush=True)
        self.show_best()
        for run in self._runs(attempts.original(trial), {}) if trial.state != TrialState.FAIL else ():
            run.tidy()

    def settle(self, trial: FrozenTrial) -> str:
        """Tells MLflow what became of a trial and returns that as a word. Repeating this does no harm."""
        number = attempts.original(trial)
        goes_on = attempts.goes_on(self.study, trial)
        outcome = "INTERRUPTED" if goes_on else trial.state.name
        for run in self._runs(number, {}):
            self.record.settle(run.folder, number, "KILLED" if goes_on else _OUTCOMES[trial.state], outcome)
        if trial.state == TrialState.COMPLETE:
            names = ["accuracy", self.settings.against]
            values = {f"trial/{name}": value for name, value in zip(names, trial.values, strict=False)}
            assert trial.datetime_complete is not None
            self.record.progress(values, number, trial.datetime_complete.timestamp())
        return outcome

    def show_best(self) -> None:
        """Gives the study's run in MLflow what the best trial so far measured, and its page the charts of all trials.

        The step is the number of trials that were complete by then.
        """
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        best = best_trial(self.study)
        if best is None or FINALS not in best.user_attrs:  # of a study that was begun before these were kept
            return
        latest = max(trial.datetime_complete.timestamp() for trial in complete if trial.datetime_complete)
        self.record.progress(best.user_attrs[FINALS], len(complete), latest)
        leaves = [flatten(trial.user_attrs[OPTIONS]) for trial in complete]
        names = list(dict.fromkeys(name for of_trial in leaves for name in of_trial))
        differing = [name for name in names if len({str(of_trial.get(name)) for of_trial in leaves}) > 1]
        common = [name for name in differing if all(name in of_trial for of_trial in leaves)]
        self.record.show(best.user_attrs[ACCURACIES], differing, common)


def best_trial(study: Study) -> FrozenTrial | None:
    """Returns the trial of the highest accuracy, whatever the second objective; None where none is complete."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max(complete, key=lambda trial: trial.values[0], default=None)


def _means(of_seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the mean of each number over the seeds; of several seeds without the intervals, which have none."""
    names = [n for n in of_seeds[0] if len(of_seeds) == 1 or not n.endswith(("_low", "_high"))]
    return {name: math.fsum(seed[name] for seed in of_seeds) / len(of_seeds) for name in names}


def shown(params: dict[str, object]) -> str:
    """Returns a point as a person reads it: ``alpha 1.88, max_peers 1``."""
    return ", ".join(f"{n} {v:.3g}" if isinstance(v, float) else f"{n} {v}" for n, v in params.items())


@contextmanager
def _stops_at_signals(stopping: threading.Event) -> Iterator[None]:
    """Ends the runs after the step under way at the first Ctrl-C or SIGTERM, and at once at the second."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stopping.is_set():
            os._exit(128 + number)  # the runs notice, and end themselves at once
        stopping.set()
        print("\nStopping after the steps under way; the same command goes on.", flush=True)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
