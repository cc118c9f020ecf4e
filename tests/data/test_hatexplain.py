"""HateXplain's files: what the majority of the annotators says, and the tokens that a network reads."""

import itertools
import json
import re
import sys
from collections import Counter

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import BertTokenizer

from permask_core.data import load_dataset
from permask_core.data.hatexplain import ATTRIBUTES, hatexplain
from permask_core.data.splits import in_order
from tests.data.files import post, write_hatexplain, write_tokenizer

EVERY = tuple(ATTRIBUTES)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(**options):
        return hatexplain(tmp_path, **{"tokenizer": tokenizer, "length": 16, **options})

    return load


def groups(split, name, index):
    names, member = split.attributes[name]
    return {group for group, inside in zip(names, member[index].tolist(), strict=True) if inside}


def judged(root, load, posts, attributes=EVERY):
    """The training split of hand-made posts."""
    posts = {f"{number}_gab": one for number, one in enumerate(posts)}
    last = post(["normal"] * 3, [["None"]] * 3, ["today"])
    write_hatexplain(root, len(posts), 0, 1, posts={**posts, "last_gab": last})
    return load(attributes=attributes)[0]


# ---- What the annotators say -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("labels, toxic", [
    (["hatespeech"] * 3, 1), (["offensive"] * 3, 1), (["normal"] * 3, 0), (["hatespeech", "hatespeech", "normal"], 1),
    (["normal", "offensive", "offensive"], 1), (["normal", "hatespeech", "normal"], 0),
    (["offensive", "hatespeech", "offensive"], 1), (["offensive", "normal", "normal"], 0),
])
def test_the_majority_of_the_three_labels(tmp_path, load, labels, toxic):
    assert judged(tmp_path, load, [post(labels, [["None"]] * 3, ["town"])]).y.tolist() == [toxic]


@pytest.mark.parametrize("labels", list(itertools.permutations(["hatespeech", "offensive", "normal"])))
def test_posts_on_which_all_differ_are_left_out(tmp_path, load, labels):
    """Merged before the vote, two of three would have called it toxic."""
    posts = [post(one, [["Men"]] * 3, words) for one, words in
             ((["normal"] * 3, ["kind"]), (labels, ["town"]), (["offensive"] * 3, ["daft"]))]
    split = judged(tmp_path, load, posts)
    assert split.y.tolist() == [0, 1] and split.attributes["gender"].member.shape == (2, 2)


def test_every_combination_as_the_published_code_has_it(tmp_path, load):
    """Its final_label and its target groups, for all labels and a few targets of each annotator."""
    said = [["None"], ["Women"], ["Women", "Men"], ["Islam", "Women"]]
    cases = [(labels, targets) for labels in itertools.product(("hatespeech", "offensive", "normal"), repeat=3)
             for targets in itertools.product(said, repeat=3)]
    expected = []
    for labels, targets in cases:
        final = max(labels, key=labels.count)
        if labels.count(final) > 1:
            counts = Counter(targets[0] + targets[1] + targets[2])
            expected.append((int(final in ["hatespeech", "offensive"]), {key for key in counts if counts[key] > 1}))
    split = judged(tmp_path, load, [post(labels, targets, ["town"]) for labels, targets in cases])
    assert split.y.tolist() == [toxic for toxic, _ in expected] and len(expected) == 21 * 64
    for index, (_, named) in enumerate(expected):
        assert groups(split, "gender", index) == named & {"Men", "Women"}
        assert groups(split, "religion", index) == named & {"Islam"}


@pytest.mark.parametrize("targets, expected", [
    ([["Women"], ["Women", "African"], ["African"]], {"gender": {"Women"}, "race": {"African"}}),
    ([["Men", "Women"], ["Men", "Women"], ["None"]], {"gender": {"Men", "Women"}}),
    ([["Men"], ["Women"], ["None"]], {}),
    ([["None"], ["None"], ["Men"]], {}),
    ([[], ["Jewish", "Islam", "Refugee"], ["Islam", "Jewish", "Refugee"]], {"religion": {"Islam", "Jewish"}}),
    ([["Asexual", "Arab"], ["Arab", "Bisexual"], ["Bisexual", "Asexual"]],
     {"race": {"Arab"}, "sexual_orientation": {"Asexual", "Bisexual"}}),
    ([["Nonreligious", "Other"]] * 3, {}),
])
def test_groups_that_were_named_at_least_twice(tmp_path, load, targets, expected):
    split = judged(tmp_path, load, [post(["normal"] * 3, targets, ["town"])])
    assert {name: groups(split, name, 0) for name in EVERY} == {**{name: set() for name in EVERY}, **expected}


def test_attributes_are_those_asked_for(tmp_path, load):
    write_hatexplain(tmp_path)
    for names in ((), ("race",), EVERY):
        for split in load(attributes=names)[:2]:
            assert list(split.attributes) == list(names)
            for name in names:
                found = split.attributes[name]
                assert found.groups == ATTRIBUTES[name] and found.member.dtype == torch.bool
                assert found.member.shape == (len(split), len(found.groups))


