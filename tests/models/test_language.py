"""BERT and DistilBERT against transformers' own: sizes, outputs, weights from files; and what padding may change."""

import json
import pickle
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from permask_core.data.splits import Split
from permask_core.masks import prunable_weights
from permask_core.matching import permutation_groups
from permask_core.models import build_model, evaluation_mode, extras
from permask_core.models.vision import torchvision  # noqa: F401 - before transformers, which loads what is asked for, imports it
from permask_core.training import Recipe, evaluate, fit
from tests.hypotheses import examples

NAMES = ("bert", "distilbert")
CONFIGS = {"bert": transformers.BertConfig, "distilbert": transformers.DistilBertConfig}
THEIRS = {"bert": transformers.BertForSequenceClassification, "distilbert":
          transformers.DistilBertForSequenceClassification}
ENCODERS = {"bert": transformers.BertModel, "distilbert": transformers.DistilBertModel}
SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "max_position_embeddings": 16}
WIDE = {"bert": "intermediate_size", "distilbert": "hidden_dim"}  # the MLP's, which the two call differently
LENGTH = 12


def config(name, **changes):
    return CONFIGS[name](**{**SMALL, WIDE[name]: 64, **changes})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of each name a folder with config.json alone."""
    made = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for name, folder in made.items():
        config(name).save_pretrained(folder)
    return made


@pytest.fixture
def small(folders):
    return lambda name, **options: build_model(name, (LENGTH,), 2, **{"source": folders[name], "pretrained": False,
                                                                      **options})


def texts(n):
    """Ids 1 and then some of 5 to 39, of various lengths, padded; good if more are below 10 than in 10 to 14."""
    x, places = torch.randint(5, 40, (n, LENGTH)), torch.arange(LENGTH)
    x[places >= torch.randint(4, LENGTH + 1, (n, 1))] = 0
    x[:, 0] = 1
    good, bad = (((x >= low) & (x < low + 5)).sum(1) for low in (5, 10))
    return x[good != bad], (good > bad)[good != bad].long()


def lively(model):
    """Weights ten times as large: initial ones are so small that all texts are nearly equal."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    return model.eval()


@pytest.mark.parametrize("name, layers", [("bert", 12), ("distilbert", 6)])
def test_the_parameters_of_the_base_networks_by_their_formula(name, layers, tmp_path):
    CONFIGS[name]().save_pretrained(tmp_path)
    with torch.device("meta"):
        model = build_model(name, (512,), 3, source=tmp_path, pretrained=False)
    h, embedded = 768, 30_522 + 512 + (2 if name == "bert" else 0)
    encoder = embedded * h + 2 * h + layers * (4 * (h + 1) * h + (h + 1) * 4 * h + (4 * h + 1) * h + 4 * h)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == encoder + (h + 1) * h + (h + 1) * 3  # a square layer below the classifier in both
    assert encoder // 10 ** 6 == {"bert": 108, "distilbert": 66}[name]  # DistilBERT's 66 million: Sanh et al., table 3


