"""What `megatron.training.checkpointing` does, by Megatron-Core's own functions: its files, and how it reads them."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

# --dist-ckpt-optim-fully-reshardable, and without that flag.
RESHARDABLE, BUCKETS = "fully_reshardable", "dp_reshardable"


def content_metadata(sharding: str | None) -> dict[str, Any]:
    distributed = {"distrib_optim_sharding_type": sharding, "distrib_optim_fully_reshardable_mem_efficient": False}
    return {**(distributed if sharding else {}), "singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def state_of(run: Any, metadata: dict[str, Any], *, is_loading: bool = False) -> dict[str, Any]:
    """generate_state_dict, as far as it is sharded."""
    from megatron.core import parallel_state

    from megatron_ptrl.training.mcore import unwrap
    from megatron_ptrl.training.optimizer import fill_adam_state

    metadata = {**metadata, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    fill_adam_state(run.optimizer)
    (chunk,) = run.chunks
    state = {"model": unwrap(chunk).sharded_state_dict(metadata=metadata)}
    state["optimizer"] = run.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def save(run: Any, folder: Path, args: Namespace, sharding: str | None) -> None:
    """save_checkpoint with --ckpt-format torch_dist."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    tp, tps = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    path = folder / f"iter_{run.progress.step:07d}"
    path.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    args.iteration, args.consumed_train_samples = run.progress.step, run.progress.consumed_samples
    metadata = content_metadata(sharding)
    random_state = [{"torch_rng_state": torch.get_rng_state()}]
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": run.progress.step,
        "num_floating_point_operations_so_far": 0,
        **state_of(run, metadata),
        "opt_param_scheduler": run.scheduler.state_dict(),
        "rng_state": ShardedObject("rng_state", random_state, (1, tps), (0, tp), replica_id=0),
    }
    dist_checkpointing.save(state, str(path), content_metadata=metadata)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(run.progress.step))


def load(run: Any, folder: Path) -> dict[str, Any]:
    """load_checkpoint into a run; returns what is not sharded."""
    from megatron.core import dist_checkpointing
    from megatron.core.safe_globals import register_safe_globals

    from megatron_ptrl.training.mcore import unwrap
    from megatron_ptrl.training.optimizer import load_optimizer

    register_safe_globals()
    path = folder / f"iter_{int((folder / 'latest_checkpointed_iteration.txt').read_text()):07d}"
    common = dist_checkpointing.load_common_state_dict(str(path))
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    assert common["checkpoint_version"] == 3.0 and common["args"].no_save_rng
    state = dist_checkpointing.load(state_of(run, metadata, is_loading=True), str(path))
    (chunk,) = run.chunks
    unwrap(chunk).load_state_dict(state["model"], strict=True)
    # As Megatron-LM's optimizer.load_state_dict, which torch's Adam needs a repair for.
    load_optimizer(run.optimizer, state["optimizer"])
    run.scheduler.load_state_dict(state["opt_param_scheduler"])
    return common
