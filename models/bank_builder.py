"""From adapters on the host to the one `AdapterBank` on the device."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lragent_jax.models.adapter import Adapter
from lragent_jax.models.adapter_bank import CACHED_TARGETS, TARGETS, AdapterBank, LoraPair
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import AdapterError
from lragent_jax.models.problems import listing
from lragent_jax.models.sharding import lora_shardings
from lragent_jax.models.tensor_parallel import WHOLE


def bank_ranks(adapters: Sequence[Adapter]) -> dict[str, int]:
    """The rank each target needs so that all the adapters fit; targets that none adapts are left out."""
    ranks = {target: max((adapter.rank(target) for adapter in adapters), default=0) for target in TARGETS}
    return {target: rank for target, rank in ranks.items() if rank}


def assign_groups(adapters: Sequence[Adapter]) -> tuple[int | None, ...]:
    """Each adapter's A-group: its row of `lora_a` for k and v alike, numbered by first appearance.

    None for an adapter that touches no cached target: it belongs to no group, its B there is zero.
    """
    rows: dict[str, int] = {}
    hashes = [adapter.a_group_hash for adapter in adapters]
    return tuple(None if digest is None else rows.setdefault(digest, len(rows)) for digest in hashes)


def build_bank(
    config: LlamaConfig,
    adapters: Sequence[Adapter],
    dtype,
    *,
    num_adapters: int | None = None,
    num_groups: int | None = None,
    ranks: Mapping[str, int] | None = None,
    mesh: Mesh | None = None,
) -> AdapterBank:
    """The bank in which `adapters[i]` has id i + 1 and A-group `assign_groups(adapters)[i]`.

    `num_adapters` counts the rows A including the empty adapter's, `num_groups` the rows g of `lora_a` for the cached
    targets, `ranks` the ranks by target; each defaults to what the adapters need. All layers hold a pair for every
    target of `ranks`, and what is not used is zero, so banks of equal sizes have equal shapes whatever they hold: an
    adapter can be loaded later without compiling anything anew. On a `mesh` it lies as `bank_shardings` says.

    Raises `AdapterError` for an adapter that does not fit the model, the ranks or the rows, and for one whose numbers
    overflow `dtype`.
    """
    dtype = jnp.dtype(dtype)
    for adapter in adapters:
        adapter.check_fits(config)
    groups = assign_groups(adapters)
    used_groups = len(set(groups) - {None})
    num_adapters = 1 + len(adapters) if num_adapters is None else num_adapters
    num_groups = max(1, used_groups) if num_groups is None else num_groups
    ranks = bank_ranks(adapters) if ranks is None else ranks
    _check_room(adapters, used_groups, num_adapters, num_groups, ranks)

    rows = {target: _rows(target, groups, num_adapters) for target in TARGETS if ranks.get(target)}
    num_rows = {target: num_groups if target in CACHED_TARGETS else num_adapters for target in rows}
    shapes = config.projection_shapes()
    layers = []
    for layer in range(config.num_layers):
        pairs = {}
        for target, row_of in rows.items():
            (in_width, out_width), rank = shapes[target], ranks[target]
            lora_a = np.zeros((num_rows[target], in_width, rank), dtype)
            lora_b = np.zeros((num_adapters, rank, out_width), dtype)
            for adapter_id, adapter in enumerate(adapters, start=1):
                if (layer, target) in adapter.weights:
                    pair = adapter.weights[layer, target]
                    used = pair.lora_a.shape[1]
                    lora_a[row_of[adapter_id], :, :used] = _cast(pair.lora_a, dtype, adapter)
                    lora_b[adapter_id, :used] = _cast(pair.lora_b, dtype, adapter)
            pairs[target] = LoraPair(*jax.device_put((lora_a, lora_b), lora_shardings(target, mesh)))
        layers.append(pairs)
    everywhere = None if mesh is None else NamedSharding(mesh, WHOLE)
    return AdapterBank(layers=tuple(layers), group_of=jax.device_put(rows, everywhere))


def _rows(target: str, groups: Sequence[int | None], num_adapters: int) -> np.ndarray:
    """i32 [A]: each adapter's row of `lora_a`. A row read with B = 0 may be any: ids are never negative."""
    if target not in CACHED_TARGETS:
        return np.arange(num_adapters, dtype=np.int32)
    rows = np.zeros(num_adapters, np.int32)
    rows[1 : 1 + len(groups)] = [group or 0 for group in groups]
    return rows


def _check_room(adapters, used_groups: int, num_adapters: int, num_groups: int, ranks: Mapping[str, int]) -> None:
    problems = []
    if len(adapters) >= num_adapters:
        problems.append(f"{len(adapters)} adapters in a bank for {num_adapters - 1}: unload one, or raise max_adapters")
    if used_groups > num_groups:
        problems.append(
            f"{used_groups} A-groups in a bank for {num_groups}: stack the adapters into one, or raise max_adapters"
        )
    for adapter in adapters:
        for target in adapter.targets:
            if adapter.rank(target) > ranks.get(target, 0):
                problems.append(
                    f"{adapter.source} has rank {adapter.rank(target)} on {target}, the bank {ranks.get(target, 0)}: "
                    "raise max_rank"
                )
    if problems:
        raise AdapterError(listing("the adapter bank has no room:", problems))


def _cast(array: np.ndarray, dtype: np.dtype, adapter: Adapter) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all():
        raise AdapterError(f"{adapter.source} holds numbers that overflow {dtype}; use a wider dtype")
    return cast
