"""The tensors that one layer's store is made of, and the order in which operations take them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from spectral_compile.codec.layout import Layout

UNUSED = torch.iinfo(torch.int32).max  # start of a segment that does not exist
SLOTS = 32  # on a GPU coded slots are a multiple of it: attention in the latent copies so many at a time


class Capacity(NamedTuple):
    """Sizes that may grow: coded tokens, places of recent tokens, segments."""

    coded: int
    recent: int
    segments: int


class Buffers(NamedTuple):
    """One layer's cache. B rows, H KV heads, C coded slots, E exact places, N places of recent tokens, S segments; of a side
    G groups of W channels, and R rank.

    Token i of a row (counted from its first valid one) stands in ``exact[i]`` if it is one of the F = ``first_exact`` first;
    else it has the slot j = i - F, and stands in ``codes[j]`` once coded and in ``exact[F + j % N]`` before, with E = F + N.
    Where recent tokens are in bytes E = F, and it stands in ``recent[j % N]`` with its size in ``sizes[j % N]``; else these
    hold nothing.
    """

    k_codes: torch.Tensor  # uint8 [B, G, C, key row bytes]; in a lossless store the keys, [B, G, C, W]
    v_codes: torch.Tensor  # uint8 [B, G, C, value row bytes]; in a lossless store the values
    v_norms: torch.Tensor  # uint8 [B, G, C], log scale of each token's values
    k_basis: torch.Tensor  # int8 [B, G, S, R, W]
    v_basis: torch.Tensor  # int8 [B, G, S, R, W]
    k_affine: torch.Tensor  # float32 [B, G, S, 2 R + W]: steps, scales of the basis, channel weights
    v_affine: torch.Tensor  # float32 [B, G, S, 2 R + W]
    k_exact: torch.Tensor  # model dtype [B, H, E, D], keys before RoPE where the layout has a rotary
    v_exact: torch.Tensor  # model dtype [B, H, E, D]
    k_recent: torch.Tensor  # int8 [B, H, N, D], keys before RoPE in bytes; see ``codec.recent_code``
    v_recent: torch.Tensor  # int8 [B, H, N, D]
    k_sizes: torch.Tensor  # uint8 [B, H, N]
    v_sizes: torch.Tensor  # uint8 [B, H, N]
    starts: torch.Tensor  # int32 [B, S], first slot of each segment
    moment: torch.Tensor  # float32 [B, H, D], summed squares of the queries that saw this KV head

    def recent_slots(self, layout: Layout) -> int:
        """Places of recent tokens."""
        return self.k_recent.shape[2] if layout.recent_bits == 8 else self.k_exact.shape[2] - layout.first_exact

    def cast(self, dtype: torch.dtype, layout: Layout) -> Buffers:
        """The same with what is in the model's dtype in another one."""
        names = ("k_exact", "v_exact", *(("k_codes", "v_codes") if layout.lossless else ()))
        return self._replace(**{name: getattr(self, name).to(dtype) for name in names})


PART = {  # the line of a memory report in which each buffer is counted
    "k_codes": "codes", "v_codes": "codes", "v_norms": "scales", "k_basis": "bases", "v_basis": "bases", "k_affine": "scales",
    "v_affine": "scales", "k_exact": "recent", "v_exact": "recent", "k_recent": "recent", "v_recent": "recent",
    "k_sizes": "recent", "v_sizes": "recent", "starts": "other", "moment": "other",
}  # fmt: skip


def allocate(layout: Layout, batch: int, capacity: Capacity, dtype: torch.dtype, device: torch.device | str) -> Buffers:
    """Empty buffers for ``batch`` rows; ``dtype`` is the model's."""
    h, d = layout.kv_heads, layout.head_dim
    (_, gk, wk, _), (_, gv, wv, _) = layout.k, layout.v
    c, s = capacity.coded, capacity.segments
    in_bytes = capacity.recent if layout.recent_bits == 8 else 0
    e = layout.first_exact + capacity.recent - in_bytes
    rk, rv = layout.key.rank, layout.value.rank
    if layout.lossless:
        codes, row_k, row_v, s_basis, norms = dtype, wk, wv, 0, 0
    else:
        codes, row_k, row_v, s_basis = torch.uint8, layout.key.row_bytes, layout.value.row_bytes, s
        norms = c if layout.normalised else 0

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    buffers = Buffers(
        k_codes=empty(batch, gk, c, row_k, dtype=codes),
        v_codes=empty(batch, gv, c, row_v, dtype=codes),
        v_norms=empty(batch, gv, norms, dtype=torch.uint8),
        k_basis=empty(batch, gk, s_basis, rk, wk, dtype=torch.int8),
        v_basis=empty(batch, gv, s_basis, rv, wv, dtype=torch.int8),
        k_affine=empty(batch, gk, s_basis, 2 * rk + wk, dtype=torch.float32),
        v_affine=empty(batch, gv, s_basis, 2 * rv + wv, dtype=torch.float32),
        k_exact=empty(batch, h, e, d, dtype=dtype),
        v_exact=empty(batch, h, e, d, dtype=dtype),
        k_recent=empty(batch, h, in_bytes, d, dtype=torch.int8),
        v_recent=empty(batch, h, in_bytes, d, dtype=torch.int8),
        k_sizes=empty(batch, h, in_bytes, dtype=torch.uint8),
        v_sizes=empty(batch, h, in_bytes, dtype=torch.uint8),
        starts=torch.full((batch, s_basis), UNUSED, dtype=torch.int32, device=device),
        moment=empty(batch, h, d, dtype=torch.float32),
    )
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for x in buffers:
        if x is not buffers.starts and x.numel():
            by_dtype.setdefault(x.dtype, []).append(x)
    for some in by_dtype.values():  # one launch each on a GPU, where a prompt waits for those of all layers
        torch._foreach_zero_(some)
    return buffers
