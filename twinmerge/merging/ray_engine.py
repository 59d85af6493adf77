"""A divided build on a Ray cluster: the parts of `build.py` as tasks, joined by the caller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..artifact.format import Manifest
from ..errors import MissingExtra
from ..recipe import Recipe
from .build import DEFAULT_SHARD_BYTES, Progress, build_part, join_parts
from .journal import Workspace


def build_on_ray(
    recipe: Recipe,
    out: Path | str,
    parts: int | None = None,
    *,
    written: Recipe | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
    restart: bool = False,
) -> Manifest:
    """`build` as `parts` tasks of Ray (default: one for each CPU of the cluster).

    Joins the cluster that is set up (`ray.init`, or the address in RAY_ADDRESS), or starts one on
    this machine. Workers must see the models and the disk of `out` under the same paths. A task
    that dies is run again by Ray and goes on from its journal; so does this call, given again.

    Raises `MissingExtra` without Ray, and whatever `build` raises.
    """
    try:
        import ray
        from ray.exceptions import RayTaskError
    except ImportError:
        raise MissingExtra(
            "--engine ray: needs Ray, which is not installed. pip install 'twinmerge[ray]'"
        ) from None
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        if restart:  # here, once: a task that Ray runs again must go on
            Workspace(Path(out)).discard()
        count = parts or max(1, int(ray.cluster_resources().get("CPU", 1)))
        task = ray.remote(_part).options(num_cpus=1, max_retries=2)
        settings: dict[str, Any] = recipe.model_dump(mode="json", exclude_none=True)
        target = str(Path(out).absolute())
        left = {
            task.remote(settings, target, index, count, shard_bytes): index
            for index in range(count)
        }
        while left:
            done, _ = ray.wait(list(left), num_returns=1)
            try:
                ray.get(done[0])
            except RayTaskError as problem:
                for other in left:
                    ray.cancel(other)
                raise problem.cause from None  # what went wrong, not where
            index = left.pop(done[0])
            if progress:
                progress(count - len(left), count, f"part {index}")
    finally:
        if started:
            ray.shutdown()
    return join_parts(recipe, out, count, written=written, shard_bytes=shard_bytes)


def _part(recipe: dict[str, Any], out: str, index: int, count: int, shard_bytes: int) -> None:
    build_part(Recipe.model_validate(recipe), out, index, count, shard_bytes=shard_bytes)
