"""Tables and figures of the experiments about values, from MLflow."""
