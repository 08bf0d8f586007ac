"""Bad samples and copies, planted in the place of samples that a text corpus had there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from conf.errors import ConfigError
from conf.schema import key
from runners.errors import DataError
from runners.fidelity.language import LanguageConfig, check_language
from runners.fidelity.settings import check_at_least, refuse_setting
from runners.tokenizer import encode, load_tokenizer

KINDS = ("shuffled", "bytes", "repeated")
PIECE = 4  # tokens that a repeated sample has over and over
LATIN = 256


@dataclass
class PlantedConfig(LanguageConfig):
    """What is planted, and how often a test loss that scores never saw is taken."""

    test_samples: int = key("windows that the test loss is of, drawn like val_samples from other documents")
    bad_share: float = key("share of the training samples that is bad, equally many of each kind")
    eval_every: int = key("steps between two test losses")


def check_planted(settings: PlantedConfig, share: float) -> None:
    """Raises `ConfigError` for settings of which nothing could be planted or tested.

    Args:
        share: A `bad_share` to advise.
    """
    check_language(settings)
    check_at_least(settings, eval_every=1, test_samples=1)
    if settings.eval_every > settings.steps:
        why = f"is more than fidelity.steps={settings.steps}: no loss would be taken on the way, so type less"
        refuse_setting(settings, "eval_every", why)
    if not 0 < settings.bad_share < 1:
        refuse_setting(settings, "bad_share", f"is no share of samples: type fidelity.bad_share={share}")
    if "tokenizer" not in {field.name for field in fields(settings.data)}:
        raise ConfigError(
            f"data@fidelity.data={settings.data.kind} names no tokenizer to encode bytes with: type "
            "data@fidelity.data=text, or interpreter"
        )


@dataclass(frozen=True)
class Planted:
    """A corpus with bad samples, with and without copies.

    Attributes:
        tokens: Every sample's token ids, `[T]` each.
        without_copies: The same but for the copies' places, where the corpus's own samples are.
        bad: Positions by kind.
        groups: Positions of each original and its copies, the original first.
    """

    tokens: list[Tensor]
    without_copies: list[Tensor]
    bad: Mapping[str, list[int]]
    groups: list[list[int]]

    @property
    def all_bad(self) -> list[int]:
        """Positions of every kind."""
        return [i for positions in self.bad.values() for i in positions]


def planted_in(
    tokens: Sequence[Tensor], settings: PlantedConfig, *, originals: int, copies: int, seed: int
) -> Planted:
    """`plant` as much as the settings say.

    Raises:
        DataError: Their share of the samples is none, or the corpus has too few.
    """
    bad = round(settings.bad_share * len(tokens) / len(KINDS))
    if not bad:
        raise DataError(f"fidelity.bad_share={settings.bad_share} of {len(tokens)} samples is none: raise it")
    tokenizer = load_tokenizer(settings.data.tokenizer)  # type: ignore[attr-defined]
    return plant(tokens, tokenizer, bad=bad, originals=originals, copies=copies, seed=seed)


def plant(
    tokens: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase, *, bad: int, originals: int, copies: int,
    seed: int,
) -> Planted:  # fmt: skip
    """Plant so many bad samples of each kind, and so many originals with `copies` copies each.

    Raises:
        DataError: The corpus has too few samples.
    """
    generator = np.random.default_rng(seed)
    needed = len(KINDS) * bad + originals * (1 + copies)
    if needed > len(tokens):
        raise DataError(
            f"{needed} samples are to be planted and the corpus has {len(tokens)}: raise "
            "fidelity.data.train_samples, or lower fidelity.bad_share, fidelity.originals or fidelity.copies"
        )
    chosen = generator.permutation(len(tokens))[:needed]
    places = {kind: chosen[i * bad : (i + 1) * bad].tolist() for i, kind in enumerate(KINDS)}
    groups = chosen[len(KINDS) * bad :].reshape(originals, 1 + copies).tolist()
    single = list(tokens)
    for kind, positions in places.items():
        for i in positions:
            single[i] = _bad(kind, tokens[i], tokenizer, generator)
    copied = list(single)
    for original, *others in groups:
        for i in others:
            copied[i] = single[original]
    return Planted(copied, single, places, groups)


def _bad(
    kind: str, tokens: Tensor, tokenizer: PreTrainedTokenizerBase, generator: np.random.Generator
) -> Tensor:
    """What stands in the place of a sample `[T]`, as long."""
    if kind == "shuffled":
        return tokens[torch.from_numpy(generator.permutation(len(tokens)))]
    if kind == "repeated":
        return tokens[:PIECE].repeat(-(-len(tokens) // PIECE))[: len(tokens)]
    found = torch.zeros(0, dtype=tokens.dtype)
    while len(found) < len(tokens):  # an encoding may have one token for several characters
        text = generator.integers(0, LATIN, 2 * len(tokens), dtype=np.uint8).tobytes().decode("latin-1")
        found = torch.cat([found, torch.from_numpy(encode(tokenizer, text)).to(tokens)])
    return found[: len(tokens)]
