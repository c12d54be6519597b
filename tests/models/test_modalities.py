"""Encoder-decoders and models that see: their decoders are compressed where they can be, and never wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

import spectral_compile as sc
from spectral_compile import report
from tests.budget import FULL
from tests.tiny import EXACT, GREEDY, GROUPED, MIXED, OLDEST, tokens

Inputs = dict[str, torch.Tensor]

SIZES = {
    "vocab_size": 256,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 1,
}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4, "initializer_factor": 1.0}
EYES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_channels": 3}
IMAGE = {"image_size": 16, "patch_size": 8}
IMAGE_TOKEN = 255
TWO_ANGLES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def qwen2_vl() -> PreTrainedModel:
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 1}
    patches = {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 1}
    config = hf.Qwen2VLConfig(
        text_config={**GROUPED, "rope_parameters": TWO_ANGLES},
        vision_config={**vision, **patches},
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=253,
        vision_end_token_id=254,
        video_token_id=252,
    )
    return hf.Qwen2VLForConditionalGeneration(config)


BUILD: dict[str, Callable[[], PreTrainedModel]] = {
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SIZES, max_position_embeddings=512)),
    "m2m100": lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**SIZES, max_position_embeddings=512)),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**SIZES, max_source_positions=30, max_target_positions=200, num_mel_bins=8)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**T5, vocab_size=256, pad_token_id=0, eos_token_id=None, decoder_start_token_id=0)
    ),
    "llava": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**EYES, **IMAGE, projection_dim=32),
            text_config=hf.LlamaConfig(**GROUPED),
            image_token_index=IMAGE_TOKEN,
            image_seq_length=4,
            vision_feature_layer=-1,
        )
    ),
    "idefics3": lambda: hf.Idefics3ForConditionalGeneration(
        hf.Idefics3Config(
            text_config=hf.LlamaConfig(**GROUPED), vision_config={**EYES, **IMAGE}, image_token_id=IMAGE_TOKEN, scale_factor=1
        )
    ),
    "qwen2-vl": qwen2_vl,
    "gemma3-with-images": lambda: hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            text_config=hf.Gemma3TextConfig(**MIXED, head_dim=16),
            vision_config=hf.SiglipVisionConfig(**EYES, **IMAGE),
            mm_tokens_per_image=4,
            boi_token_index=253,
            eoi_token_index=254,
            image_token_index=IMAGE_TOKEN,
        )
    ),
    "paligemma": lambda: hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(
            text_config=hf.GemmaConfig(**GROUPED, head_dim=16),
            vision_config=hf.SiglipVisionConfig(**EYES, **IMAGE),
            image_token_index=IMAGE_TOKEN,
            projection_dim=64,
        )
    ),
}
# what is compressed of the attention sites in each graph with a cache
MATCHED = {
    "bart": (2, 4),
    "m2m100": (2, 4),
    "whisper": (2, 4),
    "t5": (0, 4),
    "llava": (2, 2),
    "idefics3": (2, 2),
    "qwen2-vl": (2, 2),
    "gemma3-with-images": (1, 2),
    "paligemma": (2, 2),
}
PADDED = ["bart", "gemma3-with-images", *(["llava", "paligemma"] if FULL or OLDEST else [])]


def inputs(name: str, rows: int = 1) -> Inputs:
    """A prompt of ``rows`` rows, each with an image after seven tokens where the model sees."""
    ids, images = tokens(rows, 40).clamp(max=250), torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    if name == "whisper":
        return {"input_features": torch.randn(rows, 8, 60, generator=torch.Generator().manual_seed(0))}
    if name in ("bart", "m2m100", "t5"):
        return {"input_ids": ids}
    if name == "qwen2-vl":
        ids[:, 7:10] = torch.tensor([253, IMAGE_TOKEN, 254])
        grid = torch.tensor([[1, 2, 2]]).expand(rows, 3)
        seen = {"pixel_values": images.reshape(4 * rows, -1), "image_grid_thw": grid}
        return {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE_TOKEN).int(), **seen}
    ids[:, 7:11] = IMAGE_TOKEN
    given = {"input_ids": ids, "pixel_values": images[:, None] if name == "idefics3" else images}
    if name in ("gemma3-with-images", "paligemma"):
        given["token_type_ids"] = (ids == IMAGE_TOKEN).long() if name != "paligemma" else torch.zeros_like(ids)
    return given


def both(name: str, given: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the compressed model and the dense one, logits of 20 new tokens [20, rows, vocabulary]; of Whisper, the tokens.

    Whisper cuts a cache that it gives back with logits into rows, for which it is decoded.
    """
    sc.reset()
    wanted = {} if name == "whisper" else {"output_logits": True, "return_dict_in_generate": True}
    made = []
    for compress in (True, False):
        torch.manual_seed(0)
        model = BUILD[name]().eval()
        if compress:
            model.compile(backend=sc.spectral, options={**EXACT, "strict": False})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", report.SpectralWarning)
            out = model.generate(**given, max_new_tokens=20, **wanted, **GREEDY)
        made.append(torch.stack(out.logits) if wanted else out)
    return made[0], made[1]


def assert_compressed(name: str) -> None:
    assert report.decodes() == 0
    graphs = [graph for graph in sc.reports() if graph.kind != "other"]  # of what sees there may be graphs too
    assert {graph.kind for graph in graphs} == ({"prefill", "decode"} if MATCHED[name][0] else set())
    assert {(graph.matched, graph.sites) for graph in graphs} == ({MATCHED[name]} if MATCHED[name][0] else set())


@pytest.mark.newest
@pytest.mark.parametrize("name", BUILD)
def test_logits_equal_dense(name: str) -> None:
    ours, dense = both(name, inputs(name))
    torch.testing.assert_close(ours, dense, atol=1e-3, rtol=1e-3)
    assert_compressed(name)


@pytest.mark.parametrize("name", PADDED)
def test_logits_of_padded_rows_equal_dense(name: str) -> None:
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[0, :5] = 0
    ours, dense = both(name, {**inputs(name, rows=2), "attention_mask": mask})
    torch.testing.assert_close(ours, dense, atol=1e-3, rtol=1e-3)
    assert_compressed(name)


def test_cross_attention_to_a_text_as_long_as_the_prompt_stays_dense() -> None:
    """Of one length with the decoder's own tokens, it looks like self-attention."""
    ours, dense = both("bart", {"input_ids": tokens(1, 12), "decoder_input_ids": tokens(1, 12, seed=1)})
    torch.testing.assert_close(ours, dense, atol=1e-3, rtol=1e-3)
    assert_compressed("bart")
