// Every operator this library adds to PyTorch, and nothing else. None of them communicates.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(megatron_ptrl, m) {
  // What one vocabulary shard (columns vocab_start ..) knows of each row: the columns of ptrl::Number, and its top_k
  // largest logits among the first `ranked` columns, -inf where there are fewer. Rows of ignore_index are skipped.
  m.def(
      "reward_shaped_ce_stats(Tensor logits, Tensor target, int vocab_start, int ranked, int top_k, bool entropy, "
      "int? ignore_index) -> (Tensor numbers, Tensor keys)");
  // Joins the shards' knowledge, (shards, rows, ...), into each row's loss, the columns of ptrl::Coefficient and the
  // rows of ptrl::Stat.
  m.def(
      "reward_shaped_ce_combine(Tensor numbers, Tensor keys, Tensor target, float beta, float lambda_head, "
      "float lambda_tail, int? ignore_index) -> (Tensor loss, Tensor coefficients, Tensor stats)");
  // This shard's gradient: grad_loss times dloss/dlogits.
  m.def(
      "reward_shaped_ce_grad(Tensor logits, Tensor target, Tensor grad_loss, Tensor coefficients, int vocab_start, "
      "int ranked) -> Tensor");
  // The same, written over the logits.
  m.def(
      "reward_shaped_ce_grad_(Tensor(a!) logits, Tensor target, Tensor grad_loss, Tensor coefficients, "
      "int vocab_start, int ranked) -> ()");
  // Loss, ptrl::Stat rows and, written over the logits, grad_loss times dloss/dlogits, in one pass over whole rows.
  m.def(
      "reward_shaped_ce_one_pass_(Tensor(a!) logits, Tensor target, Tensor grad_loss, int ranked, int top_k, bool "
      "entropy, "
      "float beta, float lambda_head, float lambda_tail, int? ignore_index) -> (Tensor loss, Tensor stats)");
  // ReMiT: over the kept tokens of each segment, the sum of reference_logprob - logprob and how many there are, (2,
  // segments) in fp64. A segment lies within one row; without `segment` it is the row.
  m.def(
      "remit_gap_sums(Tensor logprob, Tensor reference_logprob, Tensor keep, Tensor? segment, int segments) -> "
      "Tensor sums");
  // The weights that follow from those sums: clip(2 sigmoid(gap - mean gap), 1 - epsilon, 1 + epsilon), 0 if not kept.
  m.def(
      "remit_weights(Tensor logprob, Tensor reference_logprob, Tensor keep, Tensor? segment, Tensor sums, "
      "float epsilon) -> Tensor weights");
  // Generation, on CPUs: x W^T for a few rows.
  m.def("few_rows_linear(Tensor x, Tensor weight) -> Tensor");
  // One new token for each row and what its slot holds, keys and values (slots, groups, room, d), which its key and
  // value join at its position: (rows, heads * d). Query and key are turned by cos and sin, (rows, d), first.
  m.def(
      "decode_attention(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, bool interleaved, float "
      "scale, Tensor positions, Tensor(a!) keys, Tensor(b!) values) -> Tensor");
  // One of the first `tokens` columns of each row of logits, and its log-probability in fp64; what is below `lowest`
  // has no probability.
  m.def(
      "draw(Tensor logits, Tensor temperature, Tensor uniform, Tensor lowest) -> (Tensor token, Tensor "
      "logprob)");
}
