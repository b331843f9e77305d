"""Folders that appear whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from lragent_jax.models.errors import CheckpointError


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike, *, marker: str, force: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `folder` that takes its place when the block ends, and is deleted if it fails.

    `marker` is a file that every folder of this kind holds. What is there already is replaced only with `force`, and
    only if it holds the marker (so a mistyped path costs nothing) or is empty; otherwise `CheckpointError` is raised
    before anything is written.
    """
    target = check_free(folder, marker=marker, force=force)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
    except OSError as error:
        raise CheckpointError(f"{target} cannot be made: {error.strerror}; name another folder") from error
    try:
        yield draft
        _put_in_place(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_free(folder: str | os.PathLike, *, marker: str, force: bool = False) -> Path:
    """Where `new_folder` would write: where a link leads, whose place would otherwise be taken, not what it names.

    Raises the `CheckpointError` that `new_folder` would raise, for whoever has much to do before there is something to
    write.
    """
    target = Path(os.path.realpath(folder))
    existing = next(path for path in (target, *target.parents) if os.path.exists(path))
    if existing != target:
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            reason = "may not be written to" if existing.is_dir() else "is a file"
            raise CheckpointError(f"{target} cannot be made: {existing} {reason}; name another folder")
        return target
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; name a folder to write")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{target} cannot be made: {target.parent} may not be written to; name another folder")
    if not any(target.iterdir()):
        return target
    if not (target / marker).is_file():
        raise CheckpointError(f"{target} holds other things (no {marker}) and is not replaced; name another folder")
    if not force:
        raise CheckpointError(f"{target} exists; name another folder, or pass force to replace it")
    return target


def _put_in_place(draft: Path, target: Path) -> None:
    """A folder cannot be renamed onto a full one: the old one steps aside first, and back if the new one fails."""
    old = target.with_name(f"{draft.name}.old")
    try:
        if target.exists():
            target.rename(old)
        draft.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        if not draft.exists():  # the new one is there
            shutil.rmtree(old, ignore_errors=True)
