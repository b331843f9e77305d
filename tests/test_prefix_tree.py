"""The prefix tree and what is evicted from it, against a model that keeps what every page holds in dictionaries."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lragent_jax import prefix_tree
from lragent_jax.eviction import choose_victims, recompute_flop, worth
from lragent_jax.eviction import evict as evict_victims
from lragent_jax.models.config import LlamaConfig
from lragent_jax.page_pool import PagePool
from lragent_jax.page_run import HOLE, PageRun, Span
from lragent_jax.prefix_tree import PageNode, Path, PrefixTree
from lragent_jax.sharing import PageKey

P = 2
BASE, LOW_RANK, OTHER = PageKey("base", None), PageKey("low_rank", "a"), PageKey("base", "x")
IDS = [5, 6, 7, 8, 9, 10]


class Clock:
    """Seconds, set by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Context:
    """A trajectory without an engine: ids, runs, and what it wrote where (page to the beginning that it holds)."""

    visits, last_used, reading = 1, 0.0, ()

    def __init__(self, tree: PrefixTree, pools: dict[str, PagePool], ids, keys=(BASE,)):
        self.tree, self.ids, self.path = tree, list(ids), Path()
        self.runs = {key: PageRun(pools[key.pool], P) for key in keys}

    def read(self, writer: str | None = None, num_tokens: int | None = None) -> dict[PageKey, list[int]]:
        """Reuses, writes the rest and inserts; which pages of which run were reused."""
        stop = len(self.ids) if num_tokens is None else num_tokens
        reused = self.tree.reuse(self.path, self.ids, self.runs)
        reused = [(each.run, each.indices) for each in reused if each.indices]
        for run in self.runs.values():
            for start, end in run.missing(stop):
                run.prepare(start, end)
                for span in run.recorded(start, end):
                    run.commit(span.start, span.stop, span.writer)
                run.commit(start, end, writer)
        self.tree.insert(self.path, self.ids, self.runs)
        return {key: indices for key, of in self.runs.items() for run, indices in reused if run is of}

    @property
    def idle_runs(self) -> dict[PageKey, PageRun]:
        return self.runs

    def close(self) -> None:
        for run in self.runs.values():
            run.truncate(0)


@pytest.fixture
def pools() -> dict[str, PagePool]:
    return {"base": PagePool(64), "low_rank": PagePool(64)}


@pytest.fixture
def tree() -> PrefixTree:
    return PrefixTree(P, Clock())


def evict(tree: PrefixTree, pool: PagePool, name, count: int, writers=None, holders=()) -> bool:
    victims, freed = choose_victims(tree, {name: (pool, count)}, writers or {}, lambda index: 1.0 + index, holders)
    if freed[name] < count:
        return False
    before = pool.num_free
    evict_victims(tree, victims)
    assert writers or pool.num_free - before >= count
    return True


def test_pages_outlive_their_context_and_are_found_again(tree, pools):
    first = Context(tree, pools, IDS[:5])
    assert first.read("plan") == {}
    pages = list(first.runs[BASE].pages)
    first.close()
    assert pools["base"].num_used == 2, "the full ones"
    second = Context(tree, pools, IDS)
    assert second.read("action") == {BASE: [0, 1]}
    assert second.runs[BASE].pages[:2] == pages[:2]
    assert second.runs[BASE].spans == [Span(0, 4, "plan"), Span(4, 6, "action")]


@pytest.mark.parametrize("position", range(4))
def test_every_token_counts(tree, pools, position):
    Context(tree, pools, IDS[:4]).read()
    other = list(IDS[:4])
    other[position] += 1
    assert Context(tree, pools, other).read() == ({BASE: [0]} if position >= 2 else {})


def test_a_page_is_found_behind_its_own_beginning_only(tree, pools):
    Context(tree, pools, [1, 2, 3, 4]).read()
    assert Context(tree, pools, [3, 4]).read() == {}
    assert Context(tree, pools, [9, 9, 3, 4]).read() == {}


def test_keys_do_not_meet(tree, pools):
    Context(tree, pools, IDS).read()
    assert Context(tree, pools, IDS, [OTHER]).read() == {}
    assert Context(tree, pools, IDS, [OTHER]).read() == {OTHER: [0, 1, 2]}
    both = Context(tree, pools, IDS, [BASE, LOW_RANK])
    assert both.read() == {BASE: [0, 1, 2]}
    assert Context(tree, pools, IDS, [BASE, LOW_RANK]).read() == {BASE: [0, 1, 2], LOW_RANK: [0, 1, 2]}


def test_what_a_run_holds_stays(tree, pools):
    ahead, twin = Context(tree, pools, IDS), Context(tree, pools, IDS)
    twin.runs[BASE].prepare(0, 4)
    twin.runs[BASE].commit(0, 4, "plan")
    pages = list(twin.runs[BASE].pages)
    ahead.read("plan")
    assert twin.read("plan") == {BASE: [2]}, "behind equal pages of its own, by equal writers"
    assert twin.runs[BASE].pages == [*pages, ahead.runs[BASE].pages[2]]
    begun = Context(tree, pools, IDS)
    begun.runs[BASE].prepare(0, 3)
    begun.runs[BASE].commit(0, 3, "plan")
    assert begun.read("plan") == {}, "it goes on with the page that it has begun"


