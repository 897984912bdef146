#include "kept_memory.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace ptrl {
namespace {

using torch::stable::Tensor;

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kSmallest = 8 * kHugePage;  // below this the system's allocator keeps memory by itself

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
};

class Keeper {
 public:
  Block take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (kept_.bytes == bytes) return std::exchange(kept_, {});
    }
    keep({});  // of another size: the two need not be there at once
    Block block{std::aligned_alloc(kHugePage, bytes), bytes};
    STD_TORCH_CHECK(block.data != nullptr, "no memory for a gradient of ", bytes, " bytes");
#ifdef __linux__
    madvise(block.data, bytes, MADV_HUGEPAGE);  // a wish: may fail
#endif
    return block;
  }

  void keep(Block block) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      std::swap(kept_, block);
    }
    std::free(block.data);
  }

 private:
  std::mutex mutex_;
  Block kept_;
};

// Never destroyed: tensors may be freed later than static objects.
Keeper& keeper() {
  static Keeper& one = *new Keeper;
  return one;
}

}  // namespace

Tensor empty_in_kept_memory(const Tensor& like) {
  const size_t bytes = like.numel() * like.element_size();
  if (bytes < kSmallest || !like.is_contiguous()) return torch::stable::empty_like(like);
  const size_t pages = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  const Block block = keeper().take(pages);
  return torch::stable::from_blob(block.data, like.sizes(), like.strides(), like.device(), like.scalar_type(),
                                  [pages](void* data) { keeper().keep({data, pages}); });
}

}  // namespace ptrl