@pytest.mark.parametrize("name", NAMES)
def test_they_are_transformers_with_padding_left_out(name, small):
    model, theirs = lively(small(name)), THEIRS[name](config(name))
    assert list(model.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(model.state_dict())
    x, _ = texts(20)
    with evaluation_mode(model, theirs):
        logits = model(x)
        assert logits.shape == (len(x), 2) and torch.equal(logits, theirs(x, attention_mask=(x != 0).long()).logits)
        assert not torch.allclose(logits, theirs(x).logits, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
@examples(1 / 2)
@given(ids=st.lists(st.integers(1, 39), min_size=1, max_size=10), more=st.integers(1, 6), other=st.integers(1, 39))
def test_padding_changes_nothing_and_a_token_does(name, ids, more, other, folders):
    model = lively(build_model(name, (16,), 2, source=folders[name], pretrained=False))
    with torch.no_grad():
        alone = model(torch.tensor([ids]))
        batch = torch.tensor([ids + [0] * more, ids + [other] * more])
        padded, longer = model(batch)
    torch.testing.assert_close(padded[None], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(longer, padded, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_fit_teaches_them_a_planted_sentiment(name, small, tmp_path):
    x, y = texts(700)
    train, held_out = Split(x[:400], y[:400]), (x[400:], y[400:])
    recipe = Recipe(12, 3e-3, optimizer="adamw", batch_size=32, weight_decay=0.01, warmup=1)
    model = small(name)
    run = fit(model, train, recipe, seed=0, checkpoints=["init", "epoch 1"], description=None)
    result = evaluate(model, held_out)
    assert result.accuracy > 0.95 and evaluate(model, held_out, state=run.state) == result
    assert evaluate(small(name), held_out) == evaluate(model, held_out, state=run.checkpoints["init"])
    # The order and dropout come from the seed, and a finished run from its file.
    short, file = replace(recipe, epochs=1, warmup=0), tmp_path / "run.safetensors"
    first, again, found, other = (fit(small(name), train, short, seed=seed, resume=resume, description=None)
                                  for seed, resume in ((0, file), (0, None), (0, file), (1, None)))
    assert first.losses == again.losses == found.losses != other.losses
    assert all(torch.equal(run.state[key], first.state[key]) for run in (again, found) for key in model.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_learns_and_layers_can_be_pruned_and_matched(name, small):
    model = small(name)
    x, y = texts(8)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    left = {key for key, tensor in model.named_parameters() if tensor.ndim > 1} - set(prunable_weights(model))
    assert left and all("embeddings" in key for key in left)
    sizes = [group.size for group in permutation_groups(model, x, check=True).values() if group.within is None]
    assert sorted(sizes) == [2, 2, 32, 32, 64, 64]  # heads, the stream and the layer below the classifier, MLPs


def with_config(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return change


def as_encoder(name, folder):
    ENCODERS[name](config(name)).save_pretrained(folder)


def as_masked_language_model(name, folder):
    kind = {"bert": transformers.BertForMaskedLM, "distilbert": transformers.DistilBertForMaskedLM}[name]
    kind(config(name)).save_pretrained(folder)


def as_fine_tuned(name, folder):
    THEIRS[name](config(name, num_labels=5)).save_pretrained(folder)


def as_published(name, folder):
    """In half precision, and with the names that norms had in 2018, as in the file of bert-base-uncased."""
    as_encoder(name, folder)
    file = folder / "model.safetensors"
    state = {f"{name}.{key}": tensor.half() for key, tensor in load_file(file).items()}
    for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        state = {key.replace(new, old): tensor for key, tensor in state.items()}
    save_file(state, file, {"format": "pt"})
    with_config(dtype="float16")(folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("saved", [as_encoder, as_masked_language_model, as_fine_tuned, as_published])
def test_weights_come_from_the_file_and_the_classifier_from_the_seed(name, saved, small, tmp_path):
    saved(name, tmp_path)
    expected = {re.sub("gamma$", "weight", re.sub("beta$", "bias", key)).removeprefix(f"{name}."): tensor.float()
                for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    model, other = (small(name, source=tmp_path, pretrained=True, seed=seed) for seed in (1, 2))
    drawn, encoder = small(name, source=tmp_path, seed=1), getattr(model, name).state_dict()
    assert model.training and {tensor.dtype for tensor in encoder.values()} == {torch.float32}
    lacking, pooler = encoder.keys() - expected.keys(), {"pooler.dense.weight", "pooler.dense.bias"}
    assert lacking == (pooler if (name, saved) == ("bert", as_masked_language_model) else set())
    assert all(torch.equal(encoder[key], expected[key]) for key in encoder.keys() - lacking)
    if lacking:
        assert not torch.equal(model.bert.pooler.dense.weight, other.bert.pooler.dense.weight)
    assert torch.equal(model.classifier.weight, drawn.classifier.weight)
    assert not torch.equal(model.classifier.weight, other.classifier.weight)
    assert model.classifier.weight.shape[0] == 2


def global_state():
    logging = transformers.utils.logging
    return (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()),  # noqa: NPY002
            logging.get_verbosity(), logging.is_progress_bar_enabled())


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_and_nothing_else_shows(name, pretrained, small, tmp_path, capfd):
    as_masked_language_model(name, tmp_path)
    capfd.readouterr()
    before = global_state()
    one, same, other = (small(name, source=tmp_path, pretrained=pretrained, seed=s).state_dict() for s in (5, 5, 6))
    assert global_state() == before
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    assert capfd.readouterr() == ("", "")


def test_a_name_is_looked_up_in_the_cache_of_the_hub(small, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("f" * 40)
    as_encoder("bert", repository / "snapshots" / ("f" * 40))
    state = small("bert", source="someone/small", pretrained=True).bert.state_dict()
    stored = load_file(repository / "snapshots" / ("f" * 40) / "model.safetensors")
    assert all(torch.equal(state[key], stored[key]) for key in state)
    with pytest.raises(FileNotFoundError, match="config.json of 'someone/other' cannot be read .*download=True"):
        small("bert", source="someone/other", pretrained=True)


def test_teacher_and_student_read_the_same_tokens(folders, small):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "all", "good", "##ness", "bad"]
    read = []
    for name, folder in folders.items():
        (folder / "vocab.txt").write_text("\n".join(words))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        read.append(tokenizer(["All goodness", "bad"], padding="max_length", max_length=LENGTH)["input_ids"])
        assert tokenizer.pad_token_id == small(name).config.pad_token_id
    assert read[0] == read[1] and read[0][0][:6] == [2, 5, 6, 7, 3, 0]
    base = [CONFIGS[name]() for name in NAMES]
    assert len({(c.vocab_size, c.pad_token_id, c.max_position_embeddings) for c in base}) == 1


def without(key):
    def change(folder):
        state = load_file(folder / "model.safetensors")
        save_file({name: tensor for name, tensor in state.items() if name != key}, folder / "model.safetensors")
    return change


@pytest.mark.parametrize("change, error, message", [
    (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, "config.json of "),
    (lambda folder: (folder / "config.json").write_text("{"), FileNotFoundError, "not a valid JSON file"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), FileNotFoundError,
     "model.safetensors of "),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), ValueError, "is damaged"),
    (without("encoder.layer.1.output.dense.bias"), ValueError, "do not fit its config.json: 1 are missing or have "
                                                               "a different shape, e.g. 'encoder.layer.1.output"),
    (with_config(intermediate_size=48), ValueError, "6 are missing or have a different shape"),
    (with_config(model_type="distilbert"), ValueError, "has model_type 'distilbert': expected 'bert'"),
    (with_config(model_type="roberta"), ValueError, "has model_type 'roberta': expected 'bert'"),
    (with_config(pad_token_id=None), ValueError, "has no pad_token_id"),
    (with_config(max_position_embeddings=11), ValueError, "input_shape is (12,): "),
])
def test_what_is_wrong_with_a_source_is_said(change, error, message, small, tmp_path):
    as_encoder("bert", tmp_path)
    assert small("bert", source=tmp_path, pretrained=True)
    change(tmp_path)
    with pytest.raises(error, match=re.escape(message)) as raised:
        small("bert", source=tmp_path, pretrained=True)
    assert str(tmp_path) in str(raised.value)


def test_a_configuration_cannot_have_other_files_read(small, tmp_path):
    as_encoder("bert", tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({}))
    with_config(transformers_weights="adapter_model.bin")(tmp_path)
    state, stored = (small("bert", source=tmp_path, pretrained=True).bert.state_dict(),
                     load_file(tmp_path / "model.safetensors"))
    assert all(torch.equal(state[key], stored[key]) for key in stored)


@pytest.mark.parametrize("source", ["/nowhere/bert", "no/such/name", "nobody/nothing"])
def test_a_source_that_is_not_there_is_named(source):
    with pytest.raises(FileNotFoundError, match=f"config.json of '{source}' cannot be read"):
        build_model("bert", (LENGTH,), 2, source=source)


def test_without_transformers_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", {"timm": True}.get)
    with pytest.raises(ImportError, match=re.escape("bert needs transformers, which is not installed: pip install "
                                                    '"permask[text]"')):
        build_model("bert", (LENGTH,), 2)


def test_there_is_no_width():
    with pytest.raises(ValueError, match="bert has no option 'width': expected one of source, pretrained, download"):
        build_model("bert", (LENGTH,), 2, width=0.5)
