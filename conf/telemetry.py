"""No usage reports: nothing leaves the machine."""

import os
from collections.abc import Mapping

# Each of these libraries reports usage to its makers unless its variable says no; none has another switch.
_TELEMETRY_OFF = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "true",
}


def disable_telemetry() -> None:
    """Switch off the usage reports of MLflow and Hugging Face; call it before either is imported.

    A value that the user has set stays.
    """
    set_defaults(_TELEMETRY_OFF)


def set_defaults(variables: Mapping[str, str]) -> None:
    """Set those environment variables of other libraries that the user has not set."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)
