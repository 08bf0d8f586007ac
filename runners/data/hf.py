"""Hugging Face data sets as samples: text, pairs of texts, and texts or images with labels."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from runners.choices import TaskName
from runners.data.base import DataBundle, require_at_least
from runners.data.hfrows import (
    Side,
    choose_sides,
    column_values,
    field_of,
    row_classes,
    row_domains,
    row_ids,
    text_of,
)
from runners.data.hub import Source, open_source
from runners.data.imagerows import ImageColumn, ImageRows, fingerprint_images
from runners.data.images import Normalisation
from runners.data.selection import choose
from runners.data.textrows import TextRow, TextRowSet, encode_whole, fingerprint_rows
from runners.data.windows import SHORTEST_WINDOW, Corpus, Document, window_bundle
from runners.errors import DataError
from runners.tokenizer import load_tokenizer

log = logging.getLogger(__name__)


def build_hf(cfg: DictConfig) -> DataBundle:
    """The data set's rows as samples for `data.task`.

    Rows of `data.val_split`, else of `data.split`, are kept for validation: `data.val_samples` of them,
    picked by their ids alone (language: windows of whole documents). All others of `data.split` are trained
    on, or `data.train_samples` of them, picked by `data.seed`.

    Raises ConfigError for keys that do not fit the data set, DataError for one that is missing, damaged or
    too small.
    """
    for key, least in (("seq_len", SHORTEST_WINDOW), ("train_samples", 1), ("val_samples", 1)):
        require_at_least(cfg, key, least)
    return BUILDERS[TaskName(cfg.task)](cfg, open_source(cfg))


def _language(cfg: DictConfig, source: Source) -> DataBundle:
    documents, held = _documents(cfg, source)
    tokenizer = load_tokenizer(cfg.tokenizer)
    corpus = Corpus(documents, tokenizer, cfg.seq_len, SHORTEST_WINDOW)
    train_keys, val_keys = choose(
        corpus.ids, corpus.count, cfg.train_samples, cfg.val_samples, cfg.seed, held
    )
    train = [corpus.window(i, k) for i, k in train_keys.tolist()]
    val = [corpus.window(i, k) for i, k in val_keys.tolist()]
    log.info(
        "%s: %d documents, %d of them tokenised; %d ends of documents dropped (a single token).",
        source.label,
        len(documents),
        corpus.tokenised,
        corpus.dropped_ends,
    )
    return window_bundle(train, val, cfg, tokenizer, f"data set {source.label}")


def _documents(cfg: DictConfig, source: Source) -> tuple[list[Document], list[int] | None]:
    """Rows with text as documents that are read when they are asked for, and which of them are marked for
    validation.
    """
    field = field_of(cfg, source, "text_field")
    # A document's id starts with its domain, which is the split where no field says it.
    names = row_ids(cfg, source, source.row_names(":") if cfg.domain_field else source.row_numbers())
    domains = row_domains(cfg, source, source.split_names())
    texts = source.table.select_columns([field])
    values = enumerate(column_values(source, field))
    filled = [row for row, value in values if text_of(value, source, row, field).strip()]
    if len(filled) < len(names):
        log.warning("%s: %d rows without text are left out.", source.label, len(names) - len(filled))
    documents = [Document(domains[row], names[row], read=partial(_read, texts, row, field)) for row in filled]
    if source.held is None:
        return documents, None
    return documents, [i for i, row in enumerate(filled) if row in source.held]


def _read(table: Any, row: int, field: str) -> str:
    text: str = table[row][field]
    return text


def _seq2seq(cfg: DictConfig, source: Source) -> DataBundle:
    fields = [field_of(cfg, source, key) for key in ("source_field", "target_field")]
    target_len = cfg.seq_len if cfg.target_len is None else cfg.target_len
    sides = choose_sides(cfg, source, source.split_names())
    tokenizer = load_tokenizer(cfg.tokenizer)
    tokens, targets = (
        _tokens(tokenizer, source, field, sides, longest)
        for field, longest in zip(fields, (cfg.seq_len, target_len), strict=True)
    )
    labels = [target.astype(np.int64) for target in targets]
    train, val = _text_rows(cfg, sides, tokens, labels, target_len, tokenizer)
    return _text_row_bundle(cfg, source, train, val, len(tokenizer), None)


def _text_classes(cfg: DictConfig, source: Source) -> DataBundle:
    field = field_of(cfg, source, "text_field")
    classes, class_names = row_classes(cfg, source)
    sides = choose_sides(cfg, source, [class_names[k] for k in classes.tolist()])
    tokenizer = load_tokenizer(cfg.tokenizer)
    tokens = _tokens(tokenizer, source, field, sides, cfg.seq_len)
    labels = [classes[row] for side in sides for row in side.rows]
    train, val = _text_rows(cfg, sides, tokens, labels, None, tokenizer)
    return _text_row_bundle(cfg, source, train, val, len(tokenizer), len(class_names))


def _image_classes(cfg: DictConfig, source: Source) -> DataBundle:
    column = ImageColumn(
        source, field_of(cfg, source, "image_field"), cfg.channels, cfg.image_size,
        Normalisation(cfg.mean, cfg.std, cfg.channels),
    )  # fmt: skip
    classes, class_names = row_classes(cfg, source)
    sides = choose_sides(cfg, source, [class_names[k] for k in classes.tolist()])
    train = ImageRows(column, sides[0], classes, class_names, 0)
    val = ImageRows(column, sides[1], classes, class_names, len(train))
    return DataBundle(
        train=train,
        val=val,
        task=TaskName.image_classes,
        vocab_size=None,
        input_shape=(cfg.channels, cfg.image_size, cfg.image_size),
        num_classes=len(class_names),
        fingerprint=fingerprint_images([train, val]),
        description=(
            f"data set {source.label}: {len(train)} training and {len(val)} validation images of "
            f"{len(class_names)} classes"
        ),
    )


BUILDERS: dict[TaskName, Callable[[DictConfig, Source], DataBundle]] = {
    TaskName.language: _language,
    TaskName.seq2seq: _seq2seq,
    TaskName.text_classes: _text_classes,
    TaskName.image_classes: _image_classes,
}


def _tokens(
    tokenizer: PreTrainedTokenizerBase, source: Source, field: str, sides: tuple[Side, Side], longest: int
) -> list[NDArray[np.int32]]:
    """The tokens of all training rows, then of all validation rows.

    Raises DataError for a value that is no text, or that gives no token.
    """
    rows = [row for side in sides for row in side.rows]
    values = source.table.select_columns([field]).select(rows)[field]
    texts = [text_of(value, source, row, field) for row, value in zip(rows, values, strict=True)]
    tokens, cut = encode_whole(tokenizer, texts, longest)
    if cut:
        log.warning(
            "%s: %d of %d texts in %r are cut to %d tokens.", source.label, cut, len(rows), field, longest
        )
    for row, ids in zip(rows, tokens, strict=True):
        if len(ids) == 0:
            raise DataError(f"{source.label} has an empty text in row {row} of {field!r}; remove the row.")
    return tokens


def _text_rows(
    cfg: DictConfig,
    sides: tuple[Side, Side],
    tokens: list[NDArray[np.int32]],
    labels: list[Any],
    label_width: int | None,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[TextRowSet, TextRowSet]:
    """`tokens` and `labels`: of all training rows, then of all validation rows."""
    cut = len(sides[0].rows)
    train, val = (
        [TextRow(*row) for row in zip(side.ids, side.domains, tokens[part], labels[part], strict=True)]
        for side, part in zip(sides, (slice(cut), slice(cut, None)), strict=True)
    )
    return (
        TextRowSet(train, 0, cfg.seq_len, label_width, tokenizer),
        TextRowSet(val, cut, cfg.seq_len, label_width, tokenizer),
    )


def _text_row_bundle(
    cfg: DictConfig,
    source: Source,
    train: TextRowSet,
    val: TextRowSet,
    vocab_size: int,
    num_classes: int | None,
) -> DataBundle:
    return DataBundle(
        train=train,
        val=val,
        task=TaskName(cfg.task),
        vocab_size=vocab_size,
        input_shape=None,
        num_classes=num_classes,
        fingerprint=fingerprint_rows([*train.rows, *val.rows]),
        description=(
            f"data set {source.label} as {cfg.task}: {len(train)} training and {len(val)} validation texts"
        ),
    )
