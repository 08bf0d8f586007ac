"""The embedded corpus: code, documentation and licences that come with the Python installation."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from omegaconf import DictConfig

from conf.errors import ConfigError
from runners.data.base import DataBundle, require_at_least
from runners.data.corpus import code_documents, docs_documents, legal_documents, origin
from runners.data.selection import VAL_FRACTION, VAL_SEED, WindowKey, draw, stable_unit
from runners.data.windows import SHORTEST_WINDOW, Corpus, Document, Window, window_bundle
from runners.errors import DataError
from runners.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

DOMAINS: dict[str, Callable[[], list[Document]]] = {
    "code": code_documents,
    "docs": docs_documents,
    "legal": legal_documents,
}


def build_interpreter(cfg: DictConfig) -> DataBundle:
    """Windows of `data.seq_len` tokens, as many of each domain (up to one).

    A tenth of the documents, picked by their names alone, is kept for validation; `data.seed` picks the
    training windows. With `data.shuffled_domain` one of the equal parts of the training samples is a domain
    `<name>-shuffled`: windows of that domain which are used nowhere else, their tokens in random order.

    Raises ConfigError for an unknown domain, DataError if the installation has too little text.
    """
    _check(cfg)
    tokenizer = load_tokenizer(cfg.tokenizer)
    train: list[Window] = []
    val: list[Window] = []
    corpora: list[Corpus] = []
    for share in _shares(cfg):
        # Ends shorter than a window are dropped: there is text enough.
        train_corpus, val_corpus = (
            Corpus(documents, tokenizer, cfg.seq_len, shortest=cfg.seq_len)
            for documents in _sides(share.domain)
        )
        keys = _draw(train_corpus, share.train + share.shuffled, cfg.seed, f"training, domain {share.domain}")
        train += [train_corpus.window(*key) for key in sorted(keys[: share.train])]
        train += [shuffled(train_corpus.window(*key), cfg.seed) for key in sorted(keys[share.train :])]
        keys = _draw(val_corpus, share.val, VAL_SEED, f"validation, domain {share.domain}")
        val += [val_corpus.window(*key) for key in sorted(keys)]
        corpora += [train_corpus, val_corpus]
    log.info(
        "The interpreter's corpus: %d of %d documents tokenised; %d ends shorter than a window dropped.",
        sum(corpus.tokenised for corpus in corpora),
        sum(len(corpus.documents) for corpus in corpora),
        sum(corpus.dropped_ends for corpus in corpora),
    )
    names = ", ".join(dict.fromkeys(window.domain for window in train))
    return window_bundle(train, val, cfg, tokenizer, f"interpreter corpus ({names})")


def shuffled(window: Window, seed: int) -> Window:
    """The window in the domain `<domain>-shuffled`, its tokens in an order drawn from the seed and its id."""
    generator = np.random.default_rng([seed, int(stable_unit(window.sample_id) * 2**53)])
    return Window(
        sample_id=f"{window.sample_id}~shuffled",
        domain=f"{window.domain}-shuffled",
        tokens=generator.permutation(window.tokens),
    )


@dataclass(frozen=True)
class _Share:
    """How many windows one domain gives."""

    domain: str
    train: int
    shuffled: int
    val: int


def _shares(cfg: DictConfig) -> list[_Share]:
    domains = [str(domain) for domain in cfg.domains]
    planted = int(cfg.shuffled_domain is not None)
    train = _parts(cfg.train_samples, len(domains) + planted)
    val = _parts(cfg.val_samples, len(domains))
    return [
        _Share(domain, train[i], train[-1] if domain == cfg.shuffled_domain else 0, val[i])
        for i, domain in enumerate(domains)
    ]


def _parts(total: int, count: int) -> list[int]:
    """`total` in `count` parts that differ by at most one, the larger ones first."""
    return [total // count + (i < total % count) for i in range(count)]


def _sides(domain: str) -> tuple[list[Document], list[Document]]:
    """The domain's documents for training, and those for validation."""
    documents = DOMAINS[domain]()
    is_val = [stable_unit(origin(document)) < VAL_FRACTION for document in documents]
    train = [document for document, held in zip(documents, is_val, strict=True) if not held]
    val = [document for document, held in zip(documents, is_val, strict=True) if held]
    return train, val


def _draw(corpus: Corpus, needed: int, seed: int, purpose: str) -> list[WindowKey]:
    keys = draw(corpus.ids, corpus.count, needed, seed)
    if len(keys) < needed:
        raise DataError(
            f"{needed} windows are asked for ({purpose}), and this Python installation has {len(keys)} of "
            "the length data.seq_len; lower data.train_samples, data.val_samples or data.seq_len, or use "
            "data=text."
        )
    return keys


def _check(cfg: DictConfig) -> None:
    domains = [str(domain) for domain in cfg.domains]
    if not domains or set(domains) - set(DOMAINS) or len(set(domains)) < len(domains):
        raise ConfigError(f"data.domains={domains} must name one or more of {', '.join(DOMAINS)}, each once.")
    if cfg.shuffled_domain is not None and cfg.shuffled_domain not in domains:
        raise ConfigError(
            f"data.shuffled_domain={str(cfg.shuffled_domain)!r} must be null or one of "
            f"data.domains={domains}."
        )
    require_at_least(cfg, "seq_len", SHORTEST_WINDOW)
    require_at_least(cfg, "train_samples", len(domains) + (cfg.shuffled_domain is not None))
    require_at_least(cfg, "val_samples", 1)
