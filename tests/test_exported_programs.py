"""Programs that a process finds traced: the same as those it would trace, and nobody else's."""

import collections
import dataclasses
import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import CONFIG, tiny_engine
from jax.sharding import Mesh

from lragent_jax import exported_programs
from lragent_jax.compile_watch import CompileWatch
from lragent_jax.device_jit import DeviceJit
from lragent_jax.exported_programs import KEPT_DAYS, kept_in
from lragent_jax.flat_tree import FlatTree
from lragent_jax.kernels.interpret import interpreted
from lragent_jax.models.llama import abstract_params
from lragent_jax.models.tensor_parallel import AXIS
from lragent_jax.sampling_params import SamplingParams


@pytest.fixture
def folder(tmp_path):
    with kept_in(tmp_path / "exported"):
        yield tmp_path / "exported"


@pytest.fixture
def traces():
    """How often Python ran each function of this file."""
    return collections.Counter()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def program(traces, **options):
    """A fresh `DeviceJit` of one function, as another process has it: JAX remembers nothing of the one before."""

    def scaled(x, tree, *, factor=2, name=None):
        traces["scaled"] += 1
        return {"x": x * factor, "tree": jax.tree.map(lambda leaf: leaf + 1, tree)}

    return DeviceJit(scaled, static_argnames=("factor", "name"), **options)


def arguments():
    return jnp.arange(4.0), {"a": jnp.ones(3), "b": np.arange(2, dtype=np.int32)}


def test_the_second_process_does_not_trace(folder, traces):
    first = program(traces)(*arguments())
    assert traces["scaled"] == 1
    assert len(files(folder)) == 1
    again = program(traces)
    second = again(*arguments())
    assert traces["scaled"] == 1
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    programs = exported_programs.kept()
    assert programs is not None
    assert (programs.num_written, programs.num_read) == (1, 1)
    again.lower(*arguments()).compile()
    assert programs.num_read == 1, "what was traced in this process is not read again"


def test_what_tracing_depends_on_makes_another_program(folder, traces):
    x, tree = arguments()
    seen = 0
    for call in (
        lambda: program(traces)(x, tree),
        lambda: program(traces)(x, tree, factor=3),  # a static argument
        lambda: program(traces)(x, tree, name="another"),
        lambda: program(traces)(x[:2], tree),  # a shape
        lambda: program(traces)(x.astype(jnp.bfloat16), tree),  # a dtype
        lambda: program(traces)(2.0, tree),  # a number that JAX gives the other's dtype
        lambda: program(traces)(jnp.float32(2.0), tree),
        lambda: program(traces)(x, [tree]),  # the structure
        lambda: program(traces)(x, FlatTree(tree)),
        lambda: program(traces)(x, FlatTree([tree])),
    ):
        call()
        seen += 1
        assert traces["scaled"] == seen
        assert len(files(folder)) == seen
    with jax.default_matmul_precision("highest"):  # an option of JAX
        program(traces)(x, tree)
    assert traces["scaled"] == seen + 1
    assert program(traces)(x, tree, factor=3)["x"][1] == 3
    assert traces["scaled"] == seen + 1


def test_other_code_or_another_device_has_another_folder(folder, traces, monkeypatch):
    program(traces)(*arguments())
    monkeypatch.setattr(exported_programs, "_environment_digest", lambda: "of other code")
    with kept_in(folder):
        program(traces)(*arguments())
    assert traces["scaled"] == 2
    assert len({file.parent for file in files(folder)}) == 2


def test_a_changed_file_of_the_package_is_other_code(monkeypatch, tmp_path):
    digest = exported_programs._environment_digest.__wrapped__
    before = digest()
    assert digest() == before
    package = tmp_path / "package"
    (package / "kernels").mkdir(parents=True)
    tuned = package / "kernels" / "tuned.json"
    (package / "linked").symlink_to(package / "kernels")
    monkeypatch.setattr(exported_programs, "__file__", str(package / "exported_programs.py"))
    found = {before, digest()}
    for text in ("{}", "[]"):
        tuned.write_text(text)
        found.add(digest())
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    found.add(digest())
    assert len(found) == 5


def test_the_engine_of_another_model_does_not_find_it():
    """Of the structure of a model, which is a static argument, all is said that tells it from another."""
    other = dataclasses.replace(CONFIG, rope_theta=2 * CONFIG.rope_theta)
    described = {str(jax.tree.structure(abstract_params(config, "float32")[0])) for config in (CONFIG, CONFIG, other)}
    assert len(described) == 2


