"""Annotations are executed in every test: a wrong shape or dtype at a module boundary fails where it happens."""

from jaxtyping import install_import_hook

install_import_hook("lragent_jax", "beartype.beartype")
