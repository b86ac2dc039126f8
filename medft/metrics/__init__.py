"""How good predictions and embeddings are: numbers with intervals, from texts and arrays alone."""
