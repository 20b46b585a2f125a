"""The benchmark: normext beside its peers, turn by turn. Run ``python -m bench --help``."""
