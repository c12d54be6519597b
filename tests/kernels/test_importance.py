"""How much attention the tokens of a prompt get, against attention written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectral_compile.kernels.importance import kernel, reference
from spectral_compile.kernels.importance.weights import SAMPLE, sample
from tests.budget import examples
from tests.tiny import DEVICE

Way = Callable[..., Tensor]


def written_out(query: Tensor, key: Tensor, scale: float, head_group: int) -> Tensor:
    """Of one row without padding: [Hq, n, D], [H, n, D] -> [G, n]."""
    count, per_key = key.shape[1], query.shape[0] // key.shape[0]
    sample = -(-SAMPLE // (per_key * head_group))
    total, seen = torch.zeros(key.shape[0], count), torch.zeros(count)
    for i in range(1, sample + 1):
        token = max(i * count // sample - 1, 0)
        for head in range(query.shape[0]):
            scores = query[head, token] @ key[head // per_key, : token + 1].mT * scale
            total[head // per_key, : token + 1] += scores.softmax(-1) * (token + 1)
        seen[: token + 1] += per_key * head_group
    return total.unflatten(0, (-1, head_group)).sum(1) / seen


def weighed(query: Tensor, key: Tensor, valid: Tensor | None, scale: float, head_group: int, way: Way) -> Tensor:
    sampled = sample(query, query.shape[1] // (key.shape[1] // head_group), valid)
    return way(*sampled, key, valid, scale, head_group)


@settings(max_examples=examples(12, full=25))
@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1, 1), (2, 2, 1), (4, 2, 2), (6, 3, 3)]),
    st.integers(1, 60),
    st.booleans(),
    st.sampled_from([reference.token_weights, kernel.token_weights]),
    st.sampled_from([1, 64, 1024]),
    st.integers(0, 2**31),
)
def test_it_is_the_mean_share_of_attention(
    batch: int, heads: tuple[int, int, int], count: int, padded: bool, way: Way, run: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q_heads, kv_heads, head_group = heads
    query = 2 * torch.randn(batch, q_heads, count, 8, generator=generator)
    key = torch.randn(batch, kv_heads, count, 8, generator=generator)
    valid = torch.rand(batch, count, generator=generator) < 0.7 if padded else None
    device = "cpu" if way is reference.token_weights else DEVICE
    given = [None if x is None else x.to(device) for x in (query, key, valid)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_RUN", run)
        got = weighed(*given, 0.3, head_group, way).cpu()
    assert got.shape == (batch, kv_heads // head_group, count)
    for row in range(batch):
        keep = torch.ones(count, dtype=torch.bool) if valid is None else valid[row]
        if keep.any():
            expected = written_out(query[row][:, keep], key[row][:, keep], 0.3, head_group)
            torch.testing.assert_close(got[row][:, keep], expected, rtol=1e-4, atol=1e-5)
        assert (got[row][:, ~keep] == 0).all()


def test_scores_are_made_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(2, 4, 50, 8), torch.randn(2, 2, 50, 8)
    whole = weighed(query, key, None, 0.3, 2, reference.token_weights)
    monkeypatch.setattr(reference, "_SCORES", 1)
    torch.testing.assert_close(weighed(query, key, None, 0.3, 2, reference.token_weights), whole)


def test_tokens_that_all_look_alike_count_one() -> None:
    query, key = torch.randn(1, 4, 500, 8), torch.ones(1, 2, 500, 8)
    torch.testing.assert_close(weighed(query, key, None, 0.3, 1, reference.token_weights), torch.ones(1, 2, 500))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, dim", [((32, 8, 1), 128), ((9, 3, 3), 64), ((8, 4, 2), 80), ((8, 1, 1), 256)])
def test_in_half_precision_it_is_what_it_is_in_single(heads: tuple[int, int, int], dim: int, dtype: torch.dtype) -> None:
    q_heads, kv_heads, head_group = heads
    query, key = torch.randn(2, q_heads, 5000, dim).to(dtype), torch.randn(2, kv_heads, 5000, dim).to(dtype)
    valid = torch.ones(2, 5000, dtype=torch.bool)
    valid[1, :1234] = False
    got = weighed(query.cuda(), key.cuda(), valid.cuda(), dim**-0.5, head_group, kernel.token_weights).cpu()
    expected = weighed(query.float(), key.float(), valid, dim**-0.5, head_group, reference.token_weights)
    assert (got - expected).norm() < 1e-2 * expected.norm()
