"""HateXplain: 20,148 posts from Twitter and Gab, each annotated by three people, as token ids with a label (toxic or
normal) and the groups of people that a post is about.

Whether a post is toxic is decided by a majority over the three published labels, as in the published code for measuring
bias: hatespeech, offensive and normal are counted before the first two are merged. Otherwise posts on which all three
annotators differ would count as toxic.

Source: Mathew et al., "HateXplain: A Benchmark Dataset for Explainable Hate Speech Detection", AAAI 2021. The two
default attributes are those of Mohammadshahi and Ioannou, "What's Left After Distillation? How Knowledge
Transfer Impacts Fairness and Bias", TMLR 2025.
"""

import json
import os
from collections import Counter
from typing import NamedTuple

import torch

from permask_core.data.attributes import Attribute, check_attributes
from permask_core.data.root import check_there, data_root, some
from permask_core.data.splits import Split
from permask_core.models.extras import check_extra
from permask_core.runs.checks import check_integer

POSTS, DIVISIONS = "dataset.json", "post_id_divisions.json"
TOXIC = {"hatespeech": 1, "offensive": 1, "normal": 0}
# The groups of the source; its other targets (Refugee, Indigenous, Nonreligious, Other, ...) belong to none of these.
ATTRIBUTES = {
    "gender": ("Men", "Women"),
    "race": ("African", "Arab", "Asian", "Caucasian", "Hispanic"),
    "religion": ("Buddhism", "Christian", "Hindu", "Islam", "Jewish"),
    "sexual_orientation": ("Asexual", "Bisexual", "Heterosexual", "Homosexual"),
}


def hatexplain(root=None, tokenizer="bert-base-uncased", length=128, attributes=("gender", "race")):
    """HateXplain as a classification task with two classes: 0 is normal, 1 is toxic.

    A post belongs to the groups that its three annotators together named at least twice: several, one or (for most
    posts) none. Posts on which all three labels differ are excluded; the published divisions have none. The validation
    division is not used, because no hyperparameter is selected.

    Parameters
    ----------
    root : path-like, optional
        The folder that contains ``hatexplain`` with ``dataset.json`` and ``post_id_divisions.json``: see
        :func:`permask_core.data.root.data_root`.
    tokenizer : str or path-like
        A folder with a tokenizer of the package transformers, or the name of one on the Hugging Face hub. It must be
        the tokenizer of the network to be trained.
    length : int
        Number of tokens: longer posts are cut, shorter posts are padded. The first token marks the beginning, the last
        the end.
    attributes : sequence of str
        Some of gender, race, religion, sexual_orientation.

    Returns
    -------
    (Split, Split, tuple of int, int)
        Training and test split of int64 token ids; the shape [length]; the number of classes, 2.

    Raises
    ------
    FileNotFoundError
        If a file is missing, or the tokenizer does not exist or cannot be downloaded.
    ImportError
        If the package transformers is not installed.
    ValueError
        If an option is out of range, a file or the tokenizer is damaged, or the tokenizer has no tokens for beginning,
        end and padding.
    """
    check_attributes(attributes, ATTRIBUTES)
    check_integer("length", length, 3)
    judged = _judged(check_files(root))  # first, because a search for the tokenizer on the hub is slow
    tokenizer = _tokenizer(tokenizer, length)
    train, test = (_split(posts, tokenizer, length, attributes) for posts in judged)
    return train, test, (length,), 2


def check_files(root=None, name="hatexplain"):
    """See :func:`permask_core.data.check_files`; returns the folder."""
    folder = data_root(root) / name
    check_there("HateXplain", folder, [POSTS, DIVISIONS],
                f"Download both from the folder Data of https://github.com/hate-alert/HateXplain and put them "
                f"in {folder}")
    return folder


class Post(NamedTuple):
    """A post: its ``text``, whether it is ``toxic`` (None if no two annotators agree), and the ``targets`` that were
    named at least twice."""

    text: str
    toxic: int | None
    targets: frozenset[str]


