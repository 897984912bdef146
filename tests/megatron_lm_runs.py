"""Megatron-LM's own pretrain_gpt.py in processes of its own, of each checkout that MEGATRON_LM names."""

import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

CHECKOUTS = [path for path in os.environ.get("MEGATRON_LM", "").split(":") if path]
WITHOUT = "MEGATRON_LM names no checkout of Megatron-LM to run"
HOST = Path(__file__).with_name("megatron_lm_host.py")
# What apex or Transformer Engine would be needed for is switched off.
BASE = """--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
    --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-3 --eval-iters 1 --eval-interval 2
    --tokenizer-type NullTokenizer --vocab-size 600 --make-vocab-size-divisible-by 512 --num-workers 0
    --transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-bias-dropout-fusion --no-persist-layer-norm --no-rope-fusion --position-embedding-type rope
    --distributed-backend gloo --use-cpu-initialization --hidden-dropout 0 --attention-dropout 0
    --log-interval 1""".split()
TP = ("--tensor-model-parallel-size", "2")


@cache
def launch(checkout: str, mode: str, flags: tuple[str, ...], world_size: int = 1, **environment: str) -> list[str]:
    """What each rank printed; a rank that fails fails the test."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    root = str(Path(__file__).parents[1])
    common = os.environ | environment | {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "PYTHONPATH": root}
    common |= {"WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    common |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONWARNINGS": "ignore"}
    if "PYTHONPATH" in os.environ:
        common["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    command = [sys.executable, str(HOST), mode, checkout, "pretrain_gpt.py", *BASE, *flags]
    ranks = [
        subprocess.Popen(
            command,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(output[-3000:] for output in outputs)
    return outputs
