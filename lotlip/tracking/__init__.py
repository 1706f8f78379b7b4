"""MLflow: runs, comparisons, the model registry."""
