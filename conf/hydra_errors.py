"""Hydra's and OmegaConf's errors of composition in one sentence: key, value, and what to type instead."""

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from conf.help_text import is_unresolved

# What OmegaConf says of a wrong type, and how to say it after `key=value`.
WRONG_TYPES = (
    (r"could not be converted to Integer", "is not a whole number"),
    (r"could not be converted to Float", "is not a number"),
    (r"is not a valid bool", "is not true or false"),
    (r"is not a ListConfig, list or tuple", "is not a list, such as [a,b]"),
    (r"Cannot merge DictConfig with", "is no place for a value: its keys have them, such as KEY.NAME=VALUE"),
    (r"is not Optional", "does not fit: the key needs a value"),
    (r"does not support deletion", "cannot be deleted"),
)


# Choices that plugins of Hydra bring, and this project's extra that installs the plugin.
EXTRAS = {
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/submitit_slurm": "slurm",
    "hydra/sweeper/optuna": "optuna",
}


def sentence(error: BaseException, arguments: Sequence[str], groups: Sequence[str]) -> str:
    """One line for an error that ended the composition of a config from the command line's `arguments`.

    Args:
        groups: The config groups that the command has.
    """
    cause = error.__cause__ or error.__context__
    if isinstance(error, MissingConfigException):
        return _unknown_choice(error)
    if isinstance(error, OverrideParseException):
        text = f"'{error.override}' is not an override: type {_quoted(error.override)}"
    elif isinstance(error, OmegaConfBaseException):
        text = _config_error(error, groups, given=None)
    elif isinstance(cause, OmegaConfBaseException):
        text = _config_error(_innermost(cause), groups, given=_typed_override(str(error)))
    else:
        text = _hydra_error(str(error) or type(error).__name__, arguments, groups)
    source = re.match(r"In '([^']+)': ", str(error))
    return (f"In {source[1]}: " if source else "") + " ".join(text.split())


def suggestion(name: str, choices: Iterable[str], prefix: str = "") -> str:
    """`: did you mean x?` where a choice is close to `name`, else an empty string; `prefix` goes before x."""
    close = get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f": did you mean {prefix}{close[0]}?" if close else ""


def _quoted(override: str | None) -> str:
    """How to type an override whose value has characters that mean something to Hydra."""
    key, equals, value = (override or "").partition("=")
    if not equals or not re.fullmatch(r"[+~]*[\w.@/-]+", key) or re.search(r"['\"{}]", value):
        return "key=value, with quotes around special characters, such as \"key='a#1'\""
    if value.startswith("["):
        quoted = ",".join(f"'{item.strip()}'" for item in value.strip("[]").split(","))
        return f'"{key}=[{quoted}]", quotes within quotes'
    return f"\"{key}='{value}'\", quotes within quotes"


def _unknown_choice(error: MissingConfigException) -> str:
    if error.missing_cfg_file is None or error.options is None:
        return str(error).splitlines()[0]
    group, _, name = error.missing_cfg_file.rpartition("/")
    if error.missing_cfg_file in EXTRAS:
        return f"{group}={name} needs a plugin: pip install 'ghostrunner[{EXTRAS[error.missing_cfg_file]}]'"
    hint = suggestion(name, error.options)
    return f"{group}={name} is not a choice{hint} (choices: {', '.join(error.options)})"


def _hydra_error(message: str, arguments: Sequence[str], groups: Sequence[str]) -> str:
    """Hydra's own refusals, where its wording does not say what to type."""
    if several := re.match(r"Ambiguous value for argument '(.*)'", message):
        return (
            f"{several[1]} has several values: write [...] for a list, or add -m to run.py for one run each"
        )
    if twice := re.match(r"Multiple values for (\S+)\.", message):
        return f"{twice[1]} has two values: type {twice[1]}=CHOICE once, without +"
    if absent := re.match(r"Could not override '(.*)'\. No match in the defaults list", message):
        return f"{absent[1]} is no group of this command, see --help"
    if message.startswith("Config group override must be"):
        numbers = re.compile(rf"({'|'.join(groups)})=([-+.\d]+|null|true|false)", re.IGNORECASE)
        culprits = [argument for argument in arguments if numbers.fullmatch(argument)]
        return f"{' '.join(culprits)}: a group takes the name of one of its choices, see --help"
    return message


def _config_error(error: OmegaConfBaseException, groups: Sequence[str], given: str | None) -> str:
    full_key = error.full_key or str(error.key)
    reason = (error.msg or str(error)).splitlines()[0]
    if full_key == "hydra.sweep.dir" and "Missing mandatory value" in reason:
        return "-m is for run.py: this command does one thing at a time, so type it once for each value"
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        return _unknown_key(error, full_key, groups, given)
    if choices := re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", reason):
        hint = suggestion(choices[1], choices[2].split(", "))
        return f"{full_key}={choices[1]} is not a choice{hint} (choices: {choices[2]})"
    if given is None or not re.match(rf"{re.escape(full_key)}\W", given):
        value = re.search(r"Value '(.*?)'", reason)
        given = f"{full_key}={value[1]}" if value else full_key
    for pattern, saying in WRONG_TYPES:
        if re.search(pattern, reason):
            return f"{given} {saying}"
    return f"{given}: {reason}"


def _unknown_key(
    error: OmegaConfBaseException, full_key: str, groups: Sequence[str], given: str | None
) -> str:
    start = f"{given}: " if given else ""
    parent = error.parent_node
    if not isinstance(parent, DictConfig):
        return f"{start}there is no key {full_key}"
    group, dot, name = full_key.rpartition(".")
    siblings = [str(sibling) for sibling in parent if sibling != "hydra"]
    if not group:
        siblings = sorted({*siblings, *groups})
    elsewhere = [path for path in _leaves(parent) if path.endswith(f".{name}")]
    if elsewhere and not get_close_matches(name, siblings, n=1, cutoff=0.8):
        hint = f": did you mean {group}{dot}{elsewhere[0]}?"
    else:
        hint = suggestion(name, siblings, prefix=group + dot)
    of_group = f" of {group}" if group else ""
    return f"{start}there is no key {full_key}{hint} (keys{of_group}: {', '.join(siblings)})"


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of the keys below `node`, Hydra's own left out."""
    for name in map(str, node):
        if name == "hydra":
            continue
        yield f"{prefix}{name}"
        if not is_unresolved(node, name) and isinstance(node[name], DictConfig):
            yield from _leaves(node[name], f"{prefix}{name}.")


def _typed_override(message: str) -> str | None:
    """The override as typed, from Hydra's message about it."""
    match = re.search(r"use \+(.+)|Error merging override (.+)", message)
    return (match[1] or match[2]).strip() if match else None


def _innermost(error: OmegaConfBaseException) -> OmegaConfBaseException:
    """The first cause that knows its key."""
    cause = error.__cause__
    return _innermost(cause) if isinstance(cause, OmegaConfBaseException) and not error.key else error
