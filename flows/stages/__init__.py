"""The Prefect flow of each stage."""
