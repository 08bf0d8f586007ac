"""The config groups and how a command line becomes a checked config: what run.py, runners and analysis share.

Importing the package switches off the usage reports of MLflow and Hugging Face, before either is imported.
"""

from conf.telemetry import disable_telemetry

disable_telemetry()
