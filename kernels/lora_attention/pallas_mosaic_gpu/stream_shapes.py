"""What the streaming kernel of decode is compiled for, and what it keeps in shared memory."""

import dataclasses

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from lragent_jax.kernels.hopper import SHARED_MEMORY, tiled

BLOCK_Q = BLOCK_KV = 64  # a warpgroup's matrix instruction takes 64 rows; 64 keys are one 128-byte row of low-rank
LANES = 128  # threads of a warpgroup, one f32 each
MAX_BARRIERS = 32  # in one group
WARPS = 4  # of a warpgroup
# Where the memory warps' turns begin: what an item needs first comes from different ones.
BASE, VALUES, KEYS, ANGLES, QUERIES = 0, 1, 2, 3, 3
PRODUCT_WIDTH = 128  # lanes of o_lr while streaming, all warpgroups' together: more would not fit the registers


def turns(warp: int, first: int, numbers: range) -> list[int]:
    """Which of them are the warp's, the warps taking them in turn from `first` on."""
    return [n for n in numbers if (first + n) % WARPS == warp]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What `stream` is compiled for."""

    B: int
    T: int
    K: int
    G: int
    H: int
    p: int
    R: int  # rows per item
    r_v: int
    r_k: int
    readers: int  # the most low-rank pages that an item reads per column
    stages: int
    compute: int  # warpgroups that compute
    scale: float  # of scores, for base 2
    interpret: bool = False

    @property
    def one_item(self) -> bool:
        """Whether no lane has more items than one: then a program is for that item alone."""
        return self.B == 1 and self.T <= self.R

    @property
    def one_at_a_time(self) -> bool:
        """Whether an item's queries come when the one before is over: for rebuilding keys they stay to its end."""
        return bool(self.r_k) and not self.one_item

    @property
    def tells_of_results(self) -> bool:
        """Whether others than the warpgroup that writes results wait until they are gone."""
        return self.one_at_a_time or (self.compute == 2 and not self.one_item)

    @property
    def ready(self) -> int:
        """Barriers that tell of blocks: a multiple of the warpgroups, so that each always waits for the same ones."""
        return self.stages * (1 if self.stages % self.compute == 0 else self.compute)

    @property
    def joined(self) -> int:
        """Readers whose low-rank values are multiplied at once, a power of two; a row's lanes are picked in the end.

        Where keys are rebuilt, it is one: that takes the registers.
        """
        if not self.r_v or self.r_k:
            return 1
        fitting = max(1, PRODUCT_WIDTH // self.compute // self.r_v)
        return min(1 << (fitting.bit_length() - 1), 1 << (self.readers - 1).bit_length())

    @property
    def products(self) -> int:
        """How many such products all readers take."""
        return -(-self.readers // self.joined)

    def brings_values(self, warp: int) -> bool:
        return bool(self.r_v and turns(warp, VALUES, range(self.products * self.joined)))

    def brings_keys(self, warp: int) -> bool:
        return bool(self.r_k and turns(warp, KEYS, range(self.readers)))

    @property
    def block_warps(self) -> list[int]:
        """The memory warps that have something of a block to bring."""
        others = {BASE} | ({ANGLES} if self.r_k else set())
        return [w for w in range(WARPS) if w in others or self.brings_values(w) or self.brings_keys(w)]

    @property
    def page_slots(self) -> int:
        """Slots of a page that one block takes."""
        return min(self.p, BLOCK_KV)

    @property
    def pages_per_block(self) -> int:
        return BLOCK_KV // self.page_slots

    @property
    def blocks_per_page(self) -> int:
        return max(1, self.p // BLOCK_KV)

    def smem_bytes(self) -> int:
        """Shared memory, nearly: what the buffers take, and some for alignment and barriers."""
        item = BLOCK_Q * 4 * (self.H + self.aux_width) + 5120
        if not (self.one_item or self.one_at_a_time):
            item += BLOCK_Q * 2 * self.H  # the next item's queries come before this one's result has gone
        low_rank = self.products * self.joined * self.r_v + self.readers * self.r_k
        stage = BLOCK_KV * 2 * (2 * self.H + low_rank)
        if self.r_k:
            rebuilt = self.compute * BLOCK_KV if self.readers > 1 else 0
            item += 2 * self.H * (BLOCK_Q + rebuilt + self.readers * self.r_k)
            stage += BLOCK_KV * 2 * self.H
        return item + self.stages * stage

    def low_rank_barriers(self) -> int:
        """Of one warpgroup, for either pool."""
        return self.stages * (self.readers if self.r_k else self.products)

    def fitted(self) -> "Shapes":
        """The same with fewer stages, then with fewer rows per item, so that shared memory and barriers suffice."""
        fits = self
        while fits.smem_bytes() > SHARED_MEMORY or fits.low_rank_barriers() > MAX_BARRIERS:
            if fits.stages > 2:
                fits = dataclasses.replace(fits, stages=fits.stages - 1)
            else:
                fewer = (fits.R + 1) // 2
                fits = dataclasses.replace(fits, R=fewer, readers=min(fits.readers, fewer), stages=self.stages)
        return fits

    @property
    def aux_lane(self) -> int:
        return max(self.H, LANES)

    @property
    def aux_width(self) -> int:
        """Lanes for o_lr, m and l. TMA takes 128-byte steps through shared memory."""
        return -(-(self.r_v + 2) // 32) * 32

    @property
    def record(self) -> int:
        return self.aux_lane + LANES


def scratch(s: Shapes, dtype) -> dict:
    """The kernel's buffers and barriers by name."""
    swizzle = 64 if s.r_k and s.H == 64 else 128  # low-rank keys are added to halves of K
    q_smem, o_smem = plgpu.SMEM((BLOCK_Q, s.H), dtype), plgpu.SMEM((BLOCK_Q, s.H), jnp.float32)
    buffers = {
        "kv_smem": tiled(s.stages, BLOCK_KV, 2 * s.H, dtype=dtype, swizzle=swizzle),
        "aux_smem": plgpu.SMEM((BLOCK_Q, s.aux_width), jnp.float32),
        "m_smem": plgpu.SMEM((BLOCK_Q,), jnp.float32),
        "l_smem": plgpu.SMEM((BLOCK_Q,), jnp.float32),
        "q_ready": plgpu.Barrier(num_arrivals=s.R),
        "q_read": plgpu.Barrier(num_arrivals=s.compute),
        "handed_over": plgpu.Barrier(),
        "result_gone": plgpu.Barrier(),
        "kv_ready": plgpu.Barrier(num_arrivals=s.pages_per_block + len(s.block_warps) - 1, num_barriers=s.ready),
        "read": plgpu.Barrier(num_barriers=s.stages),
        "asked_for": plgpu.Barrier(num_barriers=WARPS),
    }
    if s.one_item or s.one_at_a_time:  # the queries are done with when the result is there
        buffers["queries_or_result"] = plgpu.RefUnion(q_smem, o_smem)
    else:
        buffers |= {"q_smem": q_smem, "o_smem": o_smem}
    if s.r_v:
        count, rows = s.stages * s.products, s.joined * s.r_v
        swizzled = tiled(count, s.pages_per_block, rows, s.page_slots, dtype=dtype, swizzle=2 * s.page_slots)
        flat = plgpu.SMEM((count, rows * BLOCK_KV), dtype)
        ready = plgpu.Barrier(num_arrivals=s.pages_per_block * s.joined, num_barriers=count)
        buffers |= {"low_rank_values": plgpu.RefUnion(swizzled, flat), "v_ready": [ready] * s.compute}
    if s.r_k:
        buffers |= {
            "rope_smem": tiled(s.stages, BLOCK_KV, s.H, dtype=jnp.float16, swizzle=swizzle),
            "k_smem": tiled(s.stages * s.readers, 1, s.r_k, BLOCK_KV, dtype=dtype, swizzle=32),
            "k_ready": [plgpu.Barrier(num_arrivals=1, num_barriers=s.stages * s.readers)] * s.compute,
            "b_smem": tiled(s.readers, s.r_k, s.H, dtype=dtype, swizzle=32),
            "b_ready": plgpu.Barrier(num_barriers=s.readers),
            "q_tiled": tiled(BLOCK_Q, s.H, dtype=dtype, swizzle=swizzle),
            "q_tiled_ready": plgpu.Barrier(),
        }
        if s.readers > 1:
            buffers["own_k"] = tiled(s.compute, BLOCK_KV, s.H, dtype=dtype, swizzle=swizzle)
    return buffers
