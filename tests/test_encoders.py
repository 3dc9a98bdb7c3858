"""Text encoders: T5's family and CLIP from folders and hub names, what they give, and what is refused."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import sentencepiece
import torch
from tiny_encoders import T5_FAMILY, clip_folder, edit_json, pieces, t5_config, t5_folder
from transformers import MT5ForConditionalGeneration, T5EncoderModel

from tdm_fast import encoders as module
from tdm_fast.encoders import Encoder, check_width, find_encoder, load_encoder

PROMPTS = ["a small red circle moving left", "", "naïve café", "the quick brown fox jumps over the lazy dog"]
FLAG = "--text_encoder_name_1"


@pytest.mark.parametrize("model_type", T5_FAMILY)
def test_the_family_of_t5_with_spiece_model_alone(model_type: str, tmp_path: Path) -> None:
    encoder = load_encoder(t5_folder(tmp_path / "it", model_type), flag=FLAG)
    assert (type(encoder.model), encoder.kind, encoder.width, encoder.limit) == (T5_FAMILY[model_type][1], "t5", 8, 512)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    tokens, processor = encoder.tokenize(PROMPTS), sentencepiece.SentencePieceProcessor(model_proto=pieces())
    assert tokens == [[*processor.encode(prompt), 1] for prompt in PROMPTS]
    exact = encoder.model.double()
    for row, state in zip(tokens, encoder.states(tokens), strict=True):
        alone = exact(input_ids=torch.tensor([row])).last_hidden_state[0]
        torch.testing.assert_close(state, alone, rtol=1e-10, atol=1e-12)


def test_clip_gives_its_projected_pooled_embedding_as_one_token(tmp_path: Path) -> None:
    encoder = load_encoder(clip_folder(tmp_path / "it"), flag="--text_encoder_name_2", kind="clip")
    assert (encoder.kind, encoder.width, encoder.limit) == ("clip", 6, 77)
    encoder.model.double()
    tokens = encoder.tokenize([*PROMPTS, "x" * 200])
    assert [len(row) for row in tokens[1::3]] == [2, 77] and len(tokens[-1]) == 77
    states = encoder.states(tokens)
    for row, state in zip(tokens, states, strict=True):
        padded = torch.tensor([row + [encoder.tokenizer.pad_token_id] * (77 - len(row))])  # as the pipeline does
        expected = encoder.model(padded)[0].unsqueeze(1)[0]
        assert state.shape == (1, 6)
        torch.testing.assert_close(state, expected, rtol=1e-10, atol=1e-12)


def test_a_whole_mt5_gives_its_encoder_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    whole = MT5ForConditionalGeneration(t5_config("mt5"))
    whole.save_pretrained(tmp_path, max_shard_size="6kB")
    (tmp_path / "spiece.model").write_bytes(pieces())
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    capfd.readouterr()
    encoder = load_encoder(tmp_path, flag=FLAG, dtype=torch.bfloat16)
    assert "UNEXPECTED" not in capfd.readouterr().err
    assert encoder.dtype == torch.bfloat16 and encoder.states(encoder.tokenize(["a"]))[0].dtype == torch.bfloat16
    for name, weight in encoder.model.named_parameters():
        assert torch.equal(weight, whole.state_dict()[name].bfloat16()), name


def test_torchs_own_files_of_weights_do(tmp_path: Path) -> None:
    folder = t5_folder(tmp_path / "it")
    model = T5EncoderModel.from_pretrained(folder)
    before = find_encoder(folder, flag=FLAG).digest
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert find_encoder(folder, flag=FLAG).digest == before  # safetensors are what would be loaded
    (folder / "model.safetensors").unlink()
    encoder = load_encoder(folder, flag=FLAG)
    assert all(torch.equal(a, b) for a, b in zip(encoder.model.parameters(), model.parameters(), strict=True))


def test_layouts_of_folders(tmp_path: Path, tiny_teacher: Path) -> None:
    found = find_encoder(tiny_teacher, flag=FLAG)
    assert (found.model, found.tokenizer) == (tiny_teacher / "text_encoder", tiny_teacher / "tokenizer")
    encoder = found.load()
    assert encoder.tokenize(["a red circle"]) == [encoder.tokenizer("a red circle").input_ids]
    assert find_encoder(tiny_teacher / "text_encoder", flag=FLAG) == found.__class__(
        str(tiny_teacher / "text_encoder"), FLAG, found.model, found.tokenizer, "t5"
    )
    both = shutil.copytree(tiny_teacher, tmp_path / "both")
    clip = clip_folder(both / "text_encoder_2")
    (both / "tokenizer_2").mkdir()
    for path in clip.glob("*token*"):
        path.rename(both / "tokenizer_2" / path.name)
    assert find_encoder(both, flag=FLAG, kind="t5").model == both / "text_encoder"
    assert find_encoder(both, flag=FLAG, kind="clip").tokenizer == both / "tokenizer_2"
    assert load_encoder(both / "text_encoder_2", flag=FLAG).kind == "clip"
    apart = t5_folder(tmp_path / "apart")
    (tmp_path / "tokens").mkdir()
    (apart / "spiece.model").rename(tmp_path / "tokens" / "spiece.model")
    assert load_encoder(apart, flag=FLAG, tokenizer=tmp_path / "tokens").tokenize(["a"])[0][-1] == 1


def test_the_digest_is_of_contents(tmp_path: Path) -> None:
    one, other = t5_folder(tmp_path / "one"), t5_folder(tmp_path / "other", seed=1)
    moved = shutil.copytree(one, tmp_path / "elsewhere")
    (moved / "README.md").write_text("a card")
    digests = [find_encoder(folder, flag=FLAG).digest for folder in (one, moved, other)]
    assert digests[0] == digests[1] != digests[2]
    weights = moved / "model.safetensors"
    blob = tmp_path / "blobs" / hashlib.sha256(weights.read_bytes()).hexdigest()
    blob.parent.mkdir()
    weights.rename(blob)
    weights.symlink_to(blob)  # as in the hub's cache
    assert find_encoder(moved, flag=FLAG).digest == digests[0]
    edit_json(moved / "config.json", layer_norm_epsilon=1e-5)
    assert find_encoder(moved, flag=FLAG).digest not in digests


def test_a_width_that_does_not_fit_names_encoders_that_do(tmp_path: Path) -> None:
    found = find_encoder(t5_folder(tmp_path / "it", width=16), flag=FLAG)
    check_width(found, 16)
    with pytest.raises(ValueError, match=r"it is 16 wide but .*caption_channels=4096; google/mt5-xxl, google/umt5-xxl"):
        check_width(found.load(), 4096)
    with pytest.raises(ValueError, match="none of the published ones fits; use the teacher's own"):
        check_width(found, 17)
    clip = find_encoder(clip_folder(tmp_path / "clip"), flag="--text_encoder_name_2")
    with pytest.raises(ValueError, match=r"--text_encoder_name_2 .* 6 wide .* openai/clip-vit-large-patch14 would fit"):
        check_width(clip, 768, flag="--text_encoder_name_2")


def broken(kind: str, folder: Path) -> Path:
    t5_folder(folder)
    weights = folder / "model.safetensors"
    if kind == "no model":
        weights.unlink()
        (folder / "config.json").unlink()
    elif kind == "nothing":
        for path in folder.iterdir():
            path.unlink()
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no tokenizer":
        (folder / "spiece.model").unlink()
        (folder / "tokenizer_config.json").write_text("{}")
    elif kind == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "missing shard":
        T5EncoderModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="5kB")
        weights.unlink(missing_ok=True)
        sorted(folder.glob("model-*.safetensors"))[1].unlink()
    elif kind == "damaged tokenizer":
        (folder / "spiece.model").write_bytes(b"\xff" * 99)
    elif kind == "another type":
        edit_json(folder / "config.json", model_type="bert")
    elif kind == "another width":
        edit_json(folder / "config.json", d_model=12)
    elif kind == "another depth":
        edit_json(folder / "config.json", num_layers=3)
    elif kind == "damaged config":
        (folder / "config.json").write_text("{")
    elif kind == "clip":
        shutil.rmtree(folder)
        clip_folder(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("no model", "holds a tokenizer without its model"),
        ("nothing", r"no config.json in it or in its text_encoder/ \(found: nothing\)"),
        ("no weights", "holds no weights; it takes model"),
        ("no tokenizer", "holds no tokenizer; a model needs its own, which is tokenizer.json, spiece.model"),
        ("cut weights", "model.safetensors is cut short or damaged"),
        ("missing shard", r"lacks model-00002-of-\d+.safetensors of \d+ files"),
        ("damaged tokenizer", "the tokenizer in .* cannot be read"),
        ("another type", "its model is of type 'bert'; it takes t5, mt5, umt5, clip"),
        ("another width", "are not of one T5EncoderModel"),
        ("another depth", "lacks 9 weights of T5EncoderModel, encoder.block.2"),
        ("damaged config", "config.json is damaged"),
        ("clip", "it is a CLIP encoder; this flag takes T5, mT5 or UMT5"),
    ],
)
def test_what_cannot_work_is_refused(kind: str, says: str, tmp_path: Path) -> None:
    folder = broken(kind, tmp_path / "it")
    with pytest.raises(ValueError, match=says) as error:
        load_encoder(folder, flag=FLAG, kind="t5")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_model_of_another_family_is_no_encoder() -> None:
    class Other(torch.nn.Module):
        config = type("Config", (), {"model_type": "bert"})()

    with pytest.raises(ValueError, match=r"text_encoder: it is a Other; it takes a T5, mT5 or UMT5 encoder"):
        Encoder.of(None, Other())


@pytest.mark.parametrize("name", ["runs/no/such", "./nothing", "/nothing", "a_file"])
def test_what_is_no_folder_is_no_hub_name_either(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    monkeypatch.setattr(module, "_cached", lambda _: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=f"{FLAG} {name}: no such folder; it takes a folder"):
        find_encoder(name, flag=FLAG)


def in_the_cache(cache: Path, folder: Path, name: str) -> None:
    """Put a folder where the hub's client keeps a download of `name`."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")


