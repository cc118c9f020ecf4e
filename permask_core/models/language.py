"""Text classifiers: BERT and DistilBERT of transformers, with published or random weights.

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
    """BERT as a text classifier: maps token ids, int64 [n, length], to logits [n, classes].

    The ids are those of the tokenizer that belongs to ``source``. An id equal to the ``pad_token_id`` of its
    configuration is padding, which does not affect the logits. The names of the weights are those of
    ``BertForSequenceClassification`` in transformers. The classifier is always drawn at random, and so is the pooling
    layer below it if ``source`` has none.

    Parameters
    ----------
    input_shape : tuple of int
        (length,): number of tokens of a text, padding included.
    classes : int
    source : path-like
        A folder with ``config.json`` and ``model.safetensors``, or the name of a model on the Hugging Face hub, which
        is loaded from the hub's cache on this machine.
    pretrained : bool
        If False, all weights are drawn at random and only ``config.json`` of ``source`` is read, so a small
        configuration gives a small network.
    download : bool
        If True, download files that are not in the cache from the hub.

    Raises
    ------
    ImportError
        If transformers, which the extra ``permask[text]`` installs, is missing.
    FileNotFoundError
        If ``source`` or one of its files is missing.
    ValueError
        If ``source`` is a different kind of network, defines no padding token, or has fewer positions than a text has
        tokens; or if its weights are damaged or do not fit its configuration.

    References
    ----------
    Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", NAACL 2019.
    """
    return _classifier("bert", input_shape, classes, source, pretrained, download)


def distilbert(input_shape, classes, *, source="distilbert-base-uncased", pretrained=True, download=False):
    """DistilBERT, which has half as many layers as :func:`bert` and takes the same tokens and arguments.

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
        raise ValueError(f"config.json of {source!r} has no pad_token_id: expected the id of the padding token")
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
    if settings.get("model_type") != kind.model_type:  # transformers would use the defaults instead
        raise ValueError(f"config.json of {source!r} has model_type {settings.get('model_type')!r}: expected "
                         f"{kind.model_type!r}")
    # The configuration may name other weight files, and transformers would unpickle some kinds of them.
    return kind.from_dict({**settings, "transformers_weights": None}, **changes)


def _pretrained(kind, source, download, config):
    with _reading("model.safetensors", source):
        encoder, found = kind.from_pretrained(
            source, config=config, local_files_only=not download, use_safetensors=True, dtype=torch.float32,
            ignore_mismatched_sizes=True, output_loading_info=True)  # transformers would initialise them
    wrong = {key for key in found["missing_keys"] if not key.startswith("pooler.")}
    wrong |= {key for key, *_ in found["mismatched_keys"]}
    if wrong:
        raise ValueError(f"the weights of {source!r} do not fit its config.json: {len(wrong)} are missing or have "
                         f"a different shape, e.g. {min(wrong)!r}")
    return encoder


@contextmanager
def _reading(file, source):
    """Turn the errors of reading a file into one kind of message, and suppress what transformers prints."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(
            f"{file} of {source!r} cannot be read ({str(error).splitlines()[0]}): expected a folder that has it, or "
            "the name of a model in the hub's cache (download=True downloads it); pretrained=False needs only "
            "config.json") from error
    except SafetensorError as error:
        raise ValueError(f"{file} of {source!r} is damaged ({error}): replace it") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
