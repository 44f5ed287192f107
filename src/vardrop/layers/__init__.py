"""Layers of activation noise, one family a file; the first argument is p, as in torch.nn."""
