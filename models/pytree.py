"""Frozen dataclasses that JAX can carry through `jit`."""

import dataclasses
from typing import TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def static(**kwargs):
    """A field that is part of the compiled program (hashable), not data."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def pytree(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass and registers it as a pytree.

    JAX also rebuilds pytrees around leaves that are no arrays (shardings, shapes, `None`), so unflattening skips
    `__init__` and whatever checks it carries.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    data = [field.name for field in fields if not field.metadata.get("static")]
    meta = [field.name for field in fields if field.metadata.get("static")]

    def flatten_with_keys(value):
        children = [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in data]
        return children, tuple(getattr(value, name) for name in meta)

    def flatten(value):
        return [getattr(value, name) for name in data], tuple(getattr(value, name) for name in meta)

    def unflatten(aux, children):
        value = object.__new__(cls)
        for name, child in zip([*data, *meta], [*children, *aux], strict=True):
            object.__setattr__(value, name, child)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
