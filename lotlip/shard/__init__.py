"""Stage `shard`: images, captions and frozen features become WebDataset tars."""
