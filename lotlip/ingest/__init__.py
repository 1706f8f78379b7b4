"""Stage `ingest`: turns images and their short captions into partitions."""
