"""Log-probabilities of labels, without ever holding the logits (N, V) whole."""

import torch

# How many logits are held at once: CHUNK_BYTES of them, by kind of device, but those of CHUNK_TOKENS tokens at least,
# for on a GPU a product of a few tokens takes as long as reading the weights.
CHUNK_BYTES, CHUNK_TOKENS = {"cpu": 2**24, "cuda": 2**28}, 128
BLOCK_BYTES = 2**22  # on a CPU a chunk is handled in blocks of this size, which its caches hold


def token_logps(hidden, weight, labels, *adapter) -> torch.Tensor:
    """Log-probabilities of the labels: hidden (N, d), weight (V, d), labels (N,) -> (N,) fp32, 0 where a label is -100.

    labels[i] is the token that hidden[i] predicts. adapter: of an adapted head, low (N, r) and low_weight (V, r), which
    add low low_weight^T to the logits hidden weight^T (see `lora.low_rank`). The logits are never held whole: they are
    made a chunk of tokens at a time, and only for tokens that have a label. `weight` may be of another type than
    `hidden` (fp32 beside bf16): the product is computed in hidden's type, the gradient is of the weight's own.

    The forward also computes the gradients of the plain sum of all log-probabilities, while a chunk's logits are at
    hand. The backward only scales them by the gradient that arrives: of `hidden` each token's row by that token's, and
    of `weight` all of it, if the same arrives for every token (as for any loss that sums over tokens). If not, the
    gradient of `weight` is computed in a second pass over the chunks.
    """
    return _TokenLogps.apply(labels, torch.is_grad_enabled(), hidden, weight, *adapter)


class _TokenLogps(torch.autograd.Function):
    """factors: hidden, weight and, of an adapted head, low, low_weight: the logits are the sum of the two products."""

    @staticmethod
    def forward(ctx, labels, grad_enabled, *factors):
        wanted = [grad_enabled and needed for needed in ctx.needs_input_grad[2:]]
        rows = (labels != -100).nonzero().squeeze(1)
        labels = labels[rows]  # (M,)
        hiddens, weights = [hidden[rows] for hidden in factors[::2]], factors[1::2]  # (M, d), (V, d)
        logps = torch.empty(len(rows), dtype=torch.float32, device=labels.device)
        grad_hiddens = [torch.empty_like(hidden) if wants else None for hidden, wants in zip(hiddens, wanted[::2])]
        grad_weights = [None for _ in weights]
        computed_with = [weight.to(hidden.dtype) for hidden, weight in zip(hiddens, weights)]
        for chunk, chunk_logps, slopes, totals in _chunks(hiddens, computed_with, labels):
            logps[chunk] = chunk_logps
            for i, (hidden, weight) in enumerate(zip(hiddens, computed_with)):
                if wanted[2 * i]:
                    grad_hiddens[i][chunk] = (slopes @ weight).div_(totals)
                if wanted[2 * i + 1]:
                    grad_weights[i] = _add_product(grad_weights[i], slopes, hidden[chunk] / totals)
        ctx.save_for_backward(rows, labels, *hiddens, *weights, *grad_hiddens, *grad_weights)
        ctx.tokens = len(factors[0])
        return torch.zeros(ctx.tokens, dtype=torch.float32, device=labels.device).index_copy_(0, rows, logps)

    @staticmethod
    def backward(ctx, grad_logps):
        rows, labels, *saved = ctx.saved_tensors
        count = len(saved) // 4
        hiddens, weights, grad_hiddens, grad_weights = (saved[i:i + count] for i in range(0, len(saved), count))
        wants_weight = ctx.needs_input_grad[3::2]
        scale = grad_logps[rows, None]  # (M, 1)
        for i, grad in enumerate(grad_hiddens):
            if grad is not None:
                scaled = (grad * scale).to(grad.dtype)
                grad_hiddens[i] = scaled.new_zeros(ctx.tokens, grad.shape[1]).index_copy_(0, rows, scaled)
        if not len(rows):
            grad_weights = [torch.zeros_like(weight) if wants else None for weight, wants in zip(weights, wants_weight)]
        elif any(wants_weight) and bool((scale == scale[0]).all()):
            for grad in grad_weights:
                if grad is not None:
                    grad.mul_(scale[0])  # in place, as it is as large as its weight: a second backward is an error
        elif any(wants_weight):
            grad_weights = [None for _ in weights]
            computed_with = [weight.to(hidden.dtype) for hidden, weight in zip(hiddens, weights)]
            for chunk, _, slopes, totals in _chunks(hiddens, computed_with, labels):
                for i in (i for i, wants in enumerate(wants_weight) if wants):
                    grad_weights[i] = _add_product(grad_weights[i], slopes, hiddens[i][chunk] * scale[chunk] / totals)
        grad_weights = [grad.to(weight.dtype) if wants else None
                        for grad, weight, wants in zip(grad_weights, weights, wants_weight)]
        return None, None, *(grad for pair in zip(grad_hiddens, grad_weights) for grad in pair)


