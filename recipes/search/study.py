"""The study that remembers trials: Optuna in a file or a database, so that workers share it and nothing is done twice."""

import logging
import os
import secrets
import shutil
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...artifacts.files.locks import Lock, is_held
from ...editing.errors import RequestError, one_line
from ..common.search_space import Dimension, Space
from ..jobs.local import is_alive
from .figures import Guard, Objective, front

if TYPE_CHECKING:
    from .request import Request

log = logging.getLogger(__name__)
NAME = "excise"
LOCKS = "locks"
"""Folder with a lock of each worker, which dies with it, and one of asking."""
NO_TRIAL = -1
GONE_AFTER = 3600.0
"""Seconds after which a trial of another machine's worker is done again where the file system knows no locks."""
SETTINGS, FIGURES, CONSTRAINTS, ERROR, TOKENS, SECONDS = (
    "settings", "figures", "constraints", "error", "generated_tokens", "seconds",
)  # fmt: skip
"""What is kept of a trial, beside its values."""


@dataclass(frozen=True)
class Done:
    """A trial that ended."""

    number: int
    state: str
    """complete, pruned or failed."""
    values: tuple[float, ...]
    params: Mapping[str, Any]
    settings: Mapping[str, Any]
    figures: Mapping[str, Mapping[str, float]]
    """By size: few or all."""
    feasible: bool
    error: str
    generated_tokens: int
    seconds: float


class Study:
    """Asks for trials and remembers them."""

    @classmethod
    def of(cls, request: "Request") -> "Study":
        """The study of a search; see ``__init__`` for what it raises."""
        rules = request.rules
        return cls(
            request.storage,
            request.space,
            rules.objectives,
            rules.guards,
            request.base.seed,
            request.trials,
            request.folder,
            request.first,
        )

    def __init__(
        self,
        url: str,
        space: Space,
        objectives: Sequence[Objective],
        guards: Sequence[Guard],
        seed: int,
        trials: int,
        folder: Path | None = None,
        first: Sequence[Mapping[str, Any]] = (),
    ):
        """Open the study, or make it.

        Args:
            folder: Of the search, which all workers share; there they tell by locks who still lives.
            first: Values of the first trials, which are no draws.

        Raises:
            RequestError: The storage cannot be opened, or holds a study of other objectives.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", module="optuna")
        self.optuna, self.space, self.objectives, self.guards = optuna, space, objectives, guards
        self.seed, self.first, self.drawn_first = seed, first, min(10, max(2, trials // 4))
        self.folder, self.lock = folder, ""
        ways: list[Any] = ["minimize" if one.way == "min" else "maximize" for one in objectives]
        try:
            self.study = optuna.create_study(
                storage=url, sampler=self._sampler(NO_TRIAL), study_name=NAME, directions=ways, load_if_exists=True
            )
        except Exception as error:  # what a database's driver raises is its own
            raise RequestError(
                f"the storage {without_password(url)} cannot be opened ({one_line(error)}); give a URL that SQLAlchemy reads,"
                " such as sqlite:////ABSOLUTE/PATH.db or postgresql://USER@HOST/NAME, and install its driver"
            ) from error
        if [one.name.lower() for one in self.study.directions] != ways:
            raise RequestError("the study in the storage has other objectives; give another --out or --storage")

    def _sampler(self, number: int) -> Any:
        # A seed for each trial, because a sampler's own state is lost when a search ends.
        sampler = self.optuna.samplers.TPESampler(
            seed=(self.seed * 1_000_003 + number) % 2**32,
            multivariate=True,
            n_startup_trials=len(self.first) + self.drawn_first,
            constraints_func=(lambda trial: trial.user_attrs.get(CONSTRAINTS, [1.0] * len(self.guards)))
            if self.guards
            else None,
        )
        if not 0 <= number < len(self.first):
            return sampler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
            return self.optuna.samplers.PartialFixedSampler(dict(self.first[number]), sampler)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While this lasts, workers on any host can tell that this one lives, by a lock that dies with its process."""
        if self.folder is None:
            yield
            return
        self.lock = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        path = self.folder / LOCKS / self.lock
        path.parent.mkdir(exist_ok=True)
        lock = Lock.take(path)
        try:
            yield
        finally:
            self.lock = ""
            path.unlink(missing_ok=True)
            if lock is not None:
                lock.release()

    def ask(self, trials: int) -> tuple[Any, dict[str, Any]] | None:
        """The next trial, with its values; None where ``trials`` ended or are under way, as another worker saw too."""
        with self._one_at_a_time():
            if self._knows_locks():
                self._redo()
            return self._asked(trials)

    def _asked(self, trials: int) -> tuple[Any, dict[str, Any]] | None:
        # What is drawn together is decided here, so that no trial's own sampler may be left from the one before.
        self.study.sampler = self._sampler(NO_TRIAL)
        trial = self.study.ask()
        before = self._before(trial.number)
        if before >= trials:
            # Two workers asked for the last one at the same moment. Without a record, what failed does not count.
            self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
            return None
        # What was killed does not count, so that the draws after it are those of a search that was not killed. Values are
        # drawn when they are asked for, so the seed is that of this trial's number, which no other worker has.
        self.study.sampler = self._sampler(before)
        trial.set_user_attr("worker", [socket.gethostname(), os.getpid()])
        trial.set_user_attr("lock", self.lock)
        trial.set_user_attr("seen", time.time())
        values = {name: _drawn(trial, name, one) for name, one in self.space.items()}
        return trial, values

    def tell(self, trial: Any, state: str, values: Sequence[float] | None, record: Mapping[str, Any]) -> None:
        """Keep what a trial gave."""
        states = self.optuna.trial.TrialState
        kinds = {"complete": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}
        with self._one_at_a_time():
            try:
                for key, value in record.items():
                    trial.set_user_attr(key, value)
            except self.optuna.exceptions.UpdateFinishedTrialError:
                # As after a broken network, or an hour on a file system without locks.
                log.warning("trial %d was given up for lost and is done again; this result is left out", trial.number)
                return
            self.study.tell(trial, values, state=kinds[state])

    def redo_what_was_killed(self) -> int:
        """Queue the trials that a worker did not end, and return their number."""
        with self._one_at_a_time():
            return self._redo()

    def _redo(self) -> int:
        count = 0
        for trial in self._unfinished():
            if not self._is_gone(trial):
                continue
            self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
            # What was killed while it drew its values draws them again.
            if trial.params.keys() >= self.space.keys():
                self.study.enqueue_trial(trial.params, user_attrs={"again": trial.number})
                count += 1
            if self.folder:
                edit = trial_folder(self.folder, trial.number)
                for rest in (edit, work_folder(edit)):
                    shutil.rmtree(rest, ignore_errors=True)
                if lock := trial.user_attrs.get("lock"):
                    (self.folder / LOCKS / lock).unlink(missing_ok=True)
        return count

    def running(self) -> int:
        """Trials that some worker is at; where locks tell, without those of workers that are gone."""
        knows = self._knows_locks()
        return sum(not (knows and self._is_gone(trial)) for trial in self._unfinished())

    def _unfinished(self) -> list[Any]:
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.name == "RUNNING"]

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """While this lasts, no other worker asks, tells, or queues what was killed."""
        if self.folder is None:
            yield
            return
        path = self.folder / LOCKS / "asking"
        path.parent.mkdir(exist_ok=True)
        while (lock := Lock.take(path)) is None:
            time.sleep(0.05)
        try:
            yield
        finally:
            lock.release()

    def _knows_locks(self) -> bool:
        """Whether locks tell which workers live; only one that is at work itself knows."""
        return bool(self.folder and self.lock and is_held(self.folder / LOCKS / self.lock))

    def _is_gone(self, trial: Any) -> bool:
        """Whether nobody is at a trial any more."""
        about = trial.user_attrs
        if self.folder and about.get("lock") and (held := is_held(self.folder / LOCKS / about["lock"])) is not None:
            return not held
        host, process = about.get("worker", ["", 0])
        if host == socket.gethostname():
            return process == os.getpid() or not is_alive(int(process))
        return time.time() - float(about.get("seen", 0.0)) > GONE_AFTER

    def _before(self, number: int) -> int:
        """Trials of lower numbers that ended or that some worker is at."""
        return sum(one.number < number for one in (*self.done(), *self._unfinished()))

    def done(self) -> list[Done]:
        """Every trial that ended, without those that were killed and are done again."""
        trials = self.study.get_trials(deepcopy=False)
        # Some were killed while they told of an error.
        again = {trial.user_attrs.get("again") for trial in trials}
        return [
            _done(trial)
            for trial in trials
            if trial.state.name in ("COMPLETE", "PRUNED")
            or (trial.state.name == "FAIL" and ERROR in trial.user_attrs and trial.number not in again)
        ]

    def front(self, done: Sequence[Done]) -> list[Done]:
        """The complete trials that keep every guard and that no other beats, the first objective first."""
        signs = [1.0 if one.way == "min" else -1.0 for one in self.objectives]
        points = {
            one.number: [sign * value for sign, value in zip(signs, one.values, strict=True)]
            for one in done
            if one.state == "complete" and one.feasible
        }
        numbers = sorted(front(points), key=lambda number: points[number])
        by_number = {one.number: one for one in done}
        return [by_number[number] for number in numbers]


