"""Softmax mixture of maps with separate weights for each position.

Plain PyTorch code passes over the maps for scores, weights, sum and each of their
gradients. On a CPU, the code here does all of this for one piece of the maps at a time,
small enough for the caches.
"""

from typing import Any, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .layer_weighted_sum import needs_plain_code

# Number of elements in a piece of a map
PIECE = 2**18
# RMSNorm adds this to the mean square
EPS = 1e-6

At = Tuple[slice, slice]


def depth_mixture(
    x: Tensor,
    contained: Tensor,
    query: Tensor,
    norms: Tensor,
    values: Sequence[Tensor],
    factor: float = 1.0,
    backend: str = 'auto',
    chained: bool = False,
) -> Tuple[Tensor, Tensor, Tensor, List[Tensor]]:
    r"""Change the weights of tokens in a map to those that a query gives.

    With :math:`s_i = (q \cdot v_i) r_i` and :math:`a = f\,\mathrm{softmax}(s)` at each
    position and head, computes :math:`x + \sum_i (a_i - c_i) v_i`, in at least single
    precision.

    Args:
        x (Tensor): The map :math:`x`, (B, C, H, W).
        contained (Tensor): Weights :math:`c` of the tokens in ``x``, (t, B, G, H, W).
        query (Tensor): :math:`q`, (C,).
        norms (Tensor): :math:`r`, (t, B, 1, H, W), in the data type of ``contained``,
            at least single precision.
        values (Sequence[Tensor]): ``t`` tokens :math:`v_i`, (B, C, H, W) each. An
            additional value is the part of the last token that is in ``x`` at weight 1
            instead of :math:`c`.
        factor (float): :math:`f`. Defaults to 1.
        backend (str): ``'reference'`` forces plain PyTorch code, which also runs on
            devices other than a CPU and when a graph is recorded. Defaults to
            ``'auto'``.
        chained (bool): Return the tokens as outputs of this mixture, so that all
            mixtures of a token add to the same gradient in place. Only set this if
            nothing else uses the gradients of the tokens. Defaults to False.

    Returns:
        tuple[Tensor, Tensor, Tensor, list[Tensor]]: The map, (B, C, H, W), in the data
        type of ``x``; the scores, which only have a gradient in plain code; the
        weights; and the tokens for the next mixture. Scores and weights are
        (t, B, G, H, W).
    """
    if backend == 'reference' or not _by_pieces(x):
        out, scores, weights = reference(x, contained, query, norms, factor, *values)
        return out, scores, weights, list(values[: len(norms)])
    out, scores, weights, *tokens = _Mixture.apply(
        x, contained, query, norms, factor, chained, *values
    )
    return out, scores, weights, list(tokens or values)[: len(norms)]


def added_since(
    x: Tensor, before: Optional[Tensor], backend: str = 'auto'
) -> Tuple[Tensor, Tensor]:
    """Compute the difference of two maps and its inverse RMS over the channels.

    Args:
        x (Tensor): The map, (B, C, H, W).
        before (Tensor, optional): The map before, (B, C, H, W); None for zeros.
        backend (str): See :func:`depth_mixture`. Defaults to ``'auto'``.

    Returns:
        tuple[Tensor, Tensor]: The difference, (B, C, H, W), which shares no memory
        with ``x``, and its inverse root mean square, (B, 1, H, W), in at least single
        precision.
    """
    if backend != 'reference' and _by_pieces(x):
        return _Added.apply(x, before)
    added = x.clone() if before is None else x - before
    return added, inverse_rms(added)


