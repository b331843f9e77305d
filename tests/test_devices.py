"""Memory that is not there is not asked for."""

import pytest
from engines import tiny_engine

from lragent_jax import devices
from lragent_jax.devices import machine_bytes
from lragent_jax.models.errors import OutOfPagesError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_pages": 10**9}, r"1,000,000,000 base pages \(.* GB\) and .* low_rank pages .* lower num_pages$"),
        ({"num_pages": 9, "num_low_rank_pages": 10**9}, r"9 base pages .* lower num_low_rank_pages$"),
        ({"sharing": "none", "num_pages": 10**9}, r"for 1,000,000,000 base pages .* lower num_pages$"),
    ],
)
def test_pools_larger_than_all_memory_are_refused_before_anything_is_allocated(options, message):
    """Of a CPU: the process would be killed for them, be it only for the list of what is free."""
    with pytest.raises(OutOfPagesError, match=message):
        tiny_engine(**{"sharing": "base_lr"} | options)


def test_a_container_has_what_it_may_have(tmp_path, monkeypatch):
    (tmp_path / "limit").write_text("1000\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(devices, "CGROUP_LIMITS", [tmp_path / "none", tmp_path / "missing"])
    machine = machine_bytes()
    assert machine is not None
    assert machine > 1000
    monkeypatch.setattr(devices, "CGROUP_LIMITS", [tmp_path / "none", tmp_path / "limit"])
    with pytest.raises(OutOfPagesError, match="no room for 48 base pages"):
        tiny_engine("none")
