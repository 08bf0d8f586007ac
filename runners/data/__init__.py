"""Data sources: each gives training and validation samples with stable ids and domains."""

from collections.abc import Callable

from omegaconf import DictConfig

from conf.errors import ConfigError
from runners.data.apart import set_test_apart
from runners.data.base import DataBundle
from runners.data.digits import build_digits
from runners.data.hf import build_hf
from runners.data.interpreter import build_interpreter
from runners.data.listed import restrict
from runners.data.questions import build_questions
from runners.data.table import build_table
from runners.data.text import build_text
from runners.data.tokens import build_tokens

SOURCES: dict[str, Callable[[DictConfig], DataBundle]] = {
    "interpreter": build_interpreter,
    "text": build_text,
    "tokens": build_tokens,
    "hf": build_hf,
    "digits": build_digits,
    "digit_questions": build_questions,
    "table": build_table,
}


def build_data(cfg: DictConfig) -> DataBundle:
    """The samples that the `data` part of the config describes.

    Raises ConfigError for a setting that cannot work, DataError for a source that is missing, damaged or too
    small, AnalysisError for a list of samples that cannot be read.
    """
    if cfg.kind not in SOURCES:
        raise ConfigError(f"data.kind={cfg.kind!r} is no data source; choose one of {', '.join(SOURCES)}.")
    return set_test_apart(restrict(SOURCES[cfg.kind](cfg), cfg), cfg)
