"""Which pages of open trajectories go beside those of the prefix cache, and how much their adapters count."""

import dataclasses
import math

import pytest

from lragent_jax.adapter_use import AdapterUse
from lragent_jax.eviction import choose_victims, evict
from lragent_jax.page_pool import PagePool
from lragent_jax.page_run import HOLE, PageRun
from lragent_jax.prefix_tree import Path, PrefixTree
from lragent_jax.sharing import PageKey, PoolName

P = 2
BASE, LR_A, LR_B = PageKey("base", None), PageKey("low_rank", "a"), PageKey("low_rank", "b")


class Cache:
    """Two pools, a tree and trajectories, on a clock that is set by hand."""

    def __init__(self):
        self.now = 0.0
        self.pools: dict[PoolName, PagePool] = {"base": PagePool(64), "low_rank": PagePool(64)}
        self.tree = PrefixTree(P, lambda: self.now)
        self.holders: list[Holder] = []

    def open(self, num_tokens: int, *keys: PageKey, writer: str = "plan") -> "Holder":
        runs = {key: PageRun(self.pools[key.pool], P) for key in keys}
        for run in runs.values():
            run.prepare(0, num_tokens)
            run.commit(0, num_tokens, writer)
        self.holders.append(Holder(runs, last_used=self.now))
        return self.holders[-1]

    def take(self, name: PoolName, count: int, use=lambda key: 1.0, writers=None) -> int:
        pool = self.pools[name]
        victims, freed = choose_victims(
            self.tree, {name: (pool, count)}, writers or {}, lambda index: 1.0 + index, self.holders, use
        )
        before = pool.num_free
        evict(self.tree, victims)
        assert writers or pool.num_free - before == freed[name]
        return freed[name]


@dataclasses.dataclass
class Holder:
    """A trajectory."""

    runs: dict[PageKey, PageRun]
    last_used: float = 0.0
    visits: int = 1
    reading: tuple[PageKey, ...] = ()

    @property
    def idle_runs(self) -> dict[PageKey, PageRun]:
        return {key: run for key, run in self.runs.items() if key not in self.reading}

    def pages_of(self, key: PageKey) -> list[int]:
        """The indices of its pages."""
        return [index for index, page in enumerate(self.runs[key].pages) if page != HOLE]

    def fork(self) -> "Holder":
        return Holder({key: run.fork() for key, run in self.runs.items()}, self.last_used)


@pytest.fixture
def cache() -> Cache:
    return Cache()


def test_a_trajectory_goes_from_its_end_and_the_record_stays(cache):
    one = cache.open(7, BASE)
    assert cache.take("base", 2) == 2
    assert one.pages_of(BASE) == [0, 1]
    run = one.runs[BASE]
    assert (run.missing(7), [(span.start, span.stop) for span in run.spans]) == ([(4, 7)], [(0, 7)])


def test_what_was_not_used_for_long_goes_first(cache):
    old = cache.open(4, BASE)
    cache.now = 9.0
    new = cache.open(8, BASE)
    assert cache.take("base", 3) == 3
    assert (old.pages_of(BASE), new.pages_of(BASE)) == ([], [0, 1, 2])


def test_a_running_call_keeps_what_it_reads_and_what_it_shares(cache):
    one = cache.open(8, BASE, LR_A)
    cache.holders.append(other := one.fork())
    for run in other.runs.values():
        run.truncate(4)
    other.reading = (BASE,)
    assert cache.take("base", 9) == 2
    assert one.pages_of(BASE) == [0, 1]
    assert other.pages_of(BASE) == [0, 1]
    assert cache.take("low_rank", 9) == 2, "the running call has not opened them; the end went with its base pages"
    assert other.pages_of(LR_A) == []


def test_a_page_goes_from_all_who_hold_it_at_once(cache):
    one = cache.open(8, BASE)
    cache.holders.append(two := one.fork())
    two.last_used = 5.0
    cache.tree.insert(Path(), list(range(8)), one.runs)
    assert cache.take("base", 1) == 1
    assert one.pages_of(BASE) == two.pages_of(BASE) == [0, 1, 2]
    assert len(list(cache.tree.nodes())) == 3


def test_a_base_page_takes_along_what_is_read_beside_it(cache):
    one = cache.open(6, BASE, LR_A, LR_B)
    cache.holders.append(two := one.fork())
    two.reading = (LR_B,)
    cache.take("base", 1)
    assert [one.pages_of(key) for key in (BASE, LR_A, LR_B)] == [[0, 1]] * 3
    assert [two.pages_of(key) for key in (BASE, LR_A, LR_B)] == [[0, 1], [0, 1], [0, 1, 2]]
    assert (cache.pools["low_rank"].num_used, cache.pools["base"].num_used) == (5, 2)


def test_low_rank_pages_go_alone(cache):
    one = cache.open(6, BASE, LR_A)
    assert cache.take("low_rank", 2) == 2
    assert (one.pages_of(BASE), one.pages_of(LR_A)) == ([0, 1, 2], [0])


