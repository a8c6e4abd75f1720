"""Remote files: URLs, transfers with retries, the node's cache of shards."""
