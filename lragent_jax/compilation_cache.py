"""Compiled programs on disk, and the traced ones they are made of, so that a second start makes neither again."""

import os
from pathlib import Path

import jax

from lragent_jax import exported_programs


def enable(folder: str | os.PathLike | None = None) -> Path | None:
    """Switches JAX's persistent compilation cache on, and `exported_programs` beside it; returns the folder it uses.

    `folder` defaults to `lragent_jax/xla` in the user's cache folder ($XDG_CACHE_HOME, or ~/.cache). A cache that was
    configured already, be it by $JAX_COMPILATION_CACHE_DIR, stays as it is. Returns None, and changes nothing, where
    the folder cannot be made. Call it before anything is compiled.

    Programs are kept however quickly they were compiled (JAX leaves out what took less than a second, of which an
    engine has dozens), unless $JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS says otherwise.
    """
    if configured := jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        if "://" not in configured:  # JAX also writes to buckets
            _keep_exported(Path(configured))
        return Path(configured)
    folder = Path(folder) if folder is not None else default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    _keep_exported(folder)
    return folder


def _keep_exported(folder: Path) -> None:
    exported_programs.keep_in(folder / "exported")


def default_folder() -> Path:
    """Where programs are kept unless the user says otherwise."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "lragent_jax" / "xla"