def trial_folder(folder: Path, number: int) -> Path:
    """Where a trial's edit stands."""
    return folder / "trials" / f"{number:04}"


def work_folder(trial: Path) -> Path:
    """Where a trial works until its edit stands."""
    return trial.with_name(f".{trial.name}.work")


def without_password(url: str) -> str:
    """A storage's address as it may be shown."""
    scheme, separator, rest = url.partition("://")
    names, at, place = rest.rpartition("@")
    return f"{scheme}{separator}{names.partition(':')[0]}{at}{place}" if at else url


def file_in(folder: Path) -> str:
    """The address of the study that a search keeps in its own folder."""
    return f"sqlite:///{(folder / 'study.db').absolute()}"


def _drawn(trial: Any, name: str, one: Dimension) -> Any:
    if one.choices:
        return trial.suggest_categorical(name, list(one.choices))
    if isinstance(one.low, int) and isinstance(one.high, int):
        return trial.suggest_int(name, one.low, one.high, log=one.log)
    return trial.suggest_float(name, one.low, one.high, log=one.log)


def _done(trial: Any) -> Done:
    about = trial.user_attrs
    state = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}[trial.state.name]
    return Done(
        trial.number,
        state,
        tuple(trial.values) if state == "complete" else (),
        dict(trial.params),
        about.get(SETTINGS, {}),
        about.get(FIGURES, {}),
        all(value <= 0 for value in about.get(CONSTRAINTS, [])),
        about.get(ERROR, ""),
        int(about.get(TOKENS, 0)),
        float(about.get(SECONDS, 0.0)),
    )
