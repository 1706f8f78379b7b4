"""Stage `ingest`: images with their short captions become partitions."""
