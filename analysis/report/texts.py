"""The first words of samples, from a file that the user names."""

import json
from pathlib import Path

from analysis.errors import AnalysisError

_LENGTH = 240  # characters that are shown


def read_texts(path: Path) -> dict[str, str]:
    """First words by sample id, each on one line, from rows `{"sample_id": …, "text": …}` of a JSONL file.

    Raises:
        AnalysisError: The file is missing, or a line of it is something else.
    """
    if not path.is_file():
        raise AnalysisError(
            f"texts={path} is no file: give a JSONL file with sample_id and text in each line."
        )
    found = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                sample_id, text = row["sample_id"], row["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise AnalysisError(
                    f"texts={path} has no sample_id and text in line {number}: each line is a JSON object "
                    "with both."
                ) from error
            found[str(sample_id)] = first_words(str(text))
    return found


def first_words(text: str) -> str:
    """The beginning of a text, on one line."""
    words = " ".join(text[: 4 * _LENGTH].split())
    return words if len(words) <= _LENGTH else f"{words[: _LENGTH - 1]}…"
