"""The documents that come with a Python installation: source code, documentation and licences."""

import ast
import importlib.metadata
import importlib.util
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from runners.data.windows import Document
from runners.errors import DataError

# Folders of the standard library that hold no code written for reading: tests, and tables made by programs.
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "__pycache__",
}
GENERATED_FILES = {"html/entities.py", "keyword.py", "stringprep.py", "symbol.py", "token.py"}
GENERATED_PREFIX = "_sysconfigdata"

LICENCE_NAMES = ("LICENSE", "LICENCE", "COPYING", "NOTICE")
LONG_DOCSTRING = 200  # characters
DOCSTRINGS = "docstrings/"

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

ADVICE = "use data=text with data.path=<your files>, or a complete Python installation"


def origin(document: Document) -> str:
    """What the text was taken from: a module's docstrings come from the same file as its code."""
    return document.name.removeprefix(DOCSTRINGS)


def code_documents() -> list[Document]:
    """The standard library's modules, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    return [Document("code", name, read=partial(_read_source, root / name)) for name in _stdlib_modules(root)]


def docs_documents() -> list[Document]:
    """Python's help topics, then each standard module's long docstrings as one document, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    topics = [
        Document("docs", f"topics/{label}", read=partial(str, text))
        for label, text in sorted(_help_topics().items())
    ]
    modules = [
        Document("docs", f"{DOCSTRINGS}{name}", read=partial(_read_docstrings, root / name))
        for name in _stdlib_modules(root)
    ]
    return topics + modules


def legal_documents() -> list[Document]:
    """Licence files of the installed distributions, each content once, sorted by name."""
    seen: set[str] = set()
    documents = []
    for name, path in sorted(_licence_files().items()):
        # Old licences spell their authors in Latin-1; a replaced letter does no harm here.
        text = path.read_text(encoding="utf-8", errors="replace")
        if text not in seen:
            seen.add(text)
            documents.append(Document("legal", name, read=partial(str, text)))
    if not documents:
        raise DataError(
            f"data.domains holds 'legal', but no installed distribution here has a licence file; {ADVICE}."
        )
    return documents


def _stdlib_modules(root: Path) -> list[str]:
    """Paths below `root`, with forward slashes, sorted."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        paths = ((Path(folder) / file).relative_to(root).as_posix() for file in files if file.endswith(".py"))
        names += [
            path
            for path in paths
            if path not in GENERATED_FILES and not Path(path).name.startswith(GENERATED_PREFIX)
        ]
    if not names:
        raise DataError(
            f"data.kind=interpreter needs the standard library's source files, and {root} has none; {ADVICE}."
        )
    return sorted(names)


def _help_topics() -> dict[str, str]:
    if importlib.util.find_spec("pydoc_data") is None:
        raise DataError(f"data.domains holds 'docs', but this Python has no module pydoc_data; {ADVICE}.")
    from pydoc_data.topics import topics

    return topics


def _read_source(path: Path) -> str:
    with tokenize.open(path) as file:  # honours the file's own coding line
        return file.read()


def _read_docstrings(path: Path) -> str:
    return "\n\n".join(_long_docstrings(ast.parse(_read_source(path))))


def _long_docstrings(node: Documented) -> Iterator[str]:
    """Those of a module, class or function, and of what its body defines."""
    text = ast.get_docstring(node) or ""
    if len(text) >= LONG_DOCSTRING:
        yield text
    for child in node.body:
        if isinstance(child, Documented):
            yield from _long_docstrings(child)


def _licence_files() -> dict[str, Path]:
    """Licence files by `<distribution>/<path below its metadata folder>`.

    Where two folders on sys.path hold the same distribution, the first one counts, as for an import.
    """
    files: dict[str, Path] = {}
    sites = dict.fromkeys(Path(str(found.locate_file(""))) for found in importlib.metadata.distributions())
    for site in sites:
        for metadata in sorted(site.glob("*.dist-info")):
            distribution = metadata.stem.rpartition("-")[0]
            for path in sorted(metadata.rglob("*")):
                if path.name.upper().startswith(LICENCE_NAMES) and path.is_file():
                    files.setdefault(f"{distribution}/{path.relative_to(metadata).as_posix()}", path)
    return files