def _chunks(hiddens, weights, labels):
    """Yields (slice, logps (chunk,), slopes (chunk, V), totals (chunk, 1)) of the logits sum(hidden weight^T).

    d logp / d logits = onehot(label) - softmax(logits) = slopes / totals. The division is left to the caller, who can
    divide the d columns of a product and not the V of slopes. All hiddens and weights are of one type.
    """
    (hidden, weight), *adapter = zip(hiddens, weights)
    size = max(CHUNK_TOKENS, CHUNK_BYTES[weight.device.type] // (weight.element_size() * len(weight)))
    size -= size % 64 if size > 64 else 0  # products of 256 rows are a fifth faster than of 262
    # one buffer for all chunks: fresh memory for each would cost as much as a third of its product in page faults
    buffer = torch.empty(min(size, len(hidden)), len(weight), dtype=weight.dtype, device=weight.device)
    for start in range(0, len(hidden), size):
        chunk = slice(start, min(start + size, len(hidden)))
        logits = torch.mm(hidden[chunk], weight.T, out=buffer[:chunk.stop - start])
        for low, low_weight in adapter:
            logits.addmm_(low[chunk], low_weight.T)
        parts = [_to_slopes(*part) for part in zip(_blocks(logits), labels[chunk].split(_block_rows(logits)))]
        logps, totals = (torch.cat(column) for column in zip(*parts))
        yield chunk, logps, logits, totals


def _to_slopes(logits, labels):
    """Turns logits (n, V) into slopes, in place. Returns logps (n,) and totals (n, 1), fp32.

    With e = exp(logits - their maximum): totals = sum(e), slopes = totals onehot(label) - e.
    """
    label = labels[:, None]
    exact = logits.float()
    exact -= exact.amax(dim=-1, keepdim=True)
    chosen = exact.gather(1, label)
    totals = exact.exp_().sum(dim=-1, keepdim=True)
    logits.copy_(exact.neg_().scatter_add_(1, label, totals))
    return (chosen - totals.log()).squeeze(1), totals


def _add_product(grad, slopes, hidden):
    """grad (V, d) fp32, or None, + slopes (chunk, V)^T hidden (chunk, d).

    A product in bf16 is converted a block at a time: whole, it would be read from memory and written to it once more.
    """
    hidden = hidden.to(slopes.dtype)
    if grad is None:
        grad = hidden.new_zeros(slopes.shape[1], hidden.shape[1], dtype=torch.float32)
    if grad.dtype == slopes.dtype:
        return grad.addmm_(slopes.T, hidden)
    for rows, part in zip(_blocks(grad), slopes.split(_block_rows(grad), dim=1)):
        rows += part.T @ hidden  # bf16 would lose what many chunks add
    return grad


def _blocks(matrix):
    return matrix.split(_block_rows(matrix))


def _block_rows(matrix) -> int:
    """How many rows of an fp32 matrix of this width are handled at a time: on a CPU so many as its caches hold."""
    return max(1, BLOCK_BYTES // (4 * matrix.shape[1])) if matrix.is_cpu else len(matrix)
