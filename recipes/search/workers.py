"""A search by several workers, each an excise process of its own that shares the study with the others."""

from ...editing.errors import RequestError
from ..jobs.engines import Engine, Local, parse_engine
from ..jobs.job import Job
from ..jobs.run import run_jobs
from .page import write_page
from .request import Request, read_record
from .results import SearchResults, results_of
from .study import Study

ON_A_CLUSTER = 4
"""Workers on a cluster, where nothing says how many."""


def prepare(request: Request, jobs: str, workers: int) -> tuple[Engine, int]:
    """The engine, and the number of workers.

    Raises:
        RequestError: The engine is none, or the storage has a password, which no job may be told.
    """
    engine = parse_engine(jobs)
    if request.folder.exists() and read_record(request.folder)["storage"] is None:
        raise RequestError(
            "a storage with a password cannot be told to jobs, because their records are files; let the database take"
            " the password from ~/.pgpass or the like, or start the workers yourself with --worker"
        )
    return engine, workers or (engine.at_once if isinstance(engine, Local) else ON_A_CLUSTER)


def run(request: Request, engine: Engine, workers: int) -> SearchResults:
    """Let workers search until as many trials ended as were asked for.

    Raises:
        RequestError: A worker failed; its log is named. Or trials are missing, which nobody here can end.
    """
    # Made here, so that workers do not make it twice.
    study = Study.of(request)
    command = ("search", "--worker", str(request.folder.absolute()), "--trials", str(request.trials))
    # Workers of an earlier call with fewer trials are other jobs.
    folder = request.folder / f"workers-{request.trials}"
    jobs = [Job(f"worker-{number}", command, request.folder, own_folder=False) for number in range(workers)]
    outcomes = run_jobs(jobs, engine, folder, enough=lambda: len(study.done()) >= request.trials)
    done = study.done()
    if len(done) < request.trials and (failed := [one for one in outcomes if one.state == "failed"]):
        raise RequestError(
            f"{len(failed)} of {workers} workers failed, the first: {failed[0].error}; see {failed[0].log}"
        )
    if len(done) < request.trials:
        raise RequestError(
            f"{len(done)} of {request.trials} trials ended; a worker that this command did not start is at the others, or was"
            " lost within the last hour on a file system without locks. Later go on with"
            f" excise search --worker {request.folder} --trials {request.trials}"
        )
    results = results_of(request, done, study.front(done))
    write_page(request, done, study.front(done))
    return results
