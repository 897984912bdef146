# What every rank's process should find in its environment; sourced by torchrun.sh. What is already set stays.

# Megatron overlaps communication with matrix products by the order in which it launches kernels; one hardware queue
# keeps that order. Tensor and context parallelism need it.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Threads of a rank for work on the CPU. torchrun would say 1; more than cores / ranks makes ranks wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"

# Activations of many sizes (packed responses, variable prompts) leave holes that the allocator cannot use otherwise.
# The first name is that of torch before 2.9, the second the one since.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-$PYTORCH_CUDA_ALLOC_CONF}"

# A collective that fails or waits beyond its limit ends its rank, so that torchrun sees it and starts all again, instead
# of a job that hangs until its time is over.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# A store of its own for every start of the ranks. In the one that torchrun would share, those of a second start find the
# addresses of the first where nodes count restarts differently (pytorch/pytorch#135712): they never meet.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

# What each rank was doing when a collective waited too long; costs some KB.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

# NCCL's errors with their reason; INFO says which network it found.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Tokenizers would start a thread for each core in every rank.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# Lines reach the logs when they are written, also those before a crash.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"

# Yours to set where nodes have several networks: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (the interface for start-up
# and for CPU tensors), NCCL_IB_HCA (the InfiniBand cards). Secrets (OPENAI_API_KEY) are read from the environment too,
# and never written anywhere.