def test_a_hub_name_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = (
        "--text_encoder_name_1 google/none: no such folder, not whole in this machine's Hugging Face cache, .*"
        r"\(HF_HUB_OFFLINE is set\); .*`hf download google/none --local-dir FOLDER`.*--text_encoder_name_1 FOLDER"
    )
    with pytest.raises(ValueError, match=message):
        find_encoder("google/none", flag=FLAG)
    in_the_cache(tmp_path / "cache", t5_folder(tmp_path / "it"), "google/tiny")
    assert load_encoder("google/tiny", flag=FLAG).name == "google/tiny"
    in_the_cache(tmp_path / "cache", broken("no weights", tmp_path / "half"), "google/half")
    with pytest.raises(ValueError, match="google/half: no such folder, not whole in this machine's"):
        find_encoder("google/half", flag=FLAG)


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: time.sleep(20))
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"google/none: .*\(no answer in 0 s\)"):
        find_encoder("google/none", flag=FLAG)
    assert time.monotonic() - began < 10


def test_a_hub_that_answers_gives_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    folder = t5_folder(tmp_path / "it")
    asked: list[object] = []

    def download(name: str, *, local_files_only: bool = False, allow_patterns: object = None) -> str:
        if local_files_only:
            raise FileNotFoundError
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for files, weights in (
        (["model.safetensors", "pytorch_model.bin"], "*.safetensors"),
        (["p.bin", "tf.h5"], "*.bin"),
    ):
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, files=files: files)
        assert find_encoder("google/tiny", flag=FLAG).model == folder
        assert asked.pop() == ["*.json", "*.model", "*.txt", weights]
