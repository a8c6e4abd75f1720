"""Making datasets: sources, the split into parts, shards, the index of existing tars."""
