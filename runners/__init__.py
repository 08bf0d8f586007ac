"""From a config to a finished run: data, models, optimizers, the training loop, tracking.

Importing the package switches off the usage reports of MLflow and Hugging Face, before either is imported.
"""

from runners.telemetry import disable_telemetry

disable_telemetry()