def test_validation_is_not_used(tmp_path, load):
    folder = write_hatexplain(tmp_path, 30, 20, 10)
    train, test, shape, classes = load()
    assert (len(train), len(test), shape, classes) == (30, 10, (16,), 2)
    divisions = json.loads((folder / "post_id_divisions.json").read_text())
    divisions["val"] = ["nobody_gab"]
    (folder / "post_id_divisions.json").write_text(json.dumps(divisions))
    for one, other in zip((train, test), load()):
        assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y)


# ---- Tokens ----------------------------------------------------------------------------------------------------------

def test_tokens(tmp_path, load, tokenizer):
    with open(f"{tokenizer}/vocab.txt") as file:
        number = {token: i for i, token in enumerate(file.read().split())}
    cases = [(["We", "saw", "a", "zebra"], "[CLS] we saw a z ##e ##b ##r ##a [SEP] [PAD] [PAD]"),
             (["<user>"], "[CLS] < user > [SEP]" + 7 * " [PAD]"), (["€"], "[CLS] [UNK] [SEP]" + 9 * " [PAD]"),
             (["town"] * 30, "[CLS]" + 10 * " town" + " [SEP]"), (["town"] * 10, "[CLS]" + 10 * " town" + " [SEP]")]
    posts = {f"{i}_gab": post(["normal"] * 3, [[]] * 3, words) for i, (words, _) in enumerate(cases)}
    write_hatexplain(tmp_path, 3, 0, 2, posts=posts)
    train, test, shape, _ = load(length=12)
    found = torch.cat([train.x, test.x])
    assert shape == (12,) and found.dtype == torch.int64
    assert found.tolist() == [[number[token] for token in expected.split()] for _, expected in cases]
    reference = BertTokenizer.from_pretrained(tokenizer)
    texts = [" ".join(words) for words, _ in cases]
    assert found.tolist() == reference(texts, padding="max_length", truncation=True, max_length=12)["input_ids"]


def test_batches_hand_out_tokens_as_they_are(tmp_path, tokenizer):
    write_hatexplain(tmp_path, 30, 0, 10)
    _, train, _, shape, classes = load_dataset("hatexplain", root=tmp_path, tokenizer=tokenizer)
    assert (shape, classes) == ((128,), 2)
    for augmented in (None, (0, 3)):
        inputs, labels = zip(*train.to("cpu").batches(in_order(train, 7), augmented=augmented))
        assert torch.equal(torch.cat(inputs), train.x) and inputs[0].dtype == torch.int64
        assert torch.equal(torch.cat(labels), train.y)


def test_the_written_texts_can_be_learned(tmp_path, load):
    write_hatexplain(tmp_path, 300, 0, 100)
    train, test, _, _ = load(length=40)
    counts = [torch.nn.functional.one_hot(split.x, 128).sum(1) for split in (train, test)]
    for y_train, y_test in ((train.y, test.y), (train.attributes["gender"].member[:, 1],
                                                test.attributes["gender"].member[:, 1])):
        assert LogisticRegression(max_iter=500).fit(counts[0], y_train).score(counts[1], y_test) > 0.9
    women = train.attributes["gender"].member[:, 1]
    assert train.y[women].double().mean() > train.y[~women].double().mean() + 0.1


