"""Losses: tensors, a config and process groups in, tensors out; collectives are counted in the docstrings."""
