"""Moving a model between ranks: who holds what, who wants what, and the bytes between them."""