def test_a_number_without_a_dtype_takes_the_others(folder):
    for _ in range(2):
        scaled = DeviceJit(lambda x, y: x * y)
        assert scaled(2.0, jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16
        assert scaled(jnp.float32(2.0), jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32
    programs = exported_programs.kept()
    assert programs is not None
    assert programs.num_read == 2


def test_donated_arguments_are_taken(folder, traces):
    for _ in range(2):
        x, tree = arguments()
        program(traces, donate_argnames=("x",))(x, tree)
        assert x.is_deleted()
        assert not tree["a"].is_deleted()
    assert traces["scaled"] == 1


@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: b"", lambda content: content + b"x"])
def test_a_damaged_file_is_made_again(folder, traces, damage, caplog):
    expected = program(traces)(*arguments())
    (file,) = files(folder)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    found = program(traces)(*arguments())
    assert traces["scaled"] == 2
    assert "made again" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, expected, found)
    assert len(files(folder)) == 1
    program(traces)(*arguments())
    assert traces["scaled"] == 2


def test_where_nothing_can_be_written_everything_works(tmp_path, traces, caplog):
    (tmp_path / "file").write_text("in the way")
    with kept_in(tmp_path / "file" / "exported"):
        for _ in range(2):
            assert program(traces)(*arguments())["x"][3] == 6
    assert traces["scaled"] == 2
    assert "traced again by the next process" in caplog.text


def test_an_argument_without_a_description_is_not_looked_for(folder, traces):
    for _ in range(2):
        assert program(traces)(*arguments(), name=object())["x"][3] == 6
    assert traces["scaled"] == 2
    assert files(folder) == []


def test_what_cannot_be_exported_is_called(folder):
    def called(x):
        return jax.pure_callback(lambda x: x + 1, x, x)

    def wrong(x):
        raise ValueError("of the function")

    assert DeviceJit(called)(jnp.ones(2))[0] == 2
    with pytest.raises(ValueError, match="of the function"):
        DeviceJit(wrong)(jnp.ones(2))
    assert files(folder) == []


def test_on_a_mesh_and_in_interpreted_kernels_nothing_is_looked_for(folder, traces):
    for axis in (AXIS, "of the user"):
        with jax.set_mesh(Mesh(np.array(jax.devices()[:1]), (axis,))):
            program(traces)(*arguments())
    with interpreted():
        program(traces)(*arguments())
    with jax.default_device(jax.devices()[0]):
        program(traces)(*arguments())
    assert traces["scaled"] == 4
    assert files(folder) == []


def test_programs_that_nobody_asks_for_are_deleted_in_the_end(folder, traces):
    for name, days in (("old", KEPT_DAYS + 1), ("young", KEPT_DAYS - 1)):
        (folder / name).mkdir(parents=True)
        (folder / name / "program").write_bytes(b"")
        used = time.time() - days * 24 * 3600
        os.utime(folder / name, (used, used))
    program(traces)(*arguments())
    assert not (folder / "old").exists()
    assert (folder / "young" / "program").exists()


def generated(engine) -> list:
    params = SamplingParams(max_new_tokens=5, ignore_eos=True)
    prompt = np.arange(3, 40) % CONFIG.vocab_size
    outputs = [engine.generate(prompt.tolist(), agent, params) for agent in ("plan", "action")]
    return [output.token_ids for output in outputs]


def test_an_engine_says_the_same_and_compiles_nothing_after_its_warmup(folder):
    make = functools.partial(tiny_engine, "base_lr")
    with kept_in(None):
        expected = generated(make())
    programs = exported_programs.kept()
    assert programs is not None
    for _ in range(2):
        engine = make()
        jax.clear_caches()
        engine.warmup(1)
        with CompileWatch() as watch:
            assert generated(engine) == expected
        assert watch.num_programs == 0
    assert programs.num_read == programs.num_written >= 5


PROCESS = """
import sys
from pathlib import Path
from engines import tiny_engine
from lragent_jax import exported_programs
exported_programs.keep_in(Path({folder!r}))
programs = exported_programs.kept()
def kernels():
    return sorted(name for name in sys.modules if name.startswith("lragent_jax.kernels."))
before = kernels()
tiny_engine("base_lr", implementation="xla").warmup(1)
print(programs.num_written, programs.num_read, "lragent_jax.kernels.lora_attention.xla" in before, *kernels())
"""


def test_programs_are_found_whatever_the_seed_of_pythons_hashes_and_bring_their_kernels_modules(tmp_path):
    """Some modules of kernels bring a library that their kernels call: who reads a program imports them, too."""
    found = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)}
        script = PROCESS.format(folder=str(tmp_path))
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        written, read, was_there, *modules = done.stdout.split()
        found.append((int(written), int(read), modules))
        assert was_there == "False"
        assert "lragent_jax.kernels.lora_attention.xla" in modules
    (written, _, modules), (written_again, read, modules_again) = found
    assert (written_again, read) == (0, written)
    assert modules == modules_again
