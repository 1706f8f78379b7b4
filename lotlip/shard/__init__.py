"""Stage `shard`: writes images, captions and frozen features as WebDataset tars."""
