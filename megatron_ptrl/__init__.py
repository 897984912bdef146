"""Pre-training data as a reinforcement signal, for Megatron-Core."""
