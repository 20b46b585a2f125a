"""The compiled loops: which blocks, on which thread, and how their sums are put together."""