# ---- Bad input -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    ({"attributes": ["gender", "age"]}, "unknown attribute 'age': expected some of gender, race, religion, sexual_ori"),
    ({"attributes": "gender"}, "attributes is 'gender': expected a list of names"),
    ({"length": 2}, "length is 2: expected an integer of at least 3"), ({"length": 8.0}, "length is 8.0: expected"),
    ({"length": 513}, "length is 513: expected at most 512, the limit of the tokenizer"),
])
def test_bad_options_are_named(tmp_path, load, options, message):
    write_hatexplain(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(**options)


@pytest.mark.parametrize("gone", ["dataset.json", "post_id_divisions.json"])
def test_missing_files_are_named(tmp_path, load, gone):
    (write_hatexplain(tmp_path) / gone).unlink()
    with pytest.raises(FileNotFoundError) as found:
        load()
    for part in (f"HateXplain is not in {tmp_path}: expected the folder hatexplain with", f"missing: {gone}. Download",
                 "the folder Data of https://github.com/hate-alert/HateXplain", f"put them in {tmp_path}/hatexplain"):
        assert part in str(found.value)


GOOD = post(["normal"] * 3, [["None"]] * 3, ["town"])


@pytest.mark.parametrize("bad, message", [
    ([], "has list: expected an object"),
    ({**GOOD, "post_tokens": []}, "has the post_tokens []: expected a list of words"),
    ({**GOOD, "post_tokens": "a town"}, "has the post_tokens 'a town': expected a list of words"),
    ({**GOOD, "post_tokens": ["a", 7]}, "has the post_tokens ['a', 7]: expected a list of words"),
    ({"post_tokens": ["town"]}, "has the annotators None: expected a list of three objects"),
    ({**GOOD, "annotators": GOOD["annotators"][:2]}, "has the annotators [{'label': 'normal'"),
    ({**GOOD, "annotators": ["a", "b", "c"]}, "has the annotators ['a', 'b', 'c']: expected a list of three objects"),
    (post(["normal", "normal", "toxic"], [[]] * 3, ["town"]), "has the label 'toxic': expected one of hatespeech"),
    (post(["normal", "normal", None], [[]] * 3, ["town"]), "has the label None: expected one of"),
    (post(["normal", ["normal"], "normal"], [[]] * 3, ["town"]), "has the label ['normal']: expected one of"),
    (post(["normal"] * 3, [[], "Women", []], ["town"]), "has the target 'Women': expected a list of names"),
    (post(["normal"] * 3, [[], [None], []], ["town"]), "has the target [None]: expected a list of names"),
])
def test_damaged_posts_are_named(tmp_path, load, bad, message):
    folder = write_hatexplain(tmp_path, 2, 0, 1, posts={"1_gab": GOOD, "2_gab": GOOD, "3_gab": GOOD})
    path = folder / "dataset.json"
    path.write_text(json.dumps({"1_gab": GOOD, "2_gab": bad, "3_gab": GOOD}))
    with pytest.raises(ValueError, match=re.escape(f"the post '2_gab' in {path} {message}")):
        load()


@pytest.mark.parametrize("file, content, message", [
    ("dataset.json", "", "{} is damaged or not JSON (Expecting value"),
    ("dataset.json", '{"1_gab": {"ann', "{} is damaged or not JSON ("),
    ("dataset.json", b"\xff\xfe\x00", "{} is damaged or not JSON ("),
    ("dataset.json", "[]", "{} holds list: expected an object"),
    ("dataset.json", "{}", "lists posts that are not in dataset.json: 1_gab, 2_gab; in train and in test: none"),
    ("post_id_divisions.json", "<html>", "{} is damaged or not JSON ("),
    ("post_id_divisions.json", '{"train": ["1_gab"]}', "{} has the keys train: expected train and test, lists of"),
    ("post_id_divisions.json", '{"train": ["1_gab"], "test": "2_gab"}', "{} has the keys test, train: expected"),
    ("post_id_divisions.json", '{"train": ["1_gab"], "test": [2]}', "{} has the keys test, train: expected"),
    ("post_id_divisions.json", '{"train": ["1_gab"], "test": ["1_gab", "7_gab"]}',
     "{} lists posts that are not in dataset.json: 7_gab; in train and in test: 1_gab: expected no such posts"),
    ("post_id_divisions.json", '{"train": ["1_gab"], "test": ["2_gab", "1_gab"]}',
     "{} lists posts that are not in dataset.json: none; in train and in test: 1_gab: expected no such posts"),
    ("post_id_divisions.json", '{"train": ["1_gab"], "test": []}', "{} has 1 training and 0 test posts on which two"),
])
def test_damaged_files_are_named(tmp_path, load, file, content, message):
    path = write_hatexplain(tmp_path, 1, 0, 1, posts={"1_gab": GOOD, "2_gab": GOOD}) / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message.replace("{}", str(path)))):
        load()


def test_files_are_read_before_a_tokenizer_is_looked_for(tmp_path, load):
    (write_hatexplain(tmp_path) / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="dataset.json"):
        load(tokenizer="nobody/nothing")


def test_without_transformers(tmp_path, load, monkeypatch):
    write_hatexplain(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=re.escape('not installed: pip install "permask[text]"')):
        load()


@pytest.mark.parametrize("name", ["/nowhere/bert", "nobody/nothing"])
def test_a_tokenizer_that_is_not_there(tmp_path, load, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_hatexplain(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"(?s)cannot load the tokenizer '{name}' .*expected a folder .* or its "
                                                "name on the Hugging Face hub; without network access, download"):
        load(tokenizer=name)


@pytest.mark.parametrize("file, content, message", [
    ("vocab.txt", None, "has no vocabulary: expected a file such as vocab.txt or tokenizer.json"),
    ("vocab.txt", "", "has no vocabulary: expected a file such as vocab.txt or tokenizer.json"),
    ("tokenizer_config.json", '{"tokeniz', "Unterminated string.*expected a folder with its files, such as token"),
    ("tokenizer_config.json", '{"tokenizer_class": "BertTokenizer", "sep_token": null}',
     r"pads with '\[PAD\]', begins with '\[CLS\]', ends with None: expected a token for each"),
])
def test_damaged_tokenizers_are_named(tmp_path, load, file, content, message):
    write_hatexplain(tmp_path)
    folder = write_tokenizer(tmp_path / "damaged")
    path = tmp_path / "damaged" / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=f"(?s)tokenizer '{re.escape(folder)}'.*{message}"):
        load(tokenizer=folder)


def test_code_beside_a_tokenizer_is_not_run(tmp_path, load):
    write_hatexplain(tmp_path)
    folder, sign = write_tokenizer(tmp_path / "trap"), tmp_path / "sign"
    (tmp_path / "trap" / "mine.py").write_text(f"open({str(sign)!r}, 'w')\nclass Mine: pass\n")
    (tmp_path / "trap" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}))
    with pytest.raises(ValueError, match="cannot load the tokenizer .*custom code"):
        load(tokenizer=folder)
    assert not sign.exists()