def test_other_writers_part_ways(tree, pools):
    """Behind a page that another writer wrote nothing is taken and nothing is added: it was shaped by that page."""
    ahead, beside = Context(tree, pools, IDS), Context(tree, pools, IDS[:2])
    beside.runs[BASE].prepare(0, 2)
    beside.runs[BASE].commit(0, 2, "action")
    ahead.read("plan", num_tokens=4)
    beside.ids = list(IDS)
    assert beside.read("plan") == {}
    assert len(list(tree.nodes())) == 2, "the third page of `beside` rests on its own first one"


def test_no_low_rank_page_without_its_base_page(tree, pools):
    context = Context(tree, pools, IDS, [BASE, LOW_RANK])
    context.runs[LOW_RANK].prepare(0, 6)
    context.runs[LOW_RANK].commit(0, 6, "plan")
    tree.insert(context.path, context.ids, context.runs)
    assert not list(tree.nodes())


def test_a_low_rank_page_goes_with_its_base_page(tree, pools):
    context = Context(tree, pools, IDS, [BASE, LOW_RANK])
    context.read("plan")
    context.close()
    assert evict(tree, pools["base"], "base", 1)
    assert (pools["base"].num_used, pools["low_rank"].num_used) == (2, 2)
    assert [node.index for node in tree.nodes()] == [0, 1], "leaves first"


def test_a_low_rank_page_goes_alone_and_its_writer_stays_on_record(tree, pools):
    context = Context(tree, pools, IDS, [BASE, LOW_RANK])
    context.read("plan")
    context.close()
    assert evict(tree, pools["low_rank"], "low_rank", 2)
    assert (pools["base"].num_used, pools["low_rank"].num_used) == (3, 1)
    reader = Context(tree, pools, IDS, [BASE, LOW_RANK])
    tree.reuse(reader.path, reader.ids, reader.runs)
    assert reader.runs[LOW_RANK].missing(6) == [(2, 6)]
    assert reader.runs[LOW_RANK].spans == [Span(0, 6, "plan")]
    reader.read("reflect")
    assert pools["low_rank"].num_used == 3, "and the node has its pages again"
    assert Context(tree, pools, IDS, [LOW_RANK]).read("action") == {LOW_RANK: [0, 1, 2]}


def test_pages_that_others_hold_stay(tree, pools):
    held, gone = Context(tree, pools, IDS), Context(tree, pools, [1, 2, 3, 4])
    held.read()
    gone.read()
    gone.close()
    assert not evict(tree, pools["base"], "base", 3)
    assert pools["base"].num_used == 5, "all or nothing"
    assert evict(tree, pools["base"], "base", 2)
    assert Context(tree, pools, IDS).read() == {BASE: [0, 1, 2]}


def test_a_page_about_to_be_written_goes_rather_than_being_copied(tree, pools):
    context = Context(tree, pools, IDS)
    context.read()
    page = context.runs[BASE].pages[-1]
    assert not evict(tree, pools["base"], "base", 1)
    assert evict(tree, pools["base"], "base", 1, {(pools["base"], page): 1})
    assert pools["base"].num_references(page) == 1


def test_the_least_worth_goes_first(tree, pools):
    rare, often, late = ([i, i] for i in (1, 2, 3))
    for ids in (rare, often, often, often):
        context = Context(tree, pools, ids)
        context.read()
        context.close()
    tree.clock.now = 3.0
    context = Context(tree, pools, late)
    context.read()
    context.close()
    order = []
    for _ in range(3):
        before = {node.token_ids for node in tree.nodes()}
        evict(tree, pools["base"], "base", 1)
        order += before - {node.token_ids for node in tree.nodes()}
    assert order == [(1, 1), (2, 2), (3, 3)]


def test_worth_is_fastlibras():
    for cost, visits, seconds in itertools.product((1.0, 5.0), (1, 3), (0.0, 1.0, 20.0)):
        sigmoid = 1 / (1 + 2.718281828459045**-seconds)
        assert 2.718281828459045 ** worth(cost, visits, seconds) == pytest.approx(cost * visits * (1 - sigmoid), 1e-5)
    assert worth(1.0, 1, 1e5) > worth(1.0, 1, 2e5), "the product would be 0 for both"
    flop = [recompute_flop(LlamaConfig.preset("tiny"), 8, index) for index in range(3)]
    assert flop[2] - flop[1] == pytest.approx(flop[1] - flop[0])
    assert flop[1] > flop[0]


def test_a_cut_path_is_found_anew(tree, pools):
    context = Context(tree, pools, IDS)
    context.read()
    context.runs[BASE].truncate(0)
    evict(tree, pools["base"], "base", 2)
    Context(tree, pools, IDS).read("other")
    assert context.read() == {BASE: [0, 1, 2]}