def inverse_rms(x: Tensor) -> Tensor:
    """Compute the inverse root mean square over the channels.

    Args:
        x (Tensor): (B, C, h, w).

    Returns:
        Tensor: (B, 1, h, w), in at least single precision.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)
    return (norm.square() / x.shape[1] + EPS).rsqrt()


def _by_pieces(x: Tensor) -> bool:
    """Whether to process a map in pieces."""
    return x.device.type == 'cpu' and not needs_plain_code()


def reference(
    x: Tensor,
    contained: Tensor,
    query: Tensor,
    norms: Tensor,
    factor: float,
    *values: Tensor,
) -> Tuple[Tensor, Tensor, Tensor]:
    """:func:`depth_mixture` in plain PyTorch code."""
    scores = depth_scores(query, norms, values, contained.shape[2])
    weights = scores.softmax(0) * factor
    changes = changes_of(weights, contained, values)
    return add_scaled(x, changes, values), scores, weights


def depth_scores(
    query: Tensor, norms: Tensor, keys: Sequence[Tensor], heads: int
) -> Tensor:
    """Multiply a query with keys.

    Args:
        query (Tensor): (C,).
        norms (Tensor): Factor of each product, (t, B, 1, h, w).
        keys (Sequence[Tensor]): At least ``t`` keys, (B, C, h, w) each.
        heads (int): Number of heads ``G``.

    Returns:
        Tensor: (t, B, G, h, w), in the data type of ``norms``.
    """
    query = query.to(norms.dtype)[:, None, None]
    # Not a matmul, which autocast would compute in half precision
    keys = keys[: len(norms)]
    products = [by_head(k * query, heads).sum(2) for k in keys]
    return torch.stack(products) * norms


def changes_of(weights: Tensor, contained: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Weights with which :func:`depth_mixture` adds each value.

    Args:
        weights (Tensor): New weights of ``t`` tokens, (t, B, G, h, w).
        contained (Tensor): Weights of the tokens in the map, (t, B, G, h, w).
        values (Sequence[Tensor]): The values of :func:`depth_mixture`.

    Returns:
        Tensor: One weight for each value, (t, B, G, h, w) or (t + 1, B, G, h, w).
    """
    changes = weights - contained
    if len(values) > len(weights):
        changes = torch.cat([changes, contained[-1:] - 1])
    return changes


def add_scaled(
    x: Optional[Tensor], weights: Tensor, values: Sequence[Tensor]
) -> Tensor:
    """Add a weighted sum of maps to a map.

    Args:
        x (Tensor, optional): (B, C, H, W); None for zeros.
        weights (Tensor): (t, B, G, h, w), where h and w may be 1.
        values (Sequence[Tensor]): ``t`` maps, (B, C, H, W) each.

    Returns:
        Tensor: (B, C, H, W), in the data type of ``x``, or else of the values.
    """
    total: Any = x
    for weight, value in zip(weights.unbind(), values):
        product = weight.unsqueeze(2) * by_head(value, weight.shape[1])
        total = (
            product.flatten(1, 2) if total is None else total + product.flatten(1, 2)
        )
    return total.to((values[0] if x is None else x).dtype)