def test_what_nobody_could_write_again_stays_and_what_is_before_it_may_go(cache):
    one = cache.open(4, BASE, LR_A)
    for run in one.runs.values():
        run.prepare(4, 6)
        run.commit(4, 6, "gone")
    one.runs[LR_A].writer_unloaded("gone")
    assert cache.take("base", 9) == 2, "its low-rank page would go with the last one"
    assert (one.pages_of(BASE), one.pages_of(LR_A)) == ([2], [2])


def test_a_page_about_to_be_copied_is_left_to_its_writer(cache):
    one = cache.open(4, BASE)
    two = one.fork()
    page = one.runs[BASE].pages[1]
    assert cache.take("base", 1) == 0
    assert cache.take("base", 1, writers={(cache.pools["base"], page): 1}) == 1
    assert two.runs[BASE].pages[1] == page
    assert cache.pools["base"].num_references(page) == 1


def test_pages_of_adapters_in_demand_stay(cache):
    cache.open(4, BASE, LR_A)
    rare, often = cache.open(4, BASE, LR_A), cache.open(4, BASE, LR_B)
    use = {BASE: 1.0, LR_A: 0.01, LR_B: 0.9}
    assert cache.take("low_rank", 4, use.__getitem__) == 4
    assert (rare.pages_of(LR_A), often.pages_of(LR_B)) == ([], [0, 1])


def test_expected_use_is_fastlibras():
    use = AdapterUse(window=9)
    assert use.expected(LR_A) == 1.0, "nothing is known yet"
    for _ in range(20):
        use.note([[BASE, LR_A], [BASE, LR_A], [BASE, LR_B]], batch_size=3)
    share = (6 + 1) / (9 + 1)
    assert use.expected(LR_A) == pytest.approx(1 - (1 - share) ** 3)
    assert use.expected(BASE) == 1.0
    assert math.log(use.expected(PageKey("low_rank", "never seen"))) > -9, "worth something: it may be compared"


def test_a_record_that_contradicts_the_trees_takes_nothing(cache):
    """The trajectory's own pages went; those of the same tokens under other writers are no replacement."""
    mine, other = cache.open(6, BASE, writer="plan"), cache.open(6, BASE, writer="action")
    cache.tree.insert(Path(), list(range(6)), other.runs)
    mine.runs[BASE].give_up([0, 1, 2])
    assert cache.tree.reuse(Path(), list(range(6)), mine.runs) == []
    cache.tree.drop(lambda key: False)
    same = cache.open(6, BASE, writer="plan")
    cache.tree.insert(Path(), list(range(6)), same.runs)
    assert [each.indices for each in cache.tree.reuse(Path(), list(range(6)), mine.runs)] == [[0, 1, 2]]


def test_contexts_that_read_each_other_differently_part_ways(cache):
    """A base page by an adapter of one group rests on low-rank pages that somebody else may have written."""
    ids = list(range(8))
    ahead, beside = cache.open(4, BASE, LR_B), cache.open(4, BASE, LR_B)
    beside.runs[LR_B].truncate(0)
    beside.runs[LR_B].prepare(0, 4)
    beside.runs[LR_B].commit(0, 4, "reflect")
    for one in (ahead, beside):
        one.runs[BASE].prepare(4, 8)
        one.runs[BASE].commit(4, 8, "critic")
    cache.tree.insert(Path(), ids, ahead.runs)
    cache.tree.insert(Path(), ids, beside.runs)
    fresh = {BASE: PageRun(cache.pools["base"], P)}
    low_rank = PageRun(cache.pools["low_rank"], P)
    (reused,) = [each for each in cache.tree.reuse(Path(), ids, fresh, lambda key: low_rank) if each.run is fresh[BASE]]
    assert reused.indices == [0, 1, 2, 3]
    assert [(span.stop, span.writer) for span in low_rank.spans] == [(4, "plan")], "the record comes along"
    assert low_rank.pages == []
    own = {BASE: beside.runs[BASE]}
    own[BASE].give_up([2, 3])
    assert cache.tree.reuse(Path(), ids, own, lambda key: beside.runs[key]) == []


def test_reused_pages_and_records_can_be_given_back(cache):
    ids = list(range(6))
    one = cache.open(6, BASE, LR_A)
    cache.tree.insert(Path(), ids, one.runs)
    run, beside = PageRun(cache.pools["base"], P), PageRun(cache.pools["low_rank"], P)
    used = cache.pools["base"].num_references(one.runs[BASE].pages[0])
    for reused in cache.tree.reuse(Path(), ids, {BASE: run}, lambda key: beside):
        reused.give_back()
    assert (run.spans, run.pages, run.held, beside.spans) == ([], [], [], [])
    assert cache.pools["base"].num_references(one.runs[BASE].pages[0]) == used
