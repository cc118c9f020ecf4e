"""transformers' text classifiers as functions of token ids alone; a module of its own, because transformers is an extra
and imports torchvision."""

from permask_core.models.vision import torchvision  # noqa: F401, I001 - before transformers, which imports it too

from transformers import BertForSequenceClassification, DistilBertForSequenceClassification


class OfTokens:
    """What is added to a classifier of transformers: ids, int64 [n, length], give logits, float32 [n, classes]; padding
    is left out of attention."""

    def forward(self, ids):
        return super().forward(ids, attention_mask=ids != self.config.pad_token_id).logits


class Bert(OfTokens, BertForSequenceClassification):
    """transformers' BERT with a linear classifier on its pooled first token."""


class DistilBert(OfTokens, DistilBertForSequenceClassification):
    """transformers' DistilBERT with a classifier of two layers on its first token."""


CLASSIFIERS = {"bert": Bert, "distilbert": DistilBert}
