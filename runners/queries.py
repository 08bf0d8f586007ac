"""Queries of a search: text from a file or samples of a data source, made as the store's own samples are."""

import logging
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from conf.errors import ConfigError
from conf.help_text import typed
from runners.choices import TaskName
from runners.data import build_data
from runners.data.base import SampleSet
from runners.data.records import ENDINGS, Fields, Record, TextFile, read_records
from runners.data.tasks import Continuations
from runners.data.windows import SHORTEST_WINDOW, Corpus, Document, Window, WindowSet
from runners.errors import DataError
from runners.models.hf_config import DataFacts, check_model
from runners.projection_store import StoreFacts, domain_classes
from runners.tasks import model_task, refuse_other_task
from runners.tokenizer import encode, load_tokenizer
from runners.validate_data import check_data

log = logging.getLogger(__name__)


def text_tokenizer(made: DictConfig, facts: StoreFacts) -> str | None:
    """What makes a text comparable with the samples of a store that was made with this config; None where
    nothing does.
    """
    return facts.tokenizer if model_task(made.model) in (TaskName.language, TaskName.seq2seq) else None


def text_queries(query: DictConfig, made: DictConfig, facts: StoreFacts) -> SampleSet:
    """The text of `query.text` as queries: windows of a .txt file, else the beginning of each row.

    Args:
        query: The search's `query` node.
        made: The config that the store was made with.
        facts: What else is known of the store's samples.

    Raises:
        ConfigError: The store's samples are no plain text.
        DataError: The file cannot be read, or a text is too short.
    """
    task = model_task(made.model)
    if (tokenizer_name := text_tokenizer(made, facts)) is None:
        raise ConfigError(
            f"query.text={query.text} cannot be compared with a store of {task} samples"
            f"{'' if facts.tokenizer else ' without a tokenizer'}: type query.text=null, and data=CHOICE"
        )
    file = TextFile(Path(query.text), Path(query.text).name)
    if not file.path.is_file() or not file.ending:
        raise ConfigError(f"query.text={query.text} is no file that ends in one of {', '.join(ENDINGS)}")
    fields = Fields(text=query.text_field, domain=None, id=None, fixed_domain=None, group="query")
    if file.ending == ".txt" and query.text_field != "text":
        raise ConfigError(
            f"query.text_field={query.text_field} has no effect on query.text={query.text}, which has no "
            "fields: type query.text_field=text"
        )
    records = list(read_records([file], fields))
    if not records:
        raise DataError(f"{file.path} has no rows, so there is nothing to look for; bring some.")
    tokenizer = load_tokenizer(tokenizer_name)
    cut = _all_windows if file.ending == ".txt" else _beginnings
    windows = cut(records, tokenizer, made.data.seq_len)
    samples = WindowSet(windows, 0, made.data.seq_len, tokenizer)
    return Continuations(samples) if task == TaskName.seq2seq else samples


def data_queries(
    query: DictConfig, data: DictConfig | None, made: DictConfig, facts: StoreFacts
) -> SampleSet:
    """The samples of `query.split` of a data source, the store's own where `data` is None.

    Raises:
        ConfigError, DataError: The source cannot be built, or gives something else than the store's samples.
    """
    both = made.copy()
    if data is not None:
        both.data = OmegaConf.create(OmegaConf.to_container(data, resolve=True))
    check_data(both)
    refuse_other_task(both)
    if both.model.kind == "hf":
        check_model(both.model, DataFacts(seq_len=OmegaConf.select(both, "data.seq_len")))
    bundle = build_data(both.data)
    for name, has, needs in (
        ("vocab_size", bundle.vocab_size, facts.data.vocab_size),
        ("input_shape", bundle.input_shape, facts.data.input_shape),
        ("num_classes", bundle.num_classes, facts.data.num_classes),
    ):
        if has != needs:
            raise ConfigError(
                f"data={both.data.kind} has {name}={has}, and the store's samples have {needs}: choose data "
                "like theirs"
            )
    if (classes := domain_classes(both.data, bundle)) != facts.classes:
        raise ConfigError(
            f"data={both.data.kind} has the classes {typed(classes)}, and the store's samples have "
            f"{typed(facts.classes)}: choose data with theirs"
        )
    return bundle.train if query.split == "train" else bundle.val


def _all_windows(records: list[Record], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> list[Window]:
    """All windows of each text."""
    documents = [Document(r.domain, r.name, partial(str, r.text)) for r in records]
    corpus = Corpus(documents, tokenizer, seq_len, SHORTEST_WINDOW)
    windows = [corpus.window(i, k) for i in range(len(documents)) for k in range(corpus.count(i))]
    if not windows:
        raise DataError(f"{records[0].file.path} has fewer than {SHORTEST_WINDOW} tokens; bring more.")
    if corpus.dropped_ends:
        log.info("The last token of the text is in no query: alone it has nothing that is predicted.")
    return windows


def _beginnings(records: list[Record], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> list[Window]:
    """The first window of each row."""
    windows, cut = [], 0
    for record in records:
        tokens = encode(tokenizer, record.text)
        if len(tokens) < SHORTEST_WINDOW:
            raise DataError(
                f"{record.file.path}: the text of {record.name} has fewer than {SHORTEST_WINDOW} tokens, so "
                "nothing of it is predicted; remove the row."
            )
        cut += len(tokens) > seq_len
        windows.append(Window(f"{record.domain}/{record.name}", record.domain, tokens[:seq_len]))
    if cut:
        log.warning("%d of %d texts are cut to data.seq_len=%d tokens.", cut, len(records), seq_len)
    return windows
