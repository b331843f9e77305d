"""What a compiled TPU program says of itself: memory, kernels, collectives, copies."""

import collections
import math
import re

import jax
import numpy as np

ITEMSIZE = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def shape_bytes(text: str) -> int:
    """Bytes of every array in an HLO type, a tuple's summed."""
    return sum(
        ITEMSIZE[dtype] * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in SHAPE.findall(text)
        if dtype in ITEMSIZE
    )


def collectives(compiled: jax.stages.Compiled) -> dict[str, dict[str, int]]:
    """By kind: how many a step has and how many bytes they return on each device. A loop's body counts once: one step.

    Asynchronous ones are counted where they end; their tuples would count twice where they start.
    """
    found: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    pattern = re.compile(rf"= (\(?[^=]*?) ({'|'.join(COLLECTIVES)})(-done)?\(")
    for line in (compiled.as_text() or "").splitlines():
        if match := pattern.search(line):
            found[match[2]]["count"] += 1
            found[match[2]]["bytes"] += shape_bytes(match[1])
    return dict(found)


def cache_copies(compiled: jax.stages.Compiled, pools) -> list[str]:
    """Operations that make another array of a pool's shard: copies, transposes, and moves between memories."""
    shapes = {",".join(map(str, pool.sharding.shard_shape(pool.shape))) for pool in jax.tree.leaves(pools)}
    text = compiled.as_text() or ""
    assert any(f"[{shape}]" in text for shape in shapes), "the program holds no pool"
    array = rf"\[(?:{'|'.join(map(re.escape, shapes))})\]"
    whole = rf"= \(?\w+{array}[^=]* (?:copy|copy-start|transpose|all-gather|all-reduce)\("
    sliced = rf"= \(\(\w+{array}[^=]* slice-start\("  # XLA moves large arrays piece by piece
    padded = rf"\w+{array}\S*S\(1\)\S* custom-call\("
    return [match[0] for match in re.finditer("|".join((whole, sliced, padded)), text)]


def kernel_vmem(compiled: jax.stages.Compiled) -> dict[str, int]:
    """VMEM that each kind of kernel uses, in bytes, by the kernel's name."""
    found: dict[str, int] = {}
    for line in (compiled.as_text() or "").splitlines():
        if 'custom_call_target="tpu_custom_call"' not in line:
            continue
        name = re.search(r"%(\w+?)(?:\.\d+)?(?:\.\w+)? = ", line)
        size = re.search(r'used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', line)
        if name and size:
            found[name[1]] = max(found.get(name[1], 0), int(size[1]))
    return found


def device_bytes(tree) -> int:
    """What one device holds of the arrays, without padding; those of the host it holds whole."""
    shapes = [
        (x.shape if isinstance(x, np.ndarray) else x.sharding.shard_shape(x.shape), x.dtype)
        for x in jax.tree.leaves(tree)
    ]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def report(compiled: jax.stages.Compiled, arguments, caches, hbm: int) -> dict:
    """Everything, for one device with `hbm` bytes of memory; outputs that are donated arguments count once.

    arguments: of the program, with shardings, or of the host; caches: the pools of each kind of cache among them.
    padding: bytes that the arguments take beyond their elements.
    """
    memory = compiled.memory_analysis()
    assert memory is not None
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes
    used = memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes + code
    return {
        "arguments": memory.argument_size_in_bytes,
        "padding": memory.argument_size_in_bytes - device_bytes(arguments),
        "donated": memory.alias_size_in_bytes,
        "outputs": outputs,
        "temporaries": memory.temp_size_in_bytes,
        "smallest_cache": min(map(device_bytes, caches)),
        "code": code,
        "hbm_share": used / hbm,
        "vmem": kernel_vmem(compiled),
        "collectives": collectives(compiled),
        "cache_copies": len(cache_copies(compiled, caches)),
    }


def faults(result: dict) -> list[str]:
    """What must not be, of a program with this report."""
    found = [] if result["hbm_share"] <= 1 else [f"it needs {result['hbm_share']:.0%} of HBM"]
    if result["cache_copies"]:
        found.append(f"{result['cache_copies']} operations copy a pool")
    if result["temporaries"] >= result["smallest_cache"]:
        found.append(f"{result['temporaries']:,} bytes of temporaries, and a cache of {result['smallest_cache']:,}")
    if result["padding"] > 2**20 + 2**-10 * result["arguments"]:  # tiles of small arrays
        found.append(f"{result['padding']:,} bytes of padding in its arguments")
    return found
