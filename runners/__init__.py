"""From a config to a finished run: data, models, optimizers, the training loop, tracking."""

import conf  # noqa: F401  (switches off usage reports, before MLflow or transformers are imported)
