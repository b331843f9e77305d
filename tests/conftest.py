"""Shape annotations are executed in every test: a wrong shape or dtype at a module boundary fails where it happens."""

import atexit
import importlib.metadata
import math
import os
import shutil
import tempfile

import hypothesis
import pytest
from jaxtyping import install_import_hook

# Tests compile hundreds of tiny programs and run each a few times: on a CPU most of their time is LLVM's optimiser.
if "XLA_FLAGS" not in os.environ:
    flags = ["--xla_backend_optimization_level=0"]
    if importlib.metadata.version("jax").startswith("0.10."):  # later versions do not know it, and would exit
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)

# Much of what a test compiles, another one has compiled before, in this process or beside it. Whoever starts the run
# makes the folder, processes that share the tests inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="lragent-jax-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Pallas' GPU interpreter runs every warpgroup as a thread that waits for others inside a callback: with as many threads
# as a small machine has cores they would wait for ever.
os.environ.setdefault("NPROC", "16")

# The modules that pass arrays on; the rest answer a caller's wrong types with errors of their own.
install_import_hook(
    ["lragent_jax.kernels", "lragent_jax.models", "lragent_jax.generation", "lragent_jax.sampling"], "beartype.beartype"
)

# The same examples in every run, so that a failure is the change's doing; `--hypothesis-profile=search` looks for new
# ones. No deadline: the first example of a shape compiles.
hypothesis.settings.register_profile("repeatable", deadline=None, database=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, database=None, print_blob=True, max_examples=1000)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def chunks_of_tests_are_long():
    """The tests' longer chunks run as long ones do: their last layer makes what is asked of the last token."""
    from lragent_jax import generation  # not before the variables above are set

    least, generation.LEAST_LAST_ONLY = generation.LEAST_LAST_ONLY, 16
    yield
    generation.LEAST_LAST_ONLY = least


@pytest.fixture(autouse=True)
def keep_no_program_of_an_absent_device(request):
    """A program compiled for a device that is not there cannot be read back: nothing is written in the first place."""
    if request.node.get_closest_marker("aot") is None:
        yield
        return
    import jax  # not before the variables above are set

    option = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    jax.config.update(option, math.inf)
    yield
    jax.config.update(option, before)
