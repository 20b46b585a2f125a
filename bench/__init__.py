"""How fast normext is, beside PyTorch and plain loops; run it with ``python -m bench``."""
