"""What runs cells beside each other: a backend of joblib, and what it needs to be there first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from vardrop.optional import needed

LOCAL = "loky"  # processes of this machine


@contextlib.contextmanager
def engine(backend: str, jobs: int) -> Iterator[bool]:
    """Let joblib use a backend until the block ends.

    ``dask`` takes the client of this process if there is one; else the scheduler that ``DASK_SCHEDULER_ADDRESS`` names;
    else it starts workers on this machine. ``ray`` finds its cluster through ``RAY_ADDRESS``.

    Args:
        backend: ``"loky"``, ``"dask"``, ``"ray"`` or another name that joblib knows.
        jobs: how many processes to start, where they have to be started.

    Yields:
        Whether it hands over every result as soon as it is there; else all of them come at the end.

    Raises:
        ValueError: for a backend that joblib does not know.
        ModuleNotFoundError: if its package is not installed.
        ConnectionError: if dask's scheduler does not answer.
    """
    joblib = needed("joblib", "reproduce", "reproduce")
    with contextlib.ExitStack() as stack:
        if backend == "dask":
            stack.enter_context(_dask(jobs))
        elif backend == "ray":
            _package("ray.util.joblib", backend).register_ray()
        try:
            stack.enter_context(joblib.parallel_config(backend, n_jobs=jobs))
        except ValueError as error:
            raise ValueError(
                f"vardrop.reproduce: backend must be loky, dask, ray or another one that joblib knows, got {backend!r}"
            ) from error
        yield joblib.parallel.get_active_backend()[0].supports_return_generator


def _package(module: str, backend: str) -> Any:
    try:
        return needed(module, "reproduce")
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ModuleNotFoundError(
            f"vardrop.reproduce: backend {backend} needs the package {package}, got an environment without it; "
            f"pip install {package}",
            name=package,
        ) from error


@contextlib.contextmanager
def _dask(jobs: int) -> Iterator[None]:
    distributed = _package("distributed", "dask")
    dask = _package("dask", "dask")
    with contextlib.ExitStack() as stack:
        try:
            distributed.get_client()
        except ValueError:  # there is none in this process yet
            address = dask.config.get("scheduler-address", None)
            local = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
            try:
                stack.enter_context(distributed.Client(address) if address else distributed.Client(**local))
            except OSError as error:
                raise ConnectionError(
                    f"vardrop.reproduce: dask's scheduler must answer, got nothing from {address}; start it, or unset "
                    "DASK_SCHEDULER_ADDRESS for workers on this machine"
                ) from error
        yield
