// The launches of csrc/remit_weights_kernels.cuh under the emulation, for ctypes. Blocks are small, so that few tokens
// take several.
#include "device.h"

#include <string>

#include "remit_weights_kernels.cuh"

using namespace ptrl;

namespace {

constexpr int kThreads = 64;

// What went wrong, or null.
template <class Launch>
const char* run(const Launch& launch) {
  static std::string message;
  try {
    launch();
    return nullptr;
  } catch (const std::runtime_error& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" {

void seed(unsigned value) { emulation::chance.seed(value); }

const char* gap_sums(const float* logprob, const float* reference_logprob, const bool* keep, const int64_t* segment,
                     int64_t rows, int64_t columns, int64_t segments, void* scratch, double* sums) {
  const RemitTokens tokens{logprob, reference_logprob, keep, segment, rows, columns, segments};
  return run([&] { launch_gap_sums<kThreads>(tokens, static_cast<GapSum*>(scratch), sums, Stream{}); });
}

const char* weights(const float* logprob, const float* reference_logprob, const bool* keep, const int64_t* segment,
                    int64_t rows, int64_t columns, int64_t segments, const double* sums, double epsilon, float* out) {
  const RemitTokens tokens{logprob, reference_logprob, keep, segment, rows, columns, segments};
  return run([&] { launch_weights<kThreads>(tokens, sums, epsilon, out, Stream{}); });
}
}
