// Memory for a gradient of many megabytes, on CPUs.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace ptrl {

// An uninitialised tensor like `like`. The memory of the last such tensor that was freed is kept for the next of its
// size, one block at most: a system that hands out and takes back tens of megabytes at every step clears them each
// time, which takes longer than the gradient.
torch::stable::Tensor empty_in_kept_memory(const torch::stable::Tensor& like);

}  // namespace ptrl
