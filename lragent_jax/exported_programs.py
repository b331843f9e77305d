"""Traced programs on disk, beside the compiled ones, so that a second start does not trace and lower them again.

JAX finds a compiled program by the text of the lowered one, and Python takes a second or more to make that of a model
with kernels of its own. Here the lowered program itself is kept (`jax.export`), found by what tracing depends on: this
package's code, the versions of what it is built on, the device, JAX's options, and the arguments' shapes and structure.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import os
import pickle
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import export

from lragent_jax.kernels.interpret import is_interpreted

logger = logging.getLogger(__name__)

KERNEL_CALLS = ("mosaic_gpu_v2", "mosaic_gpu", "__gpu$xla.gpu.triton", "triton_kernel_call", "tpu_custom_call")
"""How lowered programs name Pallas' kernels. Other versions need not understand them: those look elsewhere."""

KERNELS = "lragent_jax.kernels."

BUILT_ON = ("jax", "jaxlib", "flax", "numpy")

KEPT_DAYS = 30
"""For so long programs of other code or another device lie unused before they are deleted."""

_ADDRESS = " at 0x"
"""In what Python prints of an object that has no description: such a program cannot be found again."""


class Program(NamedTuple):
    """A lowered program of flat arguments, and the structure of what it returns."""

    exported: export.Exported
    returns: Any


class ExportedPrograms:
    """The programs of a folder. Several processes may share it; what cannot be read is made again.

    As much as a compiled program, one that lies there is trusted: the folder has to be the user's own.
    """

    def __init__(self, folder: Path):
        self._root = folder
        self.num_read, self.num_written = 0, 0

    def call(self, function: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """`function(*args, **kwargs)` of traced arguments, as a program from the folder; one not there is put there.

        A function that cannot be exported is called.
        """
        leaves, structure = jax.tree.flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
        arrays = [leaves[i] for i in places]
        constants = [None if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        path = self._path(function, structure, constants, arrays)
        if path is None:
            return function(*args, **kwargs)
        program = self._read(path)
        if program is None:

            def of_arrays(*arrays: Any) -> Any:
                there = list(constants)
                for i, array in zip(places, arrays, strict=True):
                    there[i] = array
                args, kwargs = structure.unflatten(there)
                return function(*args, **kwargs)

            program = self._export(path, of_arrays, arrays)
            if program is None:
                return function(*args, **kwargs)
        return program.returns.unflatten(program.exported.call(*arrays))

    def _path(self, function: Callable, structure: Any, constants: Sequence[Any], arrays: Sequence[Any]) -> Path | None:
        """Where the program lies; None if its arguments do not say the same in another process."""
        avals = [jax.typeof(array) for array in arrays]
        shapes = [(aval.shape, str(aval.dtype), aval.weak_type) for aval in avals]
        key = repr((f"{function.__module__}.{function.__qualname__}", str(structure), constants, shapes, _options()))
        if _ADDRESS in key:
            logger.info("%s is traced in every process: not all of its arguments have a description", function.__name__)
            return None
        return self._folder / f"{function.__name__}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"

    @functools.cached_property
    def _folder(self) -> Path:
        """The programs of this code on this device. Those of others that nobody has asked for in a while are gone."""
        folder = self._root / _environment_digest()
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            os.utime(folder)
            for other in self._root.iterdir():
                if time.time() - other.stat().st_mtime > KEPT_DAYS * 24 * 3600:
                    shutil.rmtree(other, ignore_errors=True)
        return folder

    def _read(self, path: Path) -> Program | None:
        try:
            digest, content = _halves(path.read_bytes())
        except OSError:
            return None
        if hashlib.sha256(content).digest() != digest:
            logger.warning("%s is damaged: the program is made again", path)
            return None
        returns, modules, serialized = pickle.loads(content)
        for module in modules:  # with them comes what their kernels need at run time: of Mosaic GPU's, a library
            importlib.import_module(module)
        self.num_read += 1
        return Program(export.deserialize(bytearray(serialized)), returns)

    def _export(self, path: Path, of_arrays: Callable, arrays: Sequence[Any]) -> Program | None:
        """None if it cannot be exported, or if it cannot be traced: the caller finds out."""
        returns = []

        def flat(*arrays: Any) -> Sequence[Any]:
            leaves, structure = jax.tree.flatten(of_arrays(*arrays))
            returns.append(structure)
            return leaves

        checks = [export.DisabledSafetyCheck.custom_call(name) for name in KERNEL_CALLS]
        avals = map(jax.typeof, arrays)
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type) for aval in avals]
        try:
            serialized = export.export(jax.jit(flat), disabled_checks=checks)(*shapes).serialize()
            modules = sorted(name for name in sys.modules if name.startswith(KERNELS))
            content = pickle.dumps((returns[0], modules, bytes(serialized)))
        except Exception as error:  # of any kind: what is wrong with the function itself, a call will say
            logger.info("%s is not kept: %s", path.name, error)
            return None
        self._write(path, hashlib.sha256(content).digest() + content)
        # What was written and not what was made, so that the next process compiles the very same.
        return Program(export.deserialize(serialized), returns[0])

    def _write(self, path: Path, content: bytes) -> None:
        """All of it at once: another process sees the whole file or none."""
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
                file.write(content)
            Path(file.name).replace(path)
        except OSError as error:
            logger.warning("programs are traced again by the next process: %s", error)
            return
        self.num_written += 1


