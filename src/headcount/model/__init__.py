"""A transformers model seen as heads and FFNs: loading, anatomy, gates, and the contracts that prove them."""
