"""Names of agents, and where their adapters are in the bank."""

import dataclasses
from collections.abc import Iterable, Mapping

from jax.sharding import Mesh

from lragent_jax.flat_tree import FlatTree
from lragent_jax.models.adapter import Adapter
from lragent_jax.models.adapter_bank import CACHED_TARGETS, AdapterBank
from lragent_jax.models.bank_builder import assign_groups, bank_ranks, build_bank
from lragent_jax.models.config import LlamaConfig
from lragent_jax.models.errors import AdapterError
from lragent_jax.sharing import BASE_MODEL, AdapterKeys, PageKey


@dataclasses.dataclass(frozen=True)
class LoadedAdapter:
    """An adapter's row of the bank, its row among the A-groups, and the keys of its pages."""

    bank_row: int
    group_row: int
    keys: AdapterKeys


BASE_MODEL_ROW = LoadedAdapter(bank_row=0, group_row=0, keys=BASE_MODEL)


class AdapterRegistry:
    """The loaded adapters by name, and the bank built from them.

    Rows and ranks of the bank never shrink, and start at the sizes asked for: within them, loading and unloading
    changes no shape of the bank.
    """

    def __init__(
        self,
        config: LlamaConfig,
        dtype,
        adapters: Mapping[str, Adapter],
        *,
        max_adapters: int,
        max_rank: int,
        mesh: Mesh | None = None,
    ):
        self._config, self._dtype, self._mesh = config, dtype, mesh
        self._max_adapters, self._max_rank = max_adapters, max_rank
        self._ranks: dict[str, int] = {}
        self._adapters: dict[str, Adapter] = {}
        self._loaded: dict[str, LoadedAdapter] = {}
        self.bank = AdapterBank.empty(config.num_layers)
        self.flat_bank = FlatTree(self.bank)  # for calls of programs
        for name, adapter in adapters.items():
            adapter.check_fits(config)
            _check_name(name)
        if adapters:
            self._rebuild(dict(adapters))

    @property
    def names(self) -> list[str]:
        return list(self._adapters)

    @property
    def keys(self) -> list[AdapterKeys]:
        """Those of every loaded adapter, in the order of loading."""
        return [loaded.keys for loaded in self._loaded.values()]

    @property
    def a_groups(self) -> list[str]:
        """The distinct A-groups of the loaded adapters."""
        return list(dict.fromkeys(keys.a_group for keys in self.keys if keys.a_group is not None))

    @property
    def low_rank_ranks(self) -> dict[str, int]:
        """r of the low-rank cache for each cached target that an adapter adapts."""
        return {target: rank for target, rank in self._ranks.items() if target in CACHED_TARGETS}

    def adapter(self, name: str) -> Adapter:
        self.find(name)
        return self._adapters[name]

    def find(self, name: str | None) -> LoadedAdapter:
        """The adapter that agent `name` runs; None is the base model. Raises `AdapterError` for an unknown name."""
        if name is None:
            return BASE_MODEL_ROW
        if not isinstance(name, str) or name not in self._loaded:
            raise unknown_agent(name, self._loaded)
        return self._loaded[name]

    def find_content(self, content: str | None) -> LoadedAdapter | None:
        """A loaded adapter by its content hash, None for the base model; None if there is none."""
        if content is None:
            return BASE_MODEL_ROW
        return next((loaded for loaded in self._loaded.values() if loaded.keys.content == content), None)

    def group_row(self, key: PageKey) -> int:
        """The bank's row of A for the pages under a low-rank key."""
        for loaded in self._loaded.values():
            if key.owner in (loaded.keys.a_group, loaded.keys.content):
                return loaded.group_row
        raise KeyError(key)

    def add(self, name: str, adapter: Adapter) -> None:
        """Loads one more; raises `AdapterError`, and changes nothing, if the name is taken or the shapes are wrong."""
        _check_name(name)
        if name in self._adapters:
            raise AdapterError(f"agent {name!r} is loaded already; unload it first or choose another name")
        adapter.check_fits(self._config)
        self._rebuild({**self._adapters, name: adapter})

    def remove(self, name: str) -> None:
        self.find(name)
        self._rebuild({other: adapter for other, adapter in self._adapters.items() if other != name})

    def _rebuild(self, adapters: dict[str, Adapter]) -> None:
        needed = bank_ranks(list(adapters.values()))
        ranks = {
            target: max(needed.get(target, 0), self._ranks.get(target, 0), self._max_rank)
            for target in {**self._ranks, **needed}
        }
        capacity = max(self._max_adapters, len(adapters))
        group_rows = assign_groups(list(adapters.values()))
        bank = build_bank(
            self._config, list(adapters.values()), self._dtype,
            num_adapters=capacity + 1, num_groups=max(capacity, 1), ranks=ranks,
            mesh=self._mesh,
        )  # fmt: skip
        self._loaded = {
            name: LoadedAdapter(
                bank_row=row + 1,
                group_row=group_rows[row] or 0,
                keys=AdapterKeys(adapter.content_hash, adapter.a_group_hash),
            )
            for row, (name, adapter) in enumerate(adapters.items())
        }
        self.bank, self.flat_bank = bank, FlatTree(bank)
        self._adapters, self._ranks, self._max_adapters = adapters, ranks, capacity


def unknown_agent(name: object, known: Iterable[str]) -> AdapterError:
    listed = ", ".join(map(repr, known)) or "none is loaded"
    return AdapterError(f"unknown agent {name!r}; there are: {listed} (None is the base model)")


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise AdapterError(f"an agent's name must be a non-empty string, not {name!r}")
