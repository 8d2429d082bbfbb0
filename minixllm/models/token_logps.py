"""Log-probabilities of labels, without ever holding the logits (N, V) whole."""

import torch

# A chunk of logits takes CHUNK_BYTES, by kind of device, but holds at least CHUNK_TOKENS tokens: on a GPU a product for
# fewer tokens takes as long, because reading the weights is what takes the time.
CHUNK_BYTES, CHUNK_TOKENS = {"cpu": 2**24, "cuda": 2**28}, 128
BLOCK_BYTES = 2**22  # on a CPU a chunk is handled in blocks of this size, which fit its caches


def token_logps(hidden, weight, labels) -> torch.Tensor:
    """Log-probabilities of the labels: hidden (N, d), weight (V, d), labels (N,) -> (N,) fp32, 0 where a label is -100.

    labels[i] is the token to predict from hidden[i]. The logits are hidden weight^T. They are made a chunk of tokens at
    a time, and only for tokens that have a label. `weight` may have another type than `hidden` (fp32 beside bf16): the
    product is computed in hidden's type, the gradient has the weight's type.

    The forward also computes the gradients of the plain sum of all log-probabilities, while a chunk's logits are at
    hand. The backward only scales them by the gradient that arrives: each row of hidden's gradient by its own token's,
    and the whole of weight's gradient by one number, if all tokens get the same (as with any loss that sums over
    tokens). If they do not, weight's gradient is computed in a second pass over the chunks.
    """
    return _TokenLogps.apply(hidden, weight, labels, torch.is_grad_enabled())


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, grad_enabled):
        wants_hidden, wants_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        rows = (labels != -100).nonzero().squeeze(1)
        ctx.tokens, hidden, labels = len(hidden), hidden[rows], labels[rows]  # (M, d), (M,)
        logps = torch.empty(len(rows), dtype=torch.float32, device=labels.device)
        grad_hidden, grad_weight = torch.empty_like(hidden) if wants_hidden else None, None
        computed_with = weight.to(hidden.dtype)
        for chunk, chunk_logps, grad_logits, totals in _chunks(hidden, computed_with, labels):
            logps[chunk] = chunk_logps
            if wants_hidden:
                grad_hidden[chunk] = (grad_logits @ computed_with).div_(totals)
            if wants_weight:
                grad_weight = _add_product(grad_weight, grad_logits, hidden[chunk] / totals)
        ctx.save_for_backward(rows, labels, hidden, weight, grad_hidden, grad_weight)
        return torch.zeros(ctx.tokens, dtype=torch.float32, device=labels.device).index_copy_(0, rows, logps)

    @staticmethod
    def backward(ctx, grad_logps):
        rows, labels, hidden, weight, grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_logps[rows, None]  # (M, 1)
        if grad_hidden is not None:
            scaled = (grad_hidden * scale).to(grad_hidden.dtype)
            grad_hidden = scaled.new_zeros(ctx.tokens, scaled.shape[1]).index_copy_(0, rows, scaled)
        if not ctx.needs_input_grad[1]:
            return grad_hidden, None, None, None
        if not len(rows):
            grad_weight = torch.zeros_like(weight)
        elif bool((scale == scale[0]).all()):
            grad_weight.mul_(scale[0])  # in place, because it is as large as the weight: a second backward is an error
        else:
            grad_weight = None
            for chunk, _, grad_logits, totals in _chunks(hidden, weight.to(hidden.dtype), labels):
                grad_weight = _add_product(grad_weight, grad_logits, hidden[chunk] * scale[chunk] / totals)
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _chunks(hidden, weight, labels):
    """Yields (slice, logps (chunk,), grad_logits (chunk, V), totals (chunk, 1)) for one chunk of tokens after another.

    grad_logits / totals is the gradient of logps. The caller divides by totals, because it can divide the d columns of
    a product instead of the V columns of grad_logits. `hidden` and `weight` have one type.
    """
    size = max(CHUNK_TOKENS, CHUNK_BYTES[weight.device.type] // (weight.element_size() * len(weight)))
    size -= size % 64 if size > 64 else 0  # products of 256 rows are a fifth faster than of 262
    # One buffer for all chunks: new memory for each would cost a third of the product's time in page faults.
    buffer = torch.empty(min(size, len(hidden)), len(weight), dtype=weight.dtype, device=weight.device)
    for start in range(0, len(hidden), size):
        chunk = slice(start, min(start + size, len(hidden)))
        logits = torch.mm(hidden[chunk], weight.T, out=buffer[:chunk.stop - start])
        parts = [_to_gradients(*part) for part in zip(_blocks(logits), labels[chunk].split(_block_rows(logits)))]
        logps, totals = (torch.cat(column) for column in zip(*parts))
        yield chunk, logps, logits, totals


def _to_gradients(logits, labels):
    """Cross-entropy and its gradient: log p = logit of the label - log(sum(exp(logits))), and
    d log p / d logits = onehot(label) - softmax(logits).

    With e = exp(logits - their maximum), totals = sum(e): logits (n, V) become totals onehot(label) - e, in place,
    which is the gradient times totals. Returns logps (n,) and totals (n, 1), both fp32.
    """
    label = labels[:, None]
    exact = logits.float()
    exact -= exact.amax(dim=-1, keepdim=True)
    chosen = exact.gather(1, label)
    totals = exact.exp_().sum(dim=-1, keepdim=True)
    logits.copy_(exact.neg_().scatter_add_(1, label, totals))
    return (chosen - totals.log()).squeeze(1), totals


def _add_product(grad, grad_logits, hidden):
    """grad (V, d) fp32, or None at first, + grad_logits (chunk, V)^T hidden (chunk, d).

    A bf16 product is added to fp32 a block at a time: the whole would have to be written to memory and read again.
    """
    hidden = hidden.to(grad_logits.dtype)
    if grad is None:
        grad = hidden.new_zeros(grad_logits.shape[1], hidden.shape[1], dtype=torch.float32)
    if grad.dtype == grad_logits.dtype:
        return grad.addmm_(grad_logits.T, hidden)
    for rows, part in zip(_blocks(grad), grad_logits.split(_block_rows(grad), dim=1)):
        rows += part.T @ hidden  # summed in fp32: in bf16 many small terms would be lost
    return grad


def _blocks(matrix):
    return matrix.split(_block_rows(matrix))


def _block_rows(matrix) -> int:
    """How many rows of an fp32 matrix of this width make a block: on a CPU as many as its caches hold."""
    return max(1, BLOCK_BYTES // (4 * matrix.shape[1])) if matrix.is_cpu else len(matrix)