def by_head(x: Tensor, heads: int) -> Tensor:
    """(B, C, ...) to (B, G, d, ...)."""
    return x.unflatten(1, (heads, x.shape[1] // heads))


class _Added(torch.autograd.Function):
    """``x - before`` and its :func:`inverse_rms`."""

    @staticmethod
    def forward(ctx, x, before):
        added = torch.empty_like(x, memory_format=_layout(x))
        if before is None:
            added.copy_(x)
        else:
            torch.sub(x, before, out=added)
        norms = inverse_rms(added)
        ctx.save_for_backward(added, norms)
        ctx.of_two = before is not None
        return added, norms

    @staticmethod
    def backward(ctx, grad, grad_norms):
        added, norms = ctx.saved_tensors
        # d r / d v = - r^3 v / C
        of_norms = grad_norms * norms**3 / -added.shape[1]
        if torch.is_grad_enabled() or of_norms.dtype != added.dtype:
            # Half precision could not hold r^3 of a token close to 0
            grad = (grad + of_norms * added).to(added.dtype)
        else:
            grad = torch.addcmul(grad, of_norms, added)
        return grad, -grad if ctx.of_two else None


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, contained, query, norms, factor, chained, *values):
        wide, count, heads = norms.dtype, len(norms), contained.shape[2]
        out = torch.empty_like(x, memory_format=_layout(x))
        scores = torch.empty_like(contained, memory_format=torch.contiguous_format)
        weights = torch.empty_like(scores)
        rows = _rows_by_head(query.to(wide), heads)
        with torch.autocast('cpu', enabled=False):
            for at in _pieces(x):
                parts = [_cut(v, at).to(wide) for v in values]
                s = torch.stack([_project(rows, v) for v in parts[:count]])
                s *= _cut(norms, at)
                w = s.softmax(0).mul_(factor)
                piece = _cut(out, at)
                total = _room(piece, wide).copy_(_cut(x, at))
                for change, v in zip(changes_of(w, _cut(contained, at), values), parts):
                    _add_product(total, change, v)
                piece.copy_(total)
                for whole, part in ((scores, s), (weights, w)):
                    _cut(whole, at).copy_(part)
        ctx.save_for_backward(contained, query, norms, scores, weights, *values)
        ctx.factor, ctx.dtype, ctx.layout = factor, x.dtype, _layout(x)
        ctx.set_materialize_grads(False)
        tokens = values if chained else ()
        constant = [v for v in tokens if not v.requires_grad]
        ctx.mark_non_differentiable(scores, *constant)
        return (out, scores, weights, *tokens)

    @staticmethod
    def backward(ctx, grad, _, grad_weights, *grad_tokens):
        contained, query, norms, scores, weights, *values = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(values[0], dtype=ctx.dtype)
        if grad_weights is None:
            grad_weights = torch.zeros_like(weights)
        if torch.is_grad_enabled():  # for a second derivative
            # Views, as some depend on others, and only what is direct counts here
            contained, query, norms, *values = (
                t.view_as(t) for t in (contained, query, norms, *values)
            )
            # The derivatives do not depend on x
            x = torch.zeros_like(grad, requires_grad=ctx.needs_input_grad[0])
            args = x, contained, query, norms, ctx.factor, *values
            out, _, new_weights = reference(*args)
            needs = [n for i, n in enumerate(ctx.needs_input_grad) if i != 5]
            inputs = [a for a, need in zip(args, needs) if need]
            grads = iter(
                torch.autograd.grad(
                    [out, new_weights], inputs, [grad, grad_weights], create_graph=True
                )
            )
            *first, factor = [next(grads) if need else None for need in needs[:5]]
            rest = [next(grads) if need else None for need in needs[5:]]
            for i, other in enumerate(grad_tokens):
                if other is not None:
                    rest[i] = rest[i] + other
            return (*first, factor, None, *rest)
        wide, count, heads = norms.dtype, len(norms), contained.shape[2]
        rows = _rows_by_head(query.to(wide), heads)
        grad_rows = torch.zeros_like(rows)
        grad_contained, grad_norms = torch.empty_like(scores), torch.empty_like(norms)
        layout = ctx.layout
        grad = grad.contiguous(memory_format=layout)
        scratch: Optional[Tensor] = None
        # Add to gradients of later mixtures in place, because nothing else uses them
        earlier = [g is not None for g in grad_tokens] or [False] * len(values)
        grad_values = [
            grad_tokens[i].contiguous(memory_format=layout)
            if earlier[i]
            else torch.empty_like(v, memory_format=layout)
            for i, v in enumerate(values)
        ]
        with torch.autocast('cpu', enabled=False):
            for at in _pieces(grad):
                g = _cut(grad, at).to(wide)
                parts = [_cut(v, at).to(wide) for v in values]
                w, c, r = _cut(weights, at), _cut(contained, at), _cut(norms, at)
                if scratch is None or scratch.shape != g.shape:
                    scratch = torch.empty_like(g)  # fresh memory takes long to get
                products = [
                    by_head(torch.mul(g, v, out=scratch), heads).sum(2) for v in parts
                ]
                of_changes = torch.stack(products)
                of_w = of_changes[:count] + _cut(grad_weights, at)
                of_s = w * (of_w - (w * of_w).sum(0) / ctx.factor)
                of_r = (of_s * _cut(scores, at)).sum(2, keepdim=True) / r
                of_c = -of_changes[:count]
                of_c[-1] += of_changes[count:].sum(0)
                of_products = of_s * r
                for whole, part in ((grad_contained, of_c), (grad_norms, of_r)):
                    _cut(whole, at).copy_(part)
                for i, change in enumerate(changes_of(w, c, values)):
                    piece = _cut(grad_values[i], at)
                    if earlier[i]:
                        total = piece.to(wide)
                        _add_product(total, change, g)
                    else:
                        total = _room(piece, wide)
                        part = by_head(total, heads)
                        torch.mul(by_head(g, heads), change.unsqueeze(2), out=part)
                    if i < count:
                        _add_outer(grad_rows, of_products[i], parts[i])
                        _add_back(total, rows, of_products[i])
                    piece.copy_(total)
        by_row = by_head(grad_rows, heads).diagonal(dim1=0, dim2=1)  # (d, G)
        grad_query = by_row.T.flatten().to(query.dtype)
        return (grad, grad_contained, grad_query, grad_norms, None, None, *grad_values)


# -- pieces, (..., b, C, n), in the memory order of their map -----------------------


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _pieces(x: Tensor) -> Iterator[At]:
    """Iterate over the samples and positions of each piece."""
    batch, channels, height, width = x.shape
    samples = max(1, PIECE // (channels * height * width))
    positions = height * width if samples > 1 else max(1, PIECE // channels)
    for b in range(0, batch, samples):
        for p in range(0, height * width, positions):
            yield slice(b, b + samples), slice(p, p + positions)


def _cut(x: Tensor, at: At) -> Tensor:
    return x.flatten(-2)[..., at[0], :, at[1]]


def _room(piece: Tensor, dtype: torch.dtype) -> Tensor:
    """Get a buffer for a piece: in place if the data type is the same."""
    return piece if piece.dtype == dtype else torch.empty_like(piece, dtype=dtype)


def _add_product(total: Tensor, weights: Tensor, x: Tensor) -> None:
    """Add (b, G, n) times (b, C, n)."""
    heads = weights.shape[1]
    by_head(total, heads).addcmul_(by_head(x, heads), weights.unsqueeze(2))


def _rows_by_head(query: Tensor, heads: int) -> Tensor:
    """(C,) to (G, C), with 0 outside of the channels of a head."""
    return torch.block_diag(*query.view(heads, 1, -1))


def _channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1


def _project(rows: Tensor, x: Tensor) -> Tensor:
    """(G, C) and (b, C, n) to (b, G, n)."""
    if _channels_last(x):
        return (x.transpose(1, 2).flatten(0, 1) @ rows.T).unflatten(0, (len(x), -1)).mT
    return rows.expand(len(x), -1, -1) @ x


def _add_back(total: Tensor, rows: Tensor, weights: Tensor) -> None:
    """Add (G, C), transposed, times (b, G, n) to (b, C, n)."""
    if _channels_last(total):
        flat = total.transpose(1, 2).flatten(0, 1)  # a view
        flat.addmm_(weights.transpose(1, 2).flatten(0, 1), rows)
    else:
        total.baddbmm_(rows.T.expand(len(total), -1, -1), weights)


def _add_outer(total: Tensor, weights: Tensor, x: Tensor) -> None:
    """Add (b, G, n) times (b, C, n) to (G, C)."""
    if _channels_last(x):
        flat = x.transpose(1, 2).flatten(0, 1)
        total.addmm_(weights.transpose(1, 2).flatten(0, 1).T, flat)
    else:
        total.addbmm_(weights, x.transpose(1, 2))