OPERATION = st.tuples(
    st.sampled_from(["open", "grow", "close", "evict", "squeeze", "drop", "unload", "tick"]),
    st.integers(0, 5),
    st.lists(st.integers(0, 1), min_size=1, max_size=7),
    st.sampled_from([(BASE,), (BASE, LOW_RANK), (OTHER,)]),
    st.sampled_from(["plan", "action"]),
)


@given(st.lists(OPERATION, max_size=40))
def test_any_history_is_consistent(operations):
    """Every page of every context and of the tree holds the tokens and writers it is said to; nothing leaks."""
    pools, clock = {"base": PagePool(512), "low_rank": PagePool(512)}, Clock()
    tree, contexts = PrefixTree(P, clock), []
    for name, which, ids, keys, writer in operations:
        context = contexts[which % len(contexts)] if contexts else None
        if name == "open":
            contexts.append(Context(tree, pools, ids, keys))
            contexts[-1].read(writer)
        elif name == "grow" and context:
            context.ids += ids
            context.read(writer, num_tokens=len(context.ids) - which % 2)
        elif name == "close" and context:
            context.close()
            contexts.remove(context)
        elif name == "evict":
            evict(tree, pools["base"], "base", which)
            evict(tree, pools["low_rank"], "low_rank", which)
        elif name == "squeeze":
            evict(tree, pools["base"], "base", which, holders=contexts)
            evict(tree, pools["low_rank"], "low_rank", which, holders=contexts)
        elif name == "unload":
            tree.writer_unloaded(writer)
            for context in contexts:
                for run in context.runs.values():
                    run.writer_unloaded(writer)
        elif name == "drop":
            gone = [BASE, LOW_RANK, OTHER][which % 3]
            if gone != BASE:
                tree.drop(lambda key, gone=gone: key != gone)
        elif name == "tick":
            clock.now += which
        holds: dict[tuple[str, int], set] = {}
        references: dict[tuple[str, int], int] = {}
        for context in contexts:
            for key, run in context.runs.items():
                for index, page in enumerate(run.pages):
                    if page != HOLE:
                        references[key.pool, page] = references.get((key.pool, page), 0) + 1
                        assert any(max(a, index * P) < min(b, index * P + P) for a, b in run.held)
                        if run.is_full(index):
                            beginning = (key, tuple(context.ids[: (index + 1) * P]), tuple(run.page_spans(index)))
                            holds.setdefault((key.pool, page), set()).add(beginning)
        beginnings: dict[PageNode, tuple[int, ...]] = {tree.root: ()}
        for node in tree.nodes():
            assert node.parent is not None
            assert node.parent.children[node.token_ids] is node
            beginnings[node] = beginnings[node.parent] + node.token_ids
            assert node.pages
            for key, cached in node.pages.items():
                assert node.parent is tree.root or key in node.parent.pages
                assert key.pool == "base" or BASE in node.pages
                holds.setdefault((key.pool, cached.page), set()).add((key, beginnings[node], node.spans[key]))
                references[key.pool, cached.page] = references.get((key.pool, cached.page), 0) + 1
        assert all(len(said) == 1 for said in holds.values())
        for pool_name, pool in pools.items():
            kept = [cached.page for cached in tree.pages(pool)]
            assert pool.num_kept_alone == sum(pool.num_references(page) == 1 for page in kept)
            assert pool.num_used == len([page for of, page in references if of == pool_name])
        assert all(pools[of].num_references(page) == count for (of, page), count in references.items())
    for context in contexts:
        context.close()
    tree.drop(lambda key: False)
    assert not list(tree.nodes())
    assert all(pool.num_used == 0 for pool in pools.values())


def test_what_the_tree_has_is_passed_over_until_something_is_lost(tree, pools, monkeypatch):
    looked_at: list[int] = []
    agree = prefix_tree._agree

    def logged(runs, node) -> bool:
        looked_at.extend([node.index] if runs else [])
        return agree(runs, node)

    monkeypatch.setattr(prefix_tree, "_agree", logged)
    context = Context(tree, pools, [0, 1] * 6)
    context.read()
    for num_more, again in ((2, []), (0, []), (4, [])):
        looked_at.clear()
        context.ids += [1] * num_more
        context.read()
        tree.insert(context.path, context.ids, context.runs)
        assert [index for index in looked_at if index < 6] == again
    context.runs[BASE].writer_unloaded("plan")
    looked_at.clear()
    tree.insert(context.path, context.ids, context.runs)
    assert looked_at[:1] == [0]


def test_who_waits_does_not_make_pages_worth_more(tree, pools):
    Context(tree, pools, IDS).read()
    late = Context(tree, pools, IDS)
    for _ in range(5):
        for reused in tree.reuse(late.path, late.ids, late.runs):
            reused.give_back()
    assert {page.visits for page in tree.pages(pools["base"])} == {1}
    tree.reuse(late.path, late.ids, late.runs)
    tree.visit(late.path, late.runs)
    assert {page.visits for page in tree.pages(pools["base"])} == {2}
