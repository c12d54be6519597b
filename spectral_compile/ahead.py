"""Generation whose host runs ahead of the GPU: ``model.generate(..., custom_generate=spectral_compile.run_ahead)``.

transformers' own loop asks after every token whether all texts have ended, and waits for the answer: what the host does for a
step, and what the GPU does, never overlap. Here the answer about one token is read once the step after it has been launched.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from spectral_compile.errors import Mistake
from spectral_compile.outputs import cache_argument, cache_of

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList


def run_ahead(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    stream_to: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Greedy search or sampling as ``generate`` does it, by its ``custom_generate``, with the same tokens and outputs.

    Once all texts have ended one step more has been made, which is taken back from what is returned, the cache included.
    Stopping criteria see that step, and when sampling it has drawn from the generator. A streamer is ``stream_to``, since
    transformers keeps ``streamer``, and the tokenizer that ``stop_strings`` asks for, from a loop that is not its own; it is
    given each token one step later. ``Mistake`` for ``streamer``, for beams and for models with an encoder.
    """
    if generation_config.num_beams > 1 or model.config.is_encoder_decoder:
        raise Mistake("run_ahead generates one text a prompt, greedily or by sampling, with decoder-only models")
    # whoever reads from one that is given no token waits for ever; of what called this it is a local name
    if sys._getframe(1).f_locals.get("streamer") is not None:
        raise Mistake("generate does not hand its streamer to run_ahead: pass it as stream_to instead")
    if stream_to is not None:
        stream_to.put(input_ids.cpu())
    kept = _Kept.of(generation_config)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    padding: Any = generation_config._pad_token_tensor  # there is one where texts end by a token
    padding = padding if padding is None else padding.to(input_ids.device)
    unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
    compiles = model._valid_auto_compile_criteria(model_kwargs, generation_config)
    forward = model.get_compiled_call(generation_config.compile_config) if compiles else model.__call__
    before: _Answer | None = None

    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    cache = cache_of(outputs)
    asked_for = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    returned = cache is not None and asked_for
    waits = returned and not _can_crop(cache)
    with model._optimize_model_for_decode():
        while True:
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)
            # a copy, or logits of a whole prompt would stay alive
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
            scores = logits_processor(input_ids, logits)
            kept.add(scores, logits, outputs)
            del outputs
            if generation_config.do_sample:
                tokens = torch.multinomial(torch.softmax(scores, -1), num_samples=1).squeeze(1)
            else:
                tokens = scores.argmax(-1)
            if ends:
                tokens = tokens * unfinished + padding * (1 - unfinished)
            input_ids = torch.cat((input_ids, tokens[:, None]), -1)
            unfinished = unfinished & ~stopping_criteria(input_ids, kept.scores)
            answer = _Answer(unfinished, tokens)

            too_many = before is not None and _told(before, stream_to)
            full = stopping_criteria.max_length is not None and input_ids.shape[1] >= stopping_criteria.max_length
            if too_many or full or (waits and answer.ended):
                break
            before = answer
            count = 1 if model_kwargs["use_cache"] else None
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=count, **model_kwargs)
            outputs = forward(**inputs, return_dict=True)
    if too_many:
        input_ids = input_ids[:, :-1]
        kept.drop()
        if returned:
            cache.crop(-1)
    elif stream_to is not None:
        stream_to.put(answer.tokens)
    if stream_to is not None:
        stream_to.end()
    return kept.output(input_ids, cache) if generation_config.return_dict_in_generate else input_ids


class _Answer:
    """What the host is to know of a step, on its way there: whether all texts have ended, and their tokens."""

    def __init__(self, unfinished: torch.Tensor, tokens: torch.Tensor) -> None:
        ended = (unfinished.max() == 0).to(tokens.dtype)
        # in pinned memory, as torch copies without blocking
        self._both = torch.cat((ended[None], tokens)).to("cpu", non_blocking=True)
        self._there = None if tokens.device.type == "cpu" else torch.Event(device=tokens.device, blocking=True)
        if self._there is not None:
            self._there.record()

    def _read(self) -> torch.Tensor:
        if self._there is not None:
            self._there.synchronize()
        return self._both

    @property
    def ended(self) -> bool:
        return bool(self._read()[0])

    @property
    def tokens(self) -> torch.Tensor:
        return self._read()[1:]


def _told(answer: _Answer, streamer: Any) -> bool:
    """Whether all texts had ended with this step, whose tokens the streamer is given."""
    if streamer is not None:
        streamer.put(answer.tokens)
    return answer.ended


def _can_crop(cache: Any) -> bool:
    """Whether a step can be taken back: a window that has slid, and a state, have lost what was before it."""
    return cache.is_croppable and not any((*cache.is_sliding, *cache.is_linear))


@dataclass
class _Kept:
    """What ``generate`` was asked to return of each step, None where it was not."""

    scores: tuple[Any, ...] | None = None
    logits: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None

    @classmethod
    def of(cls, asked: GenerationConfig) -> _Kept:
        return cls(*(() if asked.return_dict_in_generate and getattr(asked, f"output_{x.name}") else None for x in fields(cls)))

    def add(self, scores: torch.Tensor, logits: torch.Tensor, outputs: Any) -> None:
        given = {"scores": scores, "logits": logits}
        for name in (x.name for x in fields(self)):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, (*held, given[name] if name in given else getattr(outputs, name)))

    def drop(self) -> None:
        """Forget the last step."""
        for name in (x.name for x in fields(self)):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, held[:-1])

    def output(self, sequences: torch.Tensor, cache: Any) -> Any:
        from transformers.generation.utils import GenerateDecoderOnlyOutput  # here, since to import it takes seconds

        held = {x.name: getattr(self, x.name) for x in fields(self)}
        return GenerateDecoderOnlyOutput(sequences=sequences, **held, **cache_argument(cache))