_kept: ExportedPrograms | None = None


def keep_in(folder: Path | None) -> None:
    """From now on programs are looked for, and left, in this folder; None: nowhere."""
    global _kept
    _kept = None if folder is None else ExportedPrograms(folder)


def kept() -> ExportedPrograms | None:
    """Those that this process uses."""
    return _kept


@contextlib.contextmanager
def kept_in(folder: Path | None) -> Iterator[ExportedPrograms | None]:
    """The same, meanwhile."""
    global _kept
    before = _kept
    keep_in(folder)
    try:
        yield _kept
    finally:
        _kept = before


def exporting(function: Callable) -> Callable:
    """`function` as `jax.jit` may trace it: where programs are kept, the one that is kept takes its place.

    Not on a mesh, where a program belongs to how its devices are laid out, and not in interpreted kernels.
    """

    @functools.wraps(function)
    def traced(*args, **kwargs):
        programs = kept()
        if programs is None or is_interpreted() or not _on_default_device():
            return function(*args, **kwargs)
        return programs.call(function, args, kwargs)

    return traced


def _on_default_device() -> bool:
    """Whether it is compiled for what JAX exports for unless it is told: one device of the kind it takes first."""
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
    return chosen is None and jax.sharding.get_abstract_mesh().empty


def _halves(content: bytes) -> tuple[bytes, bytes]:
    """A file's digest and the rest."""
    size = hashlib.sha256().digest_size
    return content[:size], content[size:]


def _options() -> dict[str, Any]:
    """JAX's, as they are at this moment in this thread; where it keeps programs changes none."""
    options = {name: value for name, value in sorted(jax.config.values.items()) if "cache" not in name}
    return {name: getattr(jax.config, name, value) for name, value in options.items()}


@functools.cache
def _environment_digest() -> str:
    """Of all that tracing depends on and that stays while a process runs."""
    device = jax.devices()[0]
    about = {
        "versions": [importlib.metadata.version(name) for name in BUILT_ON] + [platform.python_version()],
        "device": (device.platform, device.device_kind, device.client.platform_version, platform.machine()),
        "flags": [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
    }
    digest = hashlib.sha256(repr(about).encode())
    package = Path(__file__).parent
    # kernels/ and models/ may be links.
    files = [Path(folder, name) for folder, _, names in os.walk(package, followlinks=True) for name in names]
    for file in sorted(file for file in files if file.suffix in (".py", ".json")):
        digest.update(f"{file.relative_to(package)}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]