def _judged(folder):
    """Return the posts of the training and the test division on which at least two annotators agree."""
    posts, divisions = (_read(folder / file) for file in (POSTS, DIVISIONS))
    listed = [divisions.get(name) for name in ("train", "test")]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in listed):
        raise ValueError(f"{folder / DIVISIONS} has the keys {some(divisions)}: expected train and test, lists of "
                         "names of posts")
    unknown, shared = set().union(*listed) - set(posts), set(listed[0]) & set(listed[1])
    if unknown or shared:
        raise ValueError(f"{folder / DIVISIONS} lists posts that are not in {POSTS}: {some(unknown)}; in train and in "
                         f"test: {some(shared)}: expected no such posts")
    both = [[post for name in names if (post := _post(name, posts[name], folder / POSTS)).toxic is not None]
            for names in listed]
    if not all(both):
        raise ValueError(f"{folder / DIVISIONS} has {len(both[0])} training and {len(both[1])} test posts on which two "
                         "annotators agree: expected at least 1 of each")
    return both


def _read(path):
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged or not JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}: expected an object")
    return content


def _post(name, post, path):
    """Check a post of the file and convert it to a :class:`Post`."""
    def check(good, found, expected):
        if not good:
            raise ValueError(f"the post {name!r} in {path} has {found}: expected {expected}")

    check(isinstance(post, dict), type(post).__name__, "an object")
    words, annotators = post.get("post_tokens"), post.get("annotators")
    check(_texts(words) and words, f"the post_tokens {words!r}", "a list of words")
    check(isinstance(annotators, list) and len(annotators) == 3 and all(isinstance(one, dict) for one in annotators),
          f"the annotators {annotators!r}", "a list of three objects")
    labels, targets = ([one.get(key) for one in annotators] for key in ("label", "target"))
    for label in labels:
        check(isinstance(label, str) and label in TOXIC, f"the label {label!r}", f"one of {', '.join(TOXIC)}")
    for target in targets:
        check(_texts(target), f"the target {target!r}", "a list of names")
    (label, votes), = Counter(labels).most_common(1)
    named = Counter(name for target in targets for name in target)
    return Post(" ".join(words), TOXIC[label] if votes > 1 else None,
                frozenset(name for name, times in named.items() if times > 1))


def _texts(value):
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _tokenizer(name, length):
    check_extra("hatexplain", "transformers", "text")
    from transformers import AutoTokenizer  # here, because it takes seconds to import

    try:
        made = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises various exceptions
        raise (ValueError if os.path.isdir(name) else FileNotFoundError)(
            f"cannot load the tokenizer {str(name)!r} ({error}): expected a folder with its files, such as "
            "tokenizer_config.json and vocab.txt, or its name on the Hugging Face hub; without network access, "
            "download the files elsewhere and pass their folder") from error
    # Without the vocabulary file, a tokenizer has only special tokens and maps all words to one of them.
    if len(made) <= len(made.all_special_ids):
        raise ValueError(f"the tokenizer {str(name)!r} has no vocabulary: expected a file such as vocab.txt or "
                         "tokenizer.json next to its configuration")
    if None in (made.pad_token_id, made.cls_token_id, made.sep_token_id):
        raise ValueError(f"the tokenizer {str(name)!r} pads with {made.pad_token!r}, begins with {made.cls_token!r}, "
                         f"ends with {made.sep_token!r}: expected a token for each, as in BERT")
    if length > made.model_max_length:
        raise ValueError(f"length is {length}: expected at most {made.model_max_length}, the limit of the tokenizer "
                         f"{str(name)!r}")
    return made


def _split(posts, tokenizer, length, attributes):
    tokens = tokenizer([post.text for post in posts], padding="max_length", truncation=True, max_length=length,
                       return_tensors="pt")["input_ids"]
    held = {name: Attribute(ATTRIBUTES[name], torch.tensor([[group in post.targets for group in ATTRIBUTES[name]]
                                                            for post in posts])) for name in attributes}
    return Split(tokens, torch.tensor([post.toxic for post in posts]), attributes=held)
