"""From shards and pictures to the batches that the towers take."""
