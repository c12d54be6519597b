"""What is kept of a prompt until its cache is asked for, and how long."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from spectral_compile.codec.presets import PRESETS
from spectral_compile.kernels.advance.op import advance
from spectral_compile.kernels.append import later
from spectral_compile.kernels.append.later import keeping
from spectral_compile.kernels.append.op import append_
from spectral_compile.kernels.buffers import UNUSED, Buffers, Capacity, allocate

LAYOUT = replace(PRESETS["balanced"], recent=16, block=32, warmup=64).layout(2, 16)
COUNT = 300


def stores(number: int) -> list[Buffers]:
    return [allocate(LAYOUT, 1, Capacity(COUNT, LAYOUT.recent + LAYOUT.first, 1), torch.float32, "cpu") for _ in range(number)]


def same(ours: Buffers, truth: Buffers) -> bool:
    """Up to sums of queries in another order, by which few codes are others."""
    pairs = list(zip(ours, truth, strict=True))
    for a, b in pairs:
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    return sum(int((a != b).sum()) for a, b in pairs if not a.is_floating_point()) < 0.01 * ours.k_codes.numel()


def coded(buffers: Buffers) -> bool:
    return int(buffers.starts[0, 0]) != UNUSED


def read(all_buffers: list[Buffers], count: int = COUNT, before: int = 0) -> None:
    """As a graph reads a prompt of so many columns, behind others."""
    generator = torch.Generator().manual_seed(0)
    ledger, positions = torch.tensor([[0, 0, 0, 0, 1, 0]]), torch.zeros(1, 2 * COUNT, dtype=torch.int32)
    for columns in (before, count) if before else (count,):
        x = torch.randn(1, 2, columns, 16, generator=generator)
        advance(ledger, positions, None, None, x, LAYOUT)
    for i, buffers in enumerate(all_buffers):
        append_(x.clone(), x.clone(), x.clone(), ledger, None, x.clone(), 0.25, i, *buffers, LAYOUT.spec())


def test_layers_are_kept_until_they_are_asked_for() -> None:
    mine, truth = stores(3), stores(3)
    with keeping(mine) as prompt:
        read(mine)
    assert len(prompt.layers) == 3 and not any(map(coded, mine))
    prompt.store()
    read(truth)
    assert not prompt.layers, "the copies live on"
    assert all(map(same, mine, truth))


def test_what_finds_no_room_is_stored_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(later, "_room", lambda device: 2.5 * 3 * 2 * COUNT * 16 * 4)
    mine = stores(4)
    with keeping(mine) as prompt:
        read(mine)
    assert len(prompt.layers) == 2 and list(map(coded, mine)) == [False, False, True, True]


@pytest.mark.parametrize(("count", "before"), [(later.TOKENS + 1, 0), (40, 20), (1, 0)])
def test_long_prompts_and_those_that_go_on_are_not_kept(count: int, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(later, "TOKENS", COUNT)
    mine = stores(1)
    with keeping(mine) as prompt:
        read(mine, min(count, COUNT + 1), before)
    assert not prompt.layers


def test_another_prompt_stores_the_one_before() -> None:
    """Many caches that nobody asks for would stay as large as they came."""
    first, second = stores(1), stores(1)
    with keeping(first) as prompt:
        read(first)
    with keeping(second):
        assert coded(first[0]) and not prompt.layers
        read(second)
    assert not coded(second[0])


def test_what_nobody_asks_for_dies_with_its_cache() -> None:
    with keeping(stores(1)) as prompt:
        read(list(prompt.stores))
    copy = weakref.ref(prompt.layers[0].key)
    del prompt
    gc.collect()
    assert copy() is None


def test_buffers_that_a_store_has_outgrown_die_before_all_stores_are_read() -> None:
    """They live as long as anything refers to them, of a whole cache at a time of growth."""
    mine = stores(2)
    with keeping(list(mine)) as prompt:
        read(mine)
    prompt.store()
    outgrown = weakref.ref(mine[0].k_codes)
    mine.pop(0)
    gc.collect()
    assert outgrown() is None


def test_an_error_leaves_nothing_kept() -> None:
    with pytest.raises(ZeroDivisionError), keeping(stores(1)):
        raise ZeroDivisionError
    assert later._now.prompt is None
    mine = stores(1)
    read(mine)
    assert coded(mine[0])


def test_a_prompt_may_be_asked_for_in_another_mode() -> None:
    """Read in inference mode and gone on with outside of it, and under autocast."""
    with torch.inference_mode():
        mine = stores(1)
        with keeping(mine) as prompt:
            read(mine)
    with torch.autocast("cpu", torch.bfloat16):
        prompt.store()
    with torch.inference_mode():
        truth = stores(1)
        read(truth)
    assert same(mine[0], truth[0])
