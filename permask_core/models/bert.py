"""Text classifiers of transformers as functions of token ids only.

They are in a separate module because transformers is an optional dependency and imports torchvision.
"""

from permask_core.models.vision import torchvision  # noqa: F401, I001 - before transformers, which imports it too

from transformers import BertForSequenceClassification, DistilBertForSequenceClassification


class OfTokens:
    """Mix-in for the classifiers of transformers: maps ids, int64 [n, length], to logits, float32 [n, classes], and
    excludes padding from attention."""

    def forward(self, ids):
        return super().forward(ids, attention_mask=ids != self.config.pad_token_id).logits


class Bert(OfTokens, BertForSequenceClassification):
    """The BERT of transformers with a linear classifier on the pooled first token."""


class DistilBert(OfTokens, DistilBertForSequenceClassification):
    """The DistilBERT of transformers with a two-layer classifier on the first token."""


CLASSIFIERS = {"bert": Bert, "distilbert": DistilBert}
