"""Decode steps as CUDA graphs: the host starts a step by one call instead of launching hundreds of kernels."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from spectral_compile import report
from spectral_compile.kernels.capture import capture

log = logging.getLogger(__name__)

_KEPT = 4  # recordings at most: as many conversations can take turns without a new recording


class Replay:
    """A compiled step that is recorded once two calls in a row read the same memory, and replayed where a call does so again.

    Inputs at the places ``move`` are copied to where a recording reads them. The others are read where they lie: ``data_ptr``
    of those at ``stay`` is compared at each call, and the rest, hundreds of buffers, is known by what the caller passes for
    them. What a step returns is copied, since the next replay writes to the same memory.
    """

    def __init__(self, compiled: Callable[..., Any], move: list[int], stay: list[int], device: torch.device) -> None:
        self.compiled, self.move, self.stay, self.device = compiled, move, stay, device
        self._recordings: dict[Hashable, _Recording] = {}
        self._last: Hashable = None

    def __call__(self, inputs: Sequence[Any], rest: tuple[Hashable, ...]) -> Sequence[Any]:
        """What the step returns for ``inputs``.

        ``rest`` is equal in two calls if the inputs at neither ``move`` nor ``stay`` lie at the same addresses, in the same
        shapes, and if the sizes of those at ``stay`` are the same.
        """
        moved = [inputs[i] for i in self.move]
        layouts = [(x.shape, _strides(x)) if isinstance(x, torch.Tensor) else x for x in moved]
        key = (rest, *layouts, *[inputs[i].data_ptr() for i in self.stay])
        recording = self._recordings.get(key)
        if recording is None:
            if key != self._last:
                results, waited = watch(lambda: self.compiled(*inputs))
                if waited:
                    log.debug("not recorded: this step waited for the GPU")
                self._last = None if waited else key  # a recording cannot wait for the GPU, and breaks if it tries to
                return results
            if len(self._recordings) == _KEPT:
                self._recordings.pop(next(iter(self._recordings)))
            recording = self._recordings[key] = _Recording(self, inputs)
        return recording.play(moved)


def _strides(x: torch.Tensor) -> tuple[int, ...]:
    """Strides, but 1 where there is one element: those grow with a text that inputs are cut from."""
    return tuple(stride if size > 1 else 1 for size, stride in zip(x.shape, x.stride(), strict=True))


class _Recording:
    def __init__(self, step: Replay, inputs: Sequence[Any]) -> None:
        given = list(inputs)
        self._read: list[tuple[torch.Tensor, tuple[slice, ...]] | None] = []  # by the places of ``step.move``
        for i in step.move:
            if isinstance(x := inputs[i], torch.Tensor):
                strides = _strides(x)
                # of dimensions of stride 0, which repeat one element, only that one is copied
                once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)
                with torch.inference_mode(False):  # a tensor made in inference mode cannot be written to outside of it
                    read = torch.empty_strided(x[once].shape, strides, dtype=x.dtype, device=x.device)
                given[i] = read.expand(x.shape)
                self._read.append((read, once))
            else:
                self._read.append(None)
        self._replay, self._results = capture(lambda: step.compiled(*given), step.device)
        report.count_recording()
        log.info("recorded a CUDA graph, the %d. since the last reset", report.recordings())

    def play(self, moved: list[Any]) -> list[Any]:
        for place, given in zip(self._read, moved, strict=True):
            if place is not None:
                read, once = place
                read.copy_(given[once])
        self._replay()
        return [x.clone() if isinstance(x, torch.Tensor) else x for x in self._results]


def watch(call: Callable[[], Any]) -> tuple[Any, bool]:
    """What ``call`` returns, and whether it waited for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waited = False
    for warning in caught:
        if "synchroniz" in str(warning.message).lower():
            waited |= "prototype" not in str(warning.message)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return result, waited
