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
    target = Path(folder).absolute()
    _check_free(target, marker, force)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
    except OSError as error:
        raise CheckpointError(f"{target} cannot be made: {error.strerror}; name another folder") from error
    try:
        yield draft
        # A folder cannot be renamed onto a full one: the old one steps aside first.
        old = target.with_name(f"{draft.name}.old")
        if target.exists():
            target.rename(old)
        draft.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _check_free(target: Path, marker: str, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; name a folder to write")
    if not any(target.iterdir()):
        return
    if not (target / marker).is_file():
        raise CheckpointError(f"{target} holds other things (no {marker}) and is not replaced; name another folder")
    if not force:
        raise CheckpointError(f"{target} exists; name another folder, or pass force to replace it")
