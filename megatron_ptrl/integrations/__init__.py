"""The losses in a training job that somebody already has: Megatron-LM, Megatron-Bridge, or a loop of one's own.

cross_entropy: functions with Megatron's own signatures    megatron_lm: `pretrain_gpt.py` and its like
megatron_bridge: a forward step for its recipes            core_loss, core_remit: what both change in Megatron-Core
"""
