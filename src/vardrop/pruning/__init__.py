"""A trained run made small: what is removed and why, the files that stay, and networks that rebuild themselves."""

from vardrop.pruning.network_file import load_network

__all__ = ["load_network"]
