"""What text is for: the same windows of tokens for a language model, an encoder-decoder or a classifier."""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping

import torch

from runners.choices import TaskName
from runners.data.base import DataBundle, Item, Layout, SampleSet
from runners.errors import DataError


class TaskView(SampleSet):
    """Language samples with other inputs or labels; ids, domains and order stay."""

    def __init__(self, base: SampleSet) -> None:
        self.base = base
        self.sample_ids = base.sample_ids
        self.domains = base.domains
        self.offset = base.offset

    @abstractmethod
    def __getitem__(self, i: int) -> Item: ...

    def preview(self, i: int, width: int = 80) -> str:
        return self.base.preview(i, width)

    def tokens(self, i: int) -> torch.Tensor:
        """The token ids of sample i, `[T]` int64."""
        inputs, _, _ = self.base[i]
        assert isinstance(inputs, dict)
        return inputs["input_ids"]


class Continuations(TaskView):
    """Windows cut in two: the first half is the source, the second the target."""

    def __init__(self, base: SampleSet) -> None:
        super().__init__(base)
        window = base.layout.widths["input_ids"]
        source = window // 2
        self.layout = Layout({"input_ids": source, "attention_mask": source}, window - source)

    def __getitem__(self, i: int) -> Item:
        tokens = self.tokens(i)
        source, target = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
        return {"input_ids": source, "attention_mask": torch.ones_like(source)}, target, self.offset + i


class DomainClasses(TaskView):
    """Windows labelled with their domain."""

    def __init__(self, base: SampleSet, numbers: Mapping[str, int]) -> None:
        """`numbers`: the class of each domain."""
        super().__init__(base)
        self.numbers = numbers
        width = base.layout.widths["input_ids"]
        self.layout = Layout({"input_ids": width, "attention_mask": width})

    def __getitem__(self, i: int) -> Item:
        tokens = self.tokens(i)
        label = torch.tensor(self.numbers[self.domains[i]])
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, label, self.offset + i


def text_bundle(
    train: SampleSet, val: SampleSet, task: TaskName, vocab_size: int, fingerprint: str, description: str
) -> DataBundle:
    """Language samples as `data.task` wants them; `fingerprint` is that of the language samples.

    Raises DataError if domains are to be the classes and there is only one.
    """
    num_classes = None
    if task == TaskName.seq2seq:
        train, val = Continuations(train), Continuations(val)
    elif task == TaskName.text_classes:
        numbers = {name: i for i, name in enumerate(sorted({*train.domains, *val.domains}))}
        if len(numbers) < 2:
            raise DataError(
                f"data.task=text_classes tells domains apart, and all samples are of {', '.join(numbers)}; "
                "bring text of two domains or more."
            )
        train, val, num_classes = DomainClasses(train, numbers), DomainClasses(val, numbers), len(numbers)
    if task != TaskName.language:
        fingerprint = hashlib.sha256(f"{task}\0{fingerprint}".encode()).hexdigest()
        description = f"{description}, as {task}"
    return DataBundle(
        train=train,
        val=val,
        task=task,
        vocab_size=vocab_size,
        input_shape=None,
        num_classes=num_classes,
        fingerprint=fingerprint,
        description=description,
    )
