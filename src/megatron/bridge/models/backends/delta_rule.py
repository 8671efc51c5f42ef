"""The gated delta rule and its causal convolution, over sequences laid end to end.

Every function takes `lengths`: tokens are the first axis, and sequence i is the `lengths[i]` tokens
that follow those of the sequences before it. A dense batch [b, s] is `[s] * b`, a packed one has
lengths of its own. Nothing leaks over a border. All index operations have unique indexes, so
values and gradients are the same in every run.

Shapes: t tokens, n key heads, r value heads per key head, k and v the sizes of a key and a value.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_SIZE = 64
L2_EPS = 1e-6


def causal_conv(x: Tensor, weight: Tensor, lengths: Sequence[int]) -> Tensor:
    """Depthwise convolution: a token sees itself and the `kernel - 1` before it in its sequence.

    Args:
        x: [t, channels].
        weight: [channels, 1, kernel], in the dtype of `x`; the last tap is the token itself.
        lengths: tokens of each sequence.

    Returns:
        [t, channels], without an activation.
    """
    gap = weight.shape[-1] - 1
    if len(lengths) == 1:
        convolved = F.conv1d(x.t().unsqueeze(0), weight, padding=gap, groups=x.shape[1])
        return convolved.squeeze(0)[:, : x.shape[0]].t()
    # In front of every sequence `gap` zeros, so that one convolution does them all.
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    result_at = (torch.arange(x.shape[0]) + gap * sequence).to(x.device)
    spaced = x.new_zeros(x.shape[0] + gap * len(lengths), x.shape[1])
    spaced = spaced.index_copy(0, result_at + gap, x)
    convolved = F.conv1d(spaced.t().unsqueeze(0), weight, groups=x.shape[1])
    return convolved.squeeze(0).t().index_select(0, result_at)


def l2_normalize(x: Tensor) -> Tensor:
    """x / sqrt(sum of squares + 1e-6) over the last axis, fp32."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    lengths: Sequence[int],
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Read a memory S [k, v] per value head, which starts as zero and is written token by token.

        S <- exp(g) S;  S <- S + key (value - S^T key)^T beta;  output = S^T query / sqrt(k)

    with query and key l2-normalized. Computed in fp32, a chunk at a time: inside of a chunk the
    writes are the solution of a triangular system (the WY form of "Parallelizing Linear
    Transformers with the Delta Rule over Sequence Length", Yang et al. 2024, with the decay of
    "Gated Delta Networks", Yang et al. 2024).

    Args:
        query: [t, n, k].
        key: [t, n, k].
        value: [t, n * r, v]; value heads i * r ... i * r + r - 1 share key head i.
        g: [t, n * r], logarithm of the decay, at most 0.
        beta: [t, n * r], strength of the write, in [0, 1].
        lengths: tokens of each sequence.
        chunk_size: tokens of a chunk; changes the rounding only.

    Returns:
        [t, n * r, v] in the dtype of `value`.
    """
    slots, active = _chunk_slots(lengths, chunk_size)
    slots = slots.to(value.device)
    padding = sum(active) * chunk_size - value.shape[0]
    in_order = len(lengths) == 1  # the chunks of one sequence are as it is
    key_heads, repeats = key.shape[1], value.shape[1] // key.shape[1]

    def chunked(x: Tensor) -> Tensor:
        """[t, heads, d] -> fp32 [chunks, n, 1 or r, chunk_size, d], zeros behind a sequence."""
        if in_order:
            filled = F.pad(x.float(), (0, 0, 0, 0, 0, padding))
        else:
            empty = x.new_zeros(sum(active) * chunk_size, *x.shape[1:], dtype=torch.float32)
            filled = empty.index_copy(0, slots, x.float())
        return filled.view(-1, chunk_size, key_heads, x.shape[1] // key_heads, x.shape[2]).permute(
            0, 2, 3, 1, 4
        )

    queries = chunked(l2_normalize(query) * query.shape[-1] ** -0.5)
    keys = chunked(l2_normalize(key))
    values, betas = chunked(value), chunked(beta.unsqueeze(-1))
    gs = chunked(g.unsqueeze(-1))

    # decay[i, j] is what happens to the write of token j until token i reads it. Its logarithm is
    # summed term by term: a difference of cumulative sums cancels where one token forgets a lot.
    ones = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=value.device)
    between = gs.masked_fill(~ones.tril(-1), 0.0).cumsum(-2)
    decay = between.masked_fill(~ones.tril(), float("-inf")).exp()
    since_start = gs.cumsum(-2).exp()
    until_end = decay[..., -1, :].unsqueeze(-1)

    # Every write subtracts what the memory holds already: that of the chunks before (`reads_old`)
    # and of the tokens before in this chunk, which is the triangular system.
    system = keys @ keys.transpose(-1, -2) * decay * betas
    right = torch.cat([values * betas, keys * (betas * since_start)], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    writes, reads_old = solved.split([value.shape[-1], key.shape[-1]], dim=-1)

    from_memory = queries * since_start
    from_chunk = queries @ keys.transpose(-1, -2) * decay
    to_memory = (keys * until_end).transpose(-1, -2)
    kept = since_start[..., -1:, :]

    memory = writes.new_zeros(active[0], key_heads, repeats, key.shape[-1], value.shape[-1])
    outputs = []
    by_step = (x.split(active) for x in (writes, reads_old, from_memory, from_chunk, to_memory))
    for keep, write, read_old, memory_part, chunk_part, store in zip(
        kept.split(active), *by_step, strict=True
    ):
        memory = memory[: len(keep)]  # shorter sequences have ended
        change = write - read_old @ memory
        outputs.append(memory_part @ memory + chunk_part @ change)
        memory = memory * keep + store @ change

    output = torch.cat(outputs).permute(0, 3, 1, 2, 4).reshape(-1, *value.shape[1:])
    if in_order:
        return output[: value.shape[0]].to(value.dtype)
    return output.index_select(0, slots).to(value.dtype)


def _chunk_slots(lengths: Sequence[int], chunk_size: int) -> tuple[Tensor, list[int]]:
    """Where each token goes when the sequences are cut into chunks.

    Chunks are ordered by their place in the sequence, and within one place longer sequences come
    first: those that still run are then the first ones at every step.

    Returns:
        slots: int64 [t], index into chunks x chunk_size, on the CPU.
        active: for each step, how many sequences have a chunk there; never increases.
    """
    per_sequence = torch.tensor(lengths)
    chunks = (per_sequence + chunk_size - 1) // chunk_size
    rank = torch.empty_like(chunks)
    rank[chunks.argsort(descending=True, stable=True)] = torch.arange(len(lengths))

    active = (chunks > torch.arange(int(chunks.max())).unsqueeze(1)).sum(1)
    first_of_step = active.cumsum(0) - active
    sequence = torch.arange(len(lengths)).repeat_interleave(per_sequence)
    starts = per_sequence.cumsum(0) - per_sequence
    position = torch.arange(len(sequence)) - starts[sequence]
    chunk = first_of_step[position // chunk_size] + rank[sequence]
    return chunk * chunk_size + position % chunk_size, active.tolist()
