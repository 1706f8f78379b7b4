"""MLflow: runs, comparisons and the model registry."""
