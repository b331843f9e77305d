"""Several things wrong with one input, told in one message."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lragent_jax.models.errors import ConfigError

MAX_LISTED = 50


def listing(head: str, problems: Iterable[str]) -> str:
    """`head`, then a line per problem; the tail of a very long list is counted instead of shown."""
    problems = list(problems)
    lines = [head, *(f"  - {problem}" for problem in problems[:MAX_LISTED])]
    if len(problems) > MAX_LISTED:
        lines.append(f"  - and {len(problems) - MAX_LISTED} more")
    return "\n".join(lines)


class Fields:
    """Typed access to somebody else's configuration that notes every problem and goes on.

    A field without a default is required; one that holds `None` counts as absent. After a problem was noted getters
    return placeholders, so nothing may be built from the values before `check` has passed. `prefix` stands in front
    of the names in messages.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        self.values = values
        self.prefix = prefix
        self.missing: list[str] = []
        self.problems: list[str] = []

    def nested(self, name: str) -> "Fields":
        """The fields of an object in a field; what is wrong with them is noted here."""
        value = self._value(name, {})
        if not isinstance(value, Mapping):
            value = self._placeholder(name, value, "an object", {})
        inner = Fields(value, f"{self.prefix}{name}.")
        inner.missing, inner.problems = self.missing, self.problems
        return inner

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self._value(name, default)
        if not _is_integer(value) or value < minimum:
            return self._placeholder(name, value, f"a whole number of at least {minimum}", default or 1)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            return self._placeholder(name, value, "a positive number", default or 1.0)
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            return self._placeholder(name, value, "true or false", default)
        return value

    def strings(self, name: str) -> list[str]:
        """A list of strings, empty where absent."""
        value = self._value(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            return self._placeholder(name, value, "a list of strings", [])
        return value

    def token_id(self, name: str, default: int | None) -> int | None:
        value = self._value(name, default)
        if value is not None and (not _is_integer(value) or value < 0):
            return self._placeholder(name, value, "a token id", default)
        return value

    def token_ids(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """One token id or a list of them."""
        value = self._value(name, default)
        ids = value if isinstance(value, list | tuple) else [value]
        if not all(_is_integer(i) and i >= 0 for i in ids):
            return self._placeholder(name, value, "a token id or a list of them", default)
        return tuple(ids)

    def only(self, name: str, *allowed: Any) -> None:
        """Notes a problem if the field is set to anything but `allowed`: it would change the mathematics."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            why = f"only {' or '.join(map(repr, allowed))} is" if allowed else "nothing but null is"
            self.refuse(name, value, why)

    def refuse(self, name: str, value: Any, why: str) -> None:
        self.problems.append(f"{self.prefix}{name} = {value!r} is not supported: {why}")

    def check(self, source: str) -> None:
        """Raises `ConfigError` with all that was noted."""
        missing = [f"missing: {', '.join(self.missing)}"] if self.missing else []
        if missing or self.problems:
            raise ConfigError(listing(f"{source} cannot be run:", [*missing, *self.problems]))

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def _placeholder(self, name: str, value: Any, expected: str, placeholder: Any) -> Any:
        if value is None:
            self.missing.append(f"{self.prefix}{name}")
        else:
            self.problems.append(f"{self.prefix}{name} must be {expected}, not {value!r}")
        return placeholder


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
