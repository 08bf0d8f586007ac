"""A test set: held-out samples that scoring never sees, `data.test_samples` of `data.val_samples`."""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from omegaconf import DictConfig

from runners.data.base import DataBundle
from runners.data.listed import Chosen
from runners.data.selection import stable_unit

log = logging.getLogger(__name__)


def set_test_apart(bundle: DataBundle, cfg: DictConfig) -> DataBundle:
    """The bundle with `data.test_samples` of its validation samples as a test set; training stays as it is.

    Which they are depends on the samples' ids alone. Every domain gives its share, and whole documents go to
    one side, but for at most one document a domain.
    """
    if not cfg.test_samples:
        return bundle
    test = test_positions(bundle.val.sample_ids, bundle.val.domains, cfg.test_samples)
    taken = set(test)
    val = [i for i in range(len(bundle.val)) if i not in taken]
    _say_split_documents(bundle.val.sample_ids, test, val)
    first = len(bundle.train)
    digest = hashlib.sha256(f"{bundle.fingerprint}\0test={len(test)}".encode())
    return replace(
        bundle,
        val=Chosen(bundle.val, val, first),
        test=Chosen(bundle.val, test, first + len(val)),
        fingerprint=digest.hexdigest(),
        description=f"{bundle.description}; {len(test)} held-out samples are a test set",
    )


def test_positions(ids: Sequence[str], domains: Sequence[str], wanted: int) -> list[int]:
    """The positions of `wanted` of the samples, ascending."""
    shares = _shares(Counter(domains), wanted)
    order = sorted(range(len(ids)), key=lambda i: (stable_unit(document_of(ids[i])), stable_unit(ids[i])))
    chosen = []
    for i in order:
        if shares[domains[i]]:
            shares[domains[i]] -= 1
            chosen.append(i)
    return sorted(chosen)


def _shares(sizes: Counter[str], wanted: int) -> dict[str, int]:
    """How many each domain gives: in proportion to its size, the rest by largest remainder."""
    total = sizes.total()
    shares = {domain: wanted * size // total for domain, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda domain: (-(wanted * sizes[domain] % total), domain))
    for domain in by_remainder[: wanted - sum(shares.values())]:
        shares[domain] += 1
    return shares


def document_of(sample_id: str) -> str:
    """What the sample is a window of; a sample that is no window is its own document."""
    return sample_id.rpartition("#")[0] or sample_id


def _say_split_documents(ids: Sequence[str], test: Sequence[int], val: Sequence[int]) -> None:
    both = {document_of(ids[i]) for i in test} & {document_of(ids[i]) for i in val}
    if both:
        log.info("%d documents have windows both in validation and in the test set.", len(both))
