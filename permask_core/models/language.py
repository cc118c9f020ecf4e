"""Text classifiers: BERT and DistilBERT as transformers has them, from published weights or from random ones.

Devlin, Chang, Lee and Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
NAACL 2019. Sanh, Debut, Chaumond and Wolf, "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and
lighter", 2019.
"""

from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from permask_core.models.extras import check_extra


def bert(input_shape, classes, *, source="bert-base-uncased", pretrained=True, download=False):
    """BERT as a classifier of texts: token ids, int64 [n, length], give logits [n, classes].

    Ids are those of the tokenizer that belongs to ``source``. Where they equal the ``pad_token_id`` of its
    configuration they are padding, which changes nothing. Names of weights are those of transformers'
    ``BertForSequenceClassification``. The classifier on top is drawn at random whatever ``source`` holds, and so is the
    pooling layer below it where ``source`` has none.

    Parameters
    ----------
    input_shape : tuple of int
        (length,): tokens of a text, padding included.
    classes : int
    source : path-like
        A folder with ``config.json`` and ``model.safetensors``, or the name of a model on the Hugging Face hub, which
        is looked for in the hub's cache on this machine.
    pretrained : bool
        False draws all weights: of ``source`` only ``config.json`` is read, so that a small one makes a small network.
    download : bool
        Fetch from the hub what its cache lacks.

    Raises
    ------
    ImportError
        If transformers, which the extra ``permask[text]`` installs, is not there.
    FileNotFoundError
        If ``source`` or one of its files is not there.
    ValueError
        If ``source`` is another kind of network, has no padding, or fewer positions than a text has tokens; or if its
        weights are damaged or do not fit its configuration.

    References
    ----------
    Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", NAACL 2019.
    """
    return _classifier("bert", input_shape, classes, source, pretrained, download)


def distilbert(input_shape, classes, *, source="distilbert-base-uncased", pretrained=True, download=False):
    """DistilBERT, which has half of the layers of :func:`bert`, and takes the same tokens and
    arguments.

    References
    ----------
    Sanh et al., "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter", 2019.
    """
    return _classifier("distilbert", input_shape, classes, source, pretrained, download)


def _classifier(name, input_shape, classes, source, pretrained, download):
    check_extra(name, "transformers", "text")
    from permask_core.models.bert import CLASSIFIERS  # here, because transformers takes seconds to import

    network, folder = CLASSIFIERS[name], Path(source).expanduser()
    source = str(folder) if folder.is_dir() else str(source)
    config = _config(network.config_class, source, download, num_labels=classes)
    if config.pad_token_id is None:
        raise ValueError(f"config.json of {source!r} has no pad_token_id: expected the id of the tokens to leave out")
    if input_shape[0] > config.max_position_embeddings:
        raise ValueError(f"input_shape is {input_shape}: {source!r} takes at most {config.max_position_embeddings} "
                         "tokens")
    model = network(config)
    if pretrained:
        encoder = _pretrained(type(model.base_model), source, download, config)
        setattr(model, model.base_model_prefix, encoder)
    return model.train()


def _config(kind, source, download, **changes):
    with _reading("config.json", source):
        settings, _ = kind.get_config_dict(source, local_files_only=not download)
        if not settings:
            raise FileNotFoundError(f"no such file in {source}")
    if settings.get("model_type") != kind.model_type:  # transformers would go on with the defaults
        raise ValueError(f"config.json of {source!r} has model_type {settings.get('model_type')!r}: expected "
                         f"{kind.model_type!r}")
    # It may name another file of weights, of which transformers would unpickle some.
    return kind.from_dict({**settings, "transformers_weights": None}, **changes)


def _pretrained(kind, source, download, config):
    with _reading("model.safetensors", source):
        encoder, found = kind.from_pretrained(
            source, config=config, local_files_only=not download, use_safetensors=True, dtype=torch.float32,
            ignore_mismatched_sizes=True, output_loading_info=True)  # transformers would draw what does not fit
    wrong = {key for key in found["missing_keys"] if not key.startswith("pooler.")}
    wrong |= {key for key, *_ in found["mismatched_keys"]}
    if wrong:
        raise ValueError(f"the weights of {source!r} do not fit its config.json: {len(wrong)} are missing or have "
                         f"another shape, as {min(wrong)!r}")
    return encoder


@contextmanager
def _reading(file, source):
    """What is wrong with a file of a source, said in one way; whatever else transformers would print is not."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(
            f"{file} of {source!r} cannot be read ({str(error).splitlines()[0]}): expected a folder that has it, or "
            "the name of a model in the cache of the hub, into which download=True fetches it; pretrained=False needs "
            "config.json alone") from error
    except SafetensorError as error:
        raise ValueError(f"{file} of {source!r} is damaged ({error}): replace it") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
