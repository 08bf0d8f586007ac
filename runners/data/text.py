"""Your own text files, tokenised when the run starts."""

import logging
from functools import partial

from omegaconf import DictConfig

from runners.data.base import DataBundle, require_at_least
from runners.data.records import fields_of, find_files, read_records
from runners.data.selection import choose
from runners.data.windows import SHORTEST_WINDOW, Corpus, Document, window_bundle
from runners.tokenizer import load_tokenizer

log = logging.getLogger(__name__)


def build_text(cfg: DictConfig) -> DataBundle:
    """Documents of `data.path` in windows of `data.seq_len` tokens; a document's last window may be shorter.

    Whole documents are kept for validation, picked by their ids alone. All windows of the others are trained
    on, or `data.train_samples` of them, picked by `data.seed`.

    Raises DataError for files that cannot be read as `data` says, or that hold too little.
    """
    require_at_least(cfg, "seq_len", SHORTEST_WINDOW)
    require_at_least(cfg, "train_samples", 1)
    require_at_least(cfg, "val_samples", 1)
    files = find_files(cfg.path)
    documents = [
        Document(record.domain, record.name, read=partial(str, record.text))
        for record in read_records(files, fields_of(cfg))
    ]
    tokenizer = load_tokenizer(cfg.tokenizer)
    corpus = Corpus(documents, tokenizer, cfg.seq_len, SHORTEST_WINDOW)
    train_keys, val_keys = choose(corpus.ids, corpus.count, cfg.train_samples, cfg.val_samples, cfg.seed)
    train = [corpus.window(i, k) for i, k in train_keys.tolist()]
    val = [corpus.window(i, k) for i, k in val_keys.tolist()]
    log.info(
        "Text in %s: %d files, %d documents, %d of them tokenised; %d ends of documents dropped (a single "
        "token).",
        cfg.path,
        len(files),
        len(documents),
        corpus.tokenised,
        corpus.dropped_ends,
    )
    return window_bundle(train, val, cfg, tokenizer, f"text in {cfg.path}")
