"""What callers may pass to the engine's calls: one prompt or several, parameters or keywords, and agents."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lragent_jax.models.adapter import Adapter
from lragent_jax.models.errors import InputError
from lragent_jax.sampling_params import SamplingParams
from lragent_jax.trajectory import Trajectory

Ids = Sequence[int] | np.ndarray
Prompt = Trajectory | str | Ids


def is_batch(prompt) -> bool:
    """A list of prompts, as against one: text, a trajectory, or a flat sequence of ids."""
    if isinstance(prompt, str | Trajectory | np.ndarray):
        return False
    if not isinstance(prompt, list | tuple):
        raise InputError(f"a prompt is a trajectory, text, token ids, or a list of them, not {type(prompt).__name__}")
    return not prompt or not all(isinstance(item, int | np.integer) for item in prompt)


def per_row(value, count: int, what: str) -> list:
    """A value for every row: one for all, or a list of as many."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise InputError(f"{len(value)} values of {what} for {count} prompts")
    return list(value)


def one_params(params: SamplingParams | None, sampling: dict[str, Any]) -> SamplingParams:
    """Those of one prompt, given as they are or as keywords."""
    if params is not None:
        _refuse_both(sampling)
        return _checked_params(params)
    unknown = set(sampling) - {field.name for field in dataclasses.fields(SamplingParams)}
    if unknown:
        raise InputError(f"unknown sampling keywords: {', '.join(sorted(unknown))}")
    return SamplingParams(**sampling)


def params_per_row(
    params: SamplingParams | Sequence[SamplingParams] | None, sampling: dict[str, Any], count: int
) -> list[SamplingParams]:
    """Those of `count` prompts: one for all, keywords for all, or a list of as many."""
    if params is None or isinstance(params, SamplingParams):
        return [one_params(params, sampling)] * count
    _refuse_both(sampling)
    return [_checked_params(row) for row in per_row(params, count, "params")]


def _refuse_both(sampling: dict[str, Any]) -> None:
    if sampling:
        raise InputError(f"give either params or keywords, not both ({', '.join(sampling)})")


def _checked_params(params: Any) -> SamplingParams:
    if isinstance(params, SamplingParams):
        return params
    if isinstance(params, list | tuple):
        raise InputError("a list of params goes with a list of prompts; for one prompt give one SamplingParams")
    raise InputError(
        f"params must be a SamplingParams, not {type(params).__name__}: give its fields by name, as in "
        "max_new_tokens=64"
    )


def check_sources(adapters: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Where agents' adapters come from, before the first of them is read: paths or adapters by name."""
    if adapters is None:
        return {}
    if not isinstance(adapters, Mapping):
        raise InputError(f"adapters are given by name, as in {{'plan': FOLDER}}, not as {type(adapters).__name__}")
    for name, source in adapters.items():
        if not isinstance(source, str | os.PathLike | Adapter):
            raise InputError(f"the adapter of agent {name!r} is a folder or an Adapter, not {source!r}")
    return adapters


def check_positive(value: Any, what: str) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise InputError(f"{what} must be a positive integer, not {value!r}")
    return int(value)
