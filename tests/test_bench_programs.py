"""scripts/bench_programs.py at toy sizes: every variant has its figures or says why not, and leaves no trace."""

import json
import sys

import jax
import pytest
from script_modules import load_script

from lragent_jax import generation
from lragent_jax.device_jit import this_device
from lragent_jax.kernels.row_matmul import dispatch

bench_programs = load_script("bench_programs")
ARGUMENTS = (
    "--preset tiny --layers 1 --dtype float32 --rank 4 --page-size 8 "
    "--steps 2 --context 20 --few 3 --chunk 32 --repeats 1"
)


@pytest.fixture(autouse=True)
def clearings(monkeypatch) -> list[None]:
    """One entry for every time that JAX was told to forget what it has compiled, which other tests would miss."""
    clearings: list[None] = []
    monkeypatch.setattr(jax, "clear_caches", lambda: clearings.append(None))
    return clearings


def test_variants_stand_side_by_side(monkeypatch, capsys, clearings):
    variants = {
        "as it comes": bench_programs.Variant(),
        "unoptimised": bench_programs.Variant(prefill={"xla_backend_optimization_level": "0"}),
        "refused": bench_programs.Variant(decode={"not_an_option": "1"}),
    }
    monkeypatch.setattr(bench_programs, "VARIANTS", variants)
    monkeypatch.setattr(sys, "argv", ["bench_programs.py", *ARGUMENTS.split()])
    bench_programs.main()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["variants"]
    assert list(results) == list(variants)
    assert len(clearings) == 2 * len(variants), "no variant finds what another one has compiled"
    assert "not_an_option" in results.pop("refused")["refused"]
    for figures in results.values():
        assert all(figures[name] > 0 for name in ("step_ms", "few_ms", "chunk_ms", "compile_s"))
        assert figures["same_tokens"] == [2, 2]


def test_tokens_are_the_same_up_to_the_first_that_differs():
    assert bench_programs.num_same([[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [4, 5, 6]]) == [1, 3]


def test_a_variant_applies_to_what_is_compiled_meanwhile():
    here, before = this_device(), generation.decode._jitted()
    with bench_programs.applied(bench_programs.Variant(decode={"not_an_option": "1"}, most_rows=16)):
        assert dispatch.MOST_ROWS_BY_DEFAULT == 16
        assert generation.decode.compiler_options(here) == {"not_an_option": "1"}
        assert generation.decode._jitted() is not before
        assert generation.prefill.compiler_options(here) == {}
    assert dispatch.MOST_ROWS_BY_DEFAULT == 1
    assert generation.decode._jitted() is before


def test_a_variant_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_programs.py", "--variant", "faster"])
    with pytest.raises(SystemExit):
        bench_programs.main()
