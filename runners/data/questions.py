"""Questions about scikit-learn's digits, with their answers: rows with no image, with one and with two.

    USER: What is 3 plus 4? ASSISTANT: 7
    USER: <image> Which digit is this? ASSISTANT: 5
    USER: <image><image> What is the sum of these digits? ASSISTANT: 12

LLaVA's own processor prepares the images and repeats the image token as often as an image has patches.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerBase

from conf.errors import ConfigError
from ghost.loss import IGNORED_LABEL
from runners.choices import TaskName
from runners.data.base import PADDING_ID, DataBundle, Item, Layout, SampleSet, one_line, require_at_least
from runners.data.digits import SIDE, flat_digits
from runners.data.selection import choose_rows
from runners.tokenizer import load_tokenizer

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class Question:
    sample_id: str
    domain: str
    prompt: str
    answer: str
    images: tuple[int, ...]
    """The digits shown, by their rows."""


@dataclass(frozen=True)
class Row:
    """A question as the model reads it."""

    question: Question
    input_ids: torch.Tensor
    """`[T]` int64: prompt, answer, end of text."""
    labels: torch.Tensor
    """`[T]` int64, -100 for the prompt."""
    pixel_values: torch.Tensor
    """`[images, 3, H, W]` float32."""


class QuestionSet(SampleSet):
    def __init__(
        self, rows: list[Row], offset: int, seq_len: int, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        padding = PADDING_ID if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        widths = {"input_ids": seq_len, "attention_mask": seq_len}
        self.layout = Layout(widths, seq_len, frozenset({"pixel_values"}), padding)
        self.rows = rows
        self.offset = offset
        self.sample_ids = [row.question.sample_id for row in rows]
        self.domains = [row.question.domain for row in rows]

    def __getitem__(self, i: int) -> Item:
        row = self.rows[i]
        inputs = {
            "input_ids": row.input_ids,
            "attention_mask": torch.ones_like(row.input_ids),
            "pixel_values": row.pixel_values,
        }
        return inputs, row.labels, self.offset + i

    def preview(self, i: int, width: int = 80) -> str:
        question = self.rows[i].question
        return one_line(f"{question.prompt} {question.answer}", width)


def build_questions(cfg: DictConfig) -> DataBundle:
    """A question for each of the 1,797 digits; no image stands in two of them.

    Raises ConfigError for image sizes that do not fit each other, an image token that is not the tokenizer's,
    or a length that cuts a question.
    """
    # scikit-learn takes a second to import, and language runs do without it.
    from sklearn.datasets import load_digits

    require_at_least(cfg, "train_samples", 1)
    require_at_least(cfg, "val_samples", 1)
    pixels, classes = load_digits(return_X_y=True)
    questions = make_questions(classes)
    ids = [question.sample_id for question in questions]
    train_rows, val_rows = choose_rows(ids, cfg.train_samples, cfg.val_samples, cfg.seed)
    processor = build_processor(cfg)
    images = [Image.fromarray(image) for image in to_bytes(pixels)]
    train, val = (
        [prepared(questions[i], images, processor) for i in rows.tolist()] for rows in (train_rows, val_rows)
    )
    _refuse_cut(cfg, [*train, *val])
    tokenizer = processor.tokenizer
    return DataBundle(
        train=QuestionSet(train, 0, cfg.seq_len, tokenizer),
        val=QuestionSet(val, len(train), cfg.seq_len, tokenizer),
        task=TaskName.image_text,
        vocab_size=len(tokenizer),
        input_shape=(3, cfg.image_size, cfg.image_size),
        num_classes=None,
        fingerprint=_fingerprint([*train, *val]),
        description=(
            f"questions about digits: {len(train)} training and {len(val)} validation rows with 0 to 2 "
            f"images of {cfg.image_size} pixels, {cfg.patch_size} a patch"
        ),
    )


def make_questions(classes: NDArray[np.integer]) -> list[Question]:
    """One question for each digit, by turns of three kinds; `classes` `[n]`, n a multiple of 3."""
    questions = []
    for row, digit in enumerate(classes.tolist()):
        following = (row + 1) % len(classes)
        total = str(digit + int(classes[following]))
        if row % 3 == 0:
            prompt = f"USER: What is {digit} plus {classes[following]}? ASSISTANT:"
            questions.append(Question(f"text/{row}", "text", prompt, total, ()))
        elif row % 3 == 1:
            prompt = f"USER: {IMAGE_TOKEN} Which digit is this? ASSISTANT:"
            questions.append(Question(f"image/{row}", "image", prompt, str(digit), (row,)))
        else:
            # The digit that follows is of the first kind, whose own image is not shown.
            prompt = f"USER: {IMAGE_TOKEN}{IMAGE_TOKEN} What is the sum of these digits? ASSISTANT:"
            questions.append(Question(f"pair/{row}", "pair", prompt, total, (row, following)))
    return questions


def build_processor(cfg: DictConfig) -> LlavaProcessor:
    """LLaVA's processor for `data.image_size`, `data.patch_size` and `data.tokenizer`.

    Raises ConfigError if the sizes do not fit, or the tokenizer's image token is not `data.image_token_id`.
    """
    if cfg.image_size % cfg.patch_size:
        raise ConfigError(
            f"data.image_size={cfg.image_size} must be a multiple of data.patch_size={cfg.patch_size}."
        )
    tokenizer = load_tokenizer(cfg.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})  # no effect if it is there
    found = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if found != cfg.image_token_id:
        raise ConfigError(
            f"data.image_token_id={cfg.image_token_id} is not the id of {IMAGE_TOKEN} in "
            f"data.tokenizer={cfg.tokenizer}, which is {found}: type data.image_token_id={found}."
        )
    side = {"height": cfg.image_size, "width": cfg.image_size}
    return LlavaProcessor(
        CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer,
        patch_size=cfg.patch_size,
        # CLIP puts a class token before the patches, and LLaVA drops it.
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )


def prepared(question: Question, images: list[Image.Image], processor: LlavaProcessor) -> Row:
    """The question's tokens and images; `images`: all digits."""
    shown = [images[row] for row in question.images]
    prompt = processor(text=question.prompt, images=shown or None)
    tokenizer = processor.tokenizer
    answer = tokenizer(f" {question.answer}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
    given = prompt["input_ids"][0]
    size = processor.image_processor.size
    empty = torch.zeros(0, 3, size["height"], size["width"])
    return Row(
        question=question,
        input_ids=torch.tensor([*given, *answer]),
        labels=torch.tensor([IGNORED_LABEL] * len(given) + answer),
        pixel_values=torch.from_numpy(np.stack(prompt["pixel_values"])) if shown else empty,
    )


def to_bytes(pixels: NDArray[np.float64]) -> NDArray[np.uint8]:
    """scikit-learn's grey values `[n, 64]` as `[n, 8, 8, 3]` from 0 to 255."""
    grey = (flat_digits(pixels) * 255).round().to(torch.uint8).reshape(-1, SIDE, SIDE, 1)
    return grey.expand(-1, -1, -1, 3).contiguous().numpy()


def _refuse_cut(cfg: DictConfig, rows: list[Row]) -> None:
    longest = max(len(row.input_ids) for row in rows)
    if longest > cfg.seq_len:
        raise ConfigError(
            f"data.seq_len={cfg.seq_len} would cut a question of {longest} tokens: type "
            f"data.seq_len={longest} or more."
        )


def _fingerprint(rows: Iterable[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.question.sample_id}\0{len(row.input_ids)}\0".encode())
        digest.update(row.input_ids.numpy().astype("<i8").tobytes())
        digest.update(row.labels.numpy().astype("<i8").tobytes())
        digest.update(row.pixel_values.numpy().astype("<f4").tobytes())
    return digest.hexdigest()
