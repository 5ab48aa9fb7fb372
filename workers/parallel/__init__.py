"""One engine on a grid of ranks: tensor, pipeline and sequence parallelism."""
