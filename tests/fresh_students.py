"""More wrong answers for students.py.

Those of two readers who had not seen the hints, each with what it meant as a comment; and more.
"""

FIRST = [
    # dweight is made of outer products row by row, but each one overwrites the one before instead of
    # being added, so only the last row of the batch counts.
    ("linear", {
        "linear_backward": """\
def linear_backward(dy, x, weight):
    # y = x @ weight.T + bias
    dx = dy @ weight
    dbias = dy.sum(axis=0)
    # the weight: one outer product for each row of the batch
    dweight = np.zeros_like(weight)
    for dy_n, x_n in zip(dy, x):
        dweight = np.outer(dy_n, x_n)
    return dx, dweight, dbias
""",
    }, "one row only | overwritten"),
    # Takes 'undoing' the addition of the bias for its inverse and subtracts dbias from dy before it goes
    # on to x and weight, where dy should pass an addition unchanged (dx and dweight wrong, dbias right).
    ("linear", {
        "linear_backward": """\
def linear_backward(dy, x, weight):
    # y = prod + bias: undo the bias first
    dbias = dy.sum(axis=0)
    dprod = dy - dbias
    # prod = x @ weight.T
    dx = dprod @ weight
    dweight = dprod.T @ x
    return dx, dweight, dbias
""",
    }, "term too many"),
    # Two mistakes: the mask is made for rows 0 to N-1 instead of from first_row on, and the scale is
    # undone (times 1 - p) instead of applied again (times 1 / (1 - p)).
    ("dropout", {
        "dropout_backward": """\
def dropout_backward(dy, key, first_row, p):
    mask = dropout_mask_ref(key, 0, dy.shape, p)  # the mask of these N rows
    return np.where(mask, dy * dy.dtype.type(1 - p), dy.dtype.type(0))
""",
    }, "wrong mask + constant factor | upside down"),
    # dwte is assigned, not added to, so the gradient that was there already (the tied output layer's
    # share) is lost; dwpe is right.
    ("embedding", {
        "embedding_backward": """\
def embedding_backward(dwte, dwpe, dy, idx):
    T = idx.shape[1]
    V, C = dwte.shape
    # wte[idx] = one_hot @ wte is a linear layer, so dwte = one_hot.T @ dy
    one_hot = np.eye(V, dtype=dy.dtype)[idx.reshape(-1)]  # (B T, V)
    dwte[...] = one_hot.T @ dy.reshape(-1, C)
    dwpe[:T] += dy.sum(axis=0)
    return dwte, dwpe
""",
    }, "overwritten"),
    # Two mistakes: a token that occurs several times gets the mean of its gradients instead of their sum,
    # and dwpe is summed over the positions as well as over the batch, so every position gets the same
    # row.
    ("embedding", {
        "embedding_backward": """\
def embedding_backward(dwte, dwpe, dy, idx):
    # y = wte[idx] + wpe[:T]
    T = idx.shape[1]
    for token in np.unique(idx):
        dwte[token] += dy[idx == token].mean(axis=0)  # all the places where this token stands
    dwpe[:T] += dy.sum(axis=(0, 1))  # wpe was broadcast, so sum
    return dwte, dwpe
""",
    }, "mean for sum + sum too many | wrong axis"),
    # Divides by the number of all rows N instead of by count, the number of those that are not ignored.
    ("cross-entropy", {
        "cross_entropy_backward": """\
def cross_entropy_backward(dloss, logits, targets, lse, ignore_index, count):
    p = np.exp(logits - lse[:, None])
    valid = targets != ignore_index
    rows = np.flatnonzero(valid)
    p = p.astype(logits.dtype)  # (lse is float64)
    # loss = sum over valid rows of (lse - logits[target]) / count
    share = logits.dtype.type(dloss / len(targets))  # the mean loss of N rows: each of them counts 1 / N
    dlogits = p * share
    dlogits[rows, targets[rows]] -= share
    dlogits[~valid] = 0
    return dlogits
""",
    }, "constant factor"),
    # Two mistakes: takes p - y for the gradient of p and sends it through the softmax's backward once
    # more, and does not set the rows that are ignored to zero.
    ("cross-entropy", {
        "cross_entropy_backward": """\
def cross_entropy_backward(dloss, logits, targets, lse, ignore_index, count):
    p = np.exp(logits - lse[:, None]).astype(logits.dtype)
    valid = targets != ignore_index
    rows = np.flatnonzero(valid)
    y = np.zeros_like(p)
    y[rows, targets[rows]] = 1
    # loss: p - y
    dp = (p - y) * logits.dtype.type(dloss / count)
    # p = softmax(logits)
    dlogits = p * (dp - (dp * p).sum(axis=1, keepdims=True))
    return dlogits
""",
    }, "line too many + wrong mask"),
    # In GELU's slope the chain rule stops at tanh: the inner derivative K (1 + 3 A z^2) is missing.
    ("mlp", {
        "gelu_slope": """\
def gelu_slope(z):
    t = np.tanh(K * (z + A * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t**2)
""",
    }, "missing factor"),
    # Two mistakes: GELU's slope is taken at act (after GELU) instead of at pre, and dy is added to dx as
    # if the residual connection were part of this op.
    ("mlp", {
        "mlp_backward": """\
def mlp_backward(dy, x, w_fc, w_proj, pre):
    # y = act @ w_proj.T + b_proj
    act = gelu(pre)
    dact, dw_proj, db_proj = linear_backward_ref(dy, act, w_proj)
    # act = gelu(pre)
    dpre = dact * gelu_slope(act)
    # pre = x @ w_fc.T + b_fc
    dx, dw_fc, db_fc = linear_backward_ref(dpre, x, w_fc)
    dx = dx + dy  # the residual stream: what comes back is added to it
    return dx, dw_fc, db_fc, dw_proj, db_proj
""",
    }, "wrong value + term too many"),
    # Takes the mean of the product g xhat for the product of the two means, which is (about) 0 as xhat
    # has mean 0, so the term along xhat in effect vanishes.
    ("layernorm", {
        "layernorm_backward": """\
def layernorm_backward(dy, x, weight, mean, rstd):
    xhat = (x - mean[:, None]) * rstd[:, None]
    # y = xhat * weight + bias
    dweight = (dy * xhat).sum(axis=0)
    dbias = dy.sum(axis=0)
    g = dy * weight
    # xhat = (x - mean) * rstd, where mean and rstd depend on x
    g_mean = g.mean(axis=1, keepdims=True)
    g_xhat_mean = g_mean * xhat.mean(axis=1, keepdims=True)
    dx = rstd[:, None] * (g - g_mean - xhat * g_xhat_mean)
    return dx, dweight, dbias
""",
    }, "missing term | wrong value"),
    # The derivative of rstd = var^(-1/2) is -1/2 var^(-3/2) = -1/2 rstd^3, but it is written as -1/2
    # rstd^1.5: the term that comes through the variance has a wrong power of rstd.
    ("layernorm", {
        "layernorm_backward": """\
def layernorm_backward(dy, x, weight, mean, rstd):
    C = weight.size
    centred = x - mean[:, None]
    r = rstd[:, None]
    xhat = centred * r
    # y = xhat * weight + bias
    dxhat = dy * weight
    dweight = (dy * xhat).sum(axis=0)
    dbias = dy.sum(axis=0)
    # xhat = (x - mean) * rstd, where mean and rstd depend on x
    dcentred = dxhat * r
    drstd = (dxhat * centred).sum(axis=1, keepdims=True)
    # rstd = var ** -0.5, so drstd / dvar = -0.5 * var ** -1.5
    dvar = drstd * -0.5 * r**1.5
    # var = mean(centred**2)
    dcentred += dvar * 2 * centred / C
    # centred = x - mean
    dx = dcentred - dcentred.mean(axis=1, keepdims=True)
    return dx, dweight, dbias
""",
    }, "wrong power"),
    # Two mistakes: the weight is multiplied in after the normalisation's backward instead of before (the
    # two row means are those of dy, not of dy times weight), and dweight uses the centred x instead of
    # xhat (rstd is missing).
    ("layernorm", {
        "layernorm_backward": """\
def layernorm_backward(dy, x, weight, mean, rstd):
    centred = x - mean[:, None]
    r = rstd[:, None]
    xhat = centred * r
    dbias = dy.sum(axis=0)
    dweight = (dy * centred).sum(axis=0)
    # the normalisation, and then the weight, a constant factor of each column
    g_mean = dy.mean(axis=1, keepdims=True)
    g_xhat_mean = (dy * xhat).mean(axis=1, keepdims=True)
    dx = weight * r * (dy - g_mean - xhat * g_xhat_mean)
    return dx, dweight, dbias
""",
    }, "wrong order | wrong value + missing factor"),
    # In the softmax's backward the plain mean of dp over the row is subtracted instead of the average
    # weighted with p (sum of dp p).
    ("attention", {
        "attention_backward": """\
def attention_backward(dy, qkv, lse, n_head, dropout):
    q, k, v = split_qkv(qkv, n_head)
    dy = split_heads(dy, n_head)  # (B, n_head, T, hs)
    p = np.exp(_scores(q, k) - lse[..., None]).astype(q.dtype)
    drop = _dropout_scale(p, dropout)
    # y = a @ v
    da = dy @ v.swapaxes(-1, -2)
    dv = (p * drop).swapaxes(-1, -2) @ dy
    # a = p * drop
    dp = da * drop
    # p = softmax(s)
    ds = p * (dp - dp.mean(axis=-1, keepdims=True))  # dp above the average of its row
    # s = q @ k.T / sqrt(hs)
    dq = ds @ k / math.sqrt(q.shape[-1])
    dk = ds.swapaxes(-1, -2) @ q / math.sqrt(q.shape[-1])
    # qkv = q, k, v side by side
    dqkv = np.empty_like(qkv)
    for place, grad in zip(split_qkv(dqkv, n_head), (dq, dk, dv), strict=True):
        place[...] = grad
    return dqkv
""",
    }, "mean for sum | missing factor | wrong value"),
    # dv is a @ dy instead of a^T @ dy: the weights are not transposed, which the square (T, T) shape does
    # not show, so a value hears from the positions before it instead of those that looked at it.
    ("attention", {
        "attention_backward": """\
def attention_backward(dy, qkv, lse, n_head, dropout):
    q, k, v = split_qkv(qkv, n_head)
    dy = split_heads(dy, n_head)  # (B, n_head, T, hs)
    p = np.exp(_scores(q, k) - lse[..., None]).astype(q.dtype)
    drop = _dropout_scale(p, dropout)
    a = p * drop
    # y = a @ v
    da = dy @ v.swapaxes(-1, -2)
    dv = a @ dy  # the other factor times dy: (T, T) (T, hs)
    # a = p * drop
    dp = da * drop
    # p = softmax(s)
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
    # s = q @ k.T / sqrt(hs)
    scale = 1 / math.sqrt(q.shape[-1])
    dq = scale * (ds @ k)
    dk = scale * (ds.swapaxes(-1, -2) @ q)
    # qkv = q, k, v side by side
    dqkv = np.empty_like(qkv)
    for place, grad in zip(split_qkv(dqkv, n_head), (dq, dk, dv), strict=True):
        place[...] = grad
    return dqkv
""",
    }, "transposed"),
    # Two mistakes: dropout is undone after the softmax's backward instead of before it, and dk lacks the
    # scale 1 / sqrt(hs), which is given to dq alone.
    ("attention", {
        "attention_backward": """\
def attention_backward(dy, qkv, lse, n_head, dropout):
    q, k, v = split_qkv(qkv, n_head)
    dy = split_heads(dy, n_head)  # (B, n_head, T, hs)
    p = np.exp(_scores(q, k) - lse[..., None]).astype(q.dtype)
    drop = _dropout_scale(p, dropout)
    # y = (p * drop) @ v
    dp = dy @ v.swapaxes(-1, -2)
    dv = (p * drop).swapaxes(-1, -2) @ dy
    # softmax, and dropout, which is the same mask once more
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
    ds = ds * drop
    # s = (q / sqrt(hs)) @ k.T: the query is scaled
    dq = ds @ k / math.sqrt(q.shape[-1])
    dk = ds.swapaxes(-1, -2) @ q
    dqkv = np.empty_like(qkv)
    for place, grad in zip(split_qkv(dqkv, n_head), (dq, dk, dv), strict=True):
        place[...] = grad
    return dqkv
""",
    }, "wrong order | wrong mask + constant factor"),
]  # fmt: skip

SECOND = [
    # He averages over the rows of the batch instead of summing: dweight and dbias are both divided by N.
    ("linear", {
        "linear_backward": """\
def linear_backward(dy, x, weight):
    n = dy.shape[0]
    dx = dy @ weight
    # gradient of the batch: average the outer products of the rows
    dweight = np.einsum("no,ni->oi", dy, x) / n
    dbias = dy.mean(axis=0)
    return dx, dweight, dbias
""",
    }, "mean for sum"),
    # Two mistakes: dweight is computed as x.T @ dy (I, O) and then reshaped to (O, I) where it should be
    # transposed, which scrambles its entries; and dbias forgets axis=0, so the sum of all of dy is
    # broadcast into every entry.
    ("linear", {
        "linear_backward": """\
def linear_backward(dy, x, weight):
    dx = dy @ weight
    dweight = (x.T @ dy).reshape(weight.shape)
    dbias = np.zeros(weight.shape[0], dtype=dy.dtype)
    dbias += dy.sum()
    return dx, dweight, dbias
""",
    }, "transposed | reshape + sum too many | wrong axis"),
    # The mask is drawn for rows from 0 on, not from first_row on, so it is another mask than the
    # forward's (right only if first_row is 0).
    ("dropout", {
        "dropout_backward": """\
def dropout_backward(dy, key, first_row, p):
    scale = dy.dtype.type(1 / (1 - p))
    # dy is only our own rows, so we start with row 0 of it
    mask = dropout_mask_ref(key, 0, dy.shape, p)
    return mask * dy * scale
""",
    }, "wrong mask"),
    # The result is allocated with np.zeros_like(mask), which is boolean, so the gradients assigned to it
    # are cast to True/False and come out as 0 or 1.
    ("dropout", {
        "dropout_backward": """\
def dropout_backward(dy, key, first_row, p):
    mask = dropout_mask_ref(key, first_row, dy.shape, p)
    dx = np.zeros_like(mask)
    dx[mask] = dy[mask] / (1 - p)
    return dx
""",
    }, "wrong dtype"),
    # Tokens are sorted to sum runs of equal ones with reduceat, but the rows of dy are not put in the
    # same order, so the wrong rows are summed into each token's gradient (dwpe is right).
    ("embedding", {
        "embedding_backward": """\
def embedding_backward(dwte, dwpe, dy, idx):
    B, T, C = dy.shape
    # add.at is slow: sort the tokens and sum the runs
    flat = np.sort(idx.reshape(-1))
    tokens, starts = np.unique(flat, return_index=True)
    dwte[tokens] += np.add.reduceat(dy.reshape(B * T, C), starts, axis=0)
    dwpe[:T] += dy.sum(axis=0)
    return dwte, dwpe
""",
    }, "wrong index"),
    # The position table is treated like a bias: dy is summed over batch and positions, and the one (C,)
    # vector is broadcast onto all T rows of dwpe; it should be summed over the batch only.
    ("embedding", {
        "embedding_backward": """\
def embedding_backward(dwte, dwpe, dy, idx):
    # y = wte[idx] + wpe[:T]
    T, C = dy.shape[1:]
    np.add.at(dwte, idx.ravel(), dy.reshape(-1, C))
    dwpe[:T] += dy.sum(axis=(0, 1))  # wpe is broadcast, so sum
    return dwte, dwpe
""",
    }, "sum too many | wrong axis"),
    # dlogits[:, targets[rows]] -= 1 in place of dlogits[rows, targets[rows]] -= 1: the 1 is taken off in
    # the target columns of all rows of the batch, not only of each row's own target.
    ("cross-entropy", {
        "cross_entropy_backward": """\
def cross_entropy_backward(dloss, logits, targets, lse, ignore_index, count):
    valid = targets != ignore_index
    rows = np.flatnonzero(valid)
    dlogits = np.exp(logits - lse[:, None])  # p
    dlogits[:, targets[rows]] -= 1  # p - y
    dlogits *= valid[:, None]
    return (dlogits * (dloss / count)).astype(logits.dtype)
""",
    }, "wrong index"),
    # Two mistakes: p[valid][...] -= 1 writes to a copy made by the boolean index, so the one-hot is never
    # subtracted; and it is divided by the number of all rows instead of by count, the rows that are not
    # ignored.
    ("cross-entropy", {
        "cross_entropy_backward": """\
def cross_entropy_backward(dloss, logits, targets, lse, ignore_index, count):
    # loss = sum over valid rows of (lse - logits[target]) / count
    N = logits.shape[0]
    valid = targets != ignore_index
    p = np.exp(logits - lse[:, None]).astype(logits.dtype)
    p[valid][np.arange(valid.sum()), targets[valid]] -= 1
    p[~valid] = 0
    return p * logits.dtype.type(dloss / N)
""",
    }, "missing term + constant factor"),
    # An alias: t2 = t; t2 *= t2 squares t in place as well, so the term 0.5 * (1 + t) of GELU's slope
    # gets tanh squared where it needs tanh.
    ("mlp", {
        "gelu_slope": """\
def gelu_slope(z):
    t = np.tanh(K * (z + A * z**3))
    t2 = t
    t2 *= t2
    du = K * (1 + 3 * A * z**2)
    return 0.5 * (1 + t) + 0.5 * z * (1 - t2) * du
""",
    }, "wrong value | wrong power"),
    # Two mistakes: the 0.5 of GELU is missing in the second term of the product rule (z times the tanh's
    # derivative); and db_fc is summed from dact instead of dpre, so it skips GELU's slope.
    ("mlp", {
        "gelu_slope": """\
def gelu_slope(z):
    t = np.tanh(K * (z + A * z**3))
    return 0.5 * (1 + t) + z * (1 - t * t) * K * (1 + 3 * A * z**2)
""",
        "mlp_backward": """\
def mlp_backward(dy, x, w_fc, w_proj, pre):
    # y = act @ w_proj.T + b_proj
    dact = dy @ w_proj
    dw_proj = dy.T @ gelu(pre)
    db_proj = dy.sum(axis=0)
    # act = gelu(pre)
    dpre = dact * gelu_slope(pre)
    # pre = x @ w_fc.T + b_fc
    dx = dpre @ w_fc
    dw_fc = dpre.T @ x
    db_fc = dact.sum(axis=0)
    return dx, dw_fc, db_fc, dw_proj, db_proj
""",
    }, "missing factor + wrong value | missing line"),
    # The derivative of var**-0.5 is -0.5 * var**-1.5 = -0.5 * rstd**3, but he writes rstd**1.5, as if
    # rstd were 1 / var: the term by which x acts through the variance has a wrong size.
    ("layernorm", {
        "layernorm_backward": """\
def layernorm_backward(dy, x, weight, mean, rstd):
    C = x.shape[1]
    xc = x - mean[:, None]
    r = rstd[:, None]
    dweight = (dy * xc * r).sum(axis=0)
    dbias = dy.sum(axis=0)
    g = dy * weight
    dvar = (g * xc * -0.5 * r**1.5).sum(axis=1, keepdims=True)  # d var^-1/2 = -1/2 var^-3/2
    dmean = -(g * r).sum(axis=1, keepdims=True)  # the mean of xc is 0: nothing through var
    dx = g * r + dvar * 2 * xc / C + dmean / C
    return dx, dweight, dbias
""",
    }, "wrong power"),
    # Two mistakes: g.mean() has no axis, so the mean of the whole batch is subtracted instead of each
    # row's; and dweight is summed from g = dy * weight instead of from dy, so it has a factor weight too
    # many.
    ("layernorm", {
        "layernorm_backward": """\
def layernorm_backward(dy, x, weight, mean, rstd):
    xhat = (x - mean[:, None]) * rstd[:, None]
    # y = xhat * weight + bias
    g = dy * weight
    dweight = (g * xhat).sum(axis=0)
    dbias = dy.sum(axis=0)
    # xhat = (x - mean) * rstd, where mean and rstd depend on x
    dx = rstd[:, None] * (g - g.mean() - xhat * (g * xhat).mean(axis=1, keepdims=True))
    return dx, dweight, dbias
""",
    }, "wrong axis | sum too many + factor too many"),
    # dy (B, T, C) is brought to heads by reshape(B, n_head, T, hs) alone, without reshape(B, T, n_head,
    # hs) and a transpose, so positions and heads are mixed up.
    ("attention", {
        "attention_backward": """\
def attention_backward(dy, qkv, lse, n_head, dropout):
    q, k, v = split_qkv(qkv, n_head)
    B, H, T, hs = q.shape
    dy = dy.reshape(B, H, T, hs)
    p = np.exp(_scores(q, k) - lse[..., None]).astype(q.dtype)
    drop = _dropout_scale(p, dropout)
    a = p * drop
    dv = a.swapaxes(-1, -2) @ dy
    dp = (dy @ v.swapaxes(-1, -2)) * drop
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
    ds /= math.sqrt(hs)
    dq = ds @ k
    dk = ds.swapaxes(-1, -2) @ q
    parts = [g.transpose(0, 2, 1, 3).reshape(B, T, H * hs) for g in (dq, dk, dv)]
    return np.concatenate(parts, axis=-1)
""",
    }, "reshape"),
    # Two mistakes: the softmax's average is summed over axis -2 (the queries) instead of -1 (the keys);
    # and dq, dk, dv are concatenated inside each head before the heads are merged, so the last axis is q
    # k v of head 0, q k v of head 1, ... instead of all of q, all of k, all of v.
    ("attention", {
        "attention_backward": """\
def attention_backward(dy, qkv, lse, n_head, dropout):
    q, k, v = split_qkv(qkv, n_head)
    dy = split_heads(dy, n_head)
    B, H, T, hs = q.shape
    p = np.exp(_scores(q, k) - lse[..., None]).astype(q.dtype)
    drop = _dropout_scale(p, dropout)
    da = dy @ v.swapaxes(-1, -2)
    dv = (p * drop).swapaxes(-1, -2) @ dy
    dp = da * drop
    ds = p * (dp - (dp * p).sum(axis=-2, keepdims=True))
    dq = ds @ k / math.sqrt(hs)
    dk = ds.swapaxes(-1, -2) @ q / math.sqrt(hs)
    dqkv = np.concatenate([dq, dk, dv], axis=-1)  # (B, n_head, T, 3 hs)
    return dqkv.transpose(0, 2, 1, 3).reshape(B, T, 3 * H * hs)
""",
    }, "wrong axis + reshape | wrong place"),
    # The einsum of dk contracts the wrong index, bhij,bhjd->bhid (ds @ q) instead of bhij,bhid->bhjd
    # (ds.T @ q): ds is not transposed, so the gradient of a key is summed over the keys it should belong
    # to.
    ("attention", {
        "attention_backward": """\
def attention_backward(dy, qkv, lse, n_head, dropout):
    q, k, v = split_qkv(qkv, n_head)
    dy = split_heads(dy, n_head)
    s = _scores(q, k)
    p = np.exp(s - lse[..., None]).astype(q.dtype)
    drop = _dropout_scale(p, dropout)
    # y = a @ v
    da = np.einsum("bhid,bhjd->bhij", dy, v)
    dv = np.einsum("bhij,bhid->bhjd", p * drop, dy)
    # a = p * drop
    dp = da * drop
    # p = softmax(s)
    ds = p * (dp - np.einsum("bhij,bhij->bhi", dp, p)[..., None])
    # s = q @ k.T / sqrt(hs)
    scale = 1 / math.sqrt(q.shape[-1])
    dq = np.einsum("bhij,bhjd->bhid", ds, k) * scale
    dk = np.einsum("bhij,bhjd->bhid", ds, q) * scale
    # qkv = q, k, v side by side
    dqkv = np.empty_like(qkv)
    for place, grad in zip(split_qkv(dqkv, n_head), (dq, dk, dv)):
        place[...] = grad
    return dqkv
    return dqkv
""",
    }, "transposed"),
]  # fmt: skip

MORE = [
    ("linear", {"dweight": 'dweight = np.einsum("no,ni->oi", dy, x - x.mean(axis=0))'}, "term too many"),
    ("linear", {"dbias": "dbias = dy[0] * len(dy)"}, "one row only + sum for mean | factor too many"),
    ("linear", {"dx": "dx = np.einsum('no,oi->ni', dy ** 2, weight)"}, "wrong power"),
    ("dropout", {"return np.where": "return dy * mask / p"}, "constant factor"),
    ("dropout", {"return np.where": "return dy * (dy > 0) / (1 - p)"}, "wrong mask"),
    ("embedding", {"np.add": "for b in range(len(idx)): dwte[idx[b]] += dy[b]"}, "repeated index"),
    ("embedding", {"dwpe": "dwpe[:T] += dy.sum(axis=0) / T"}, "constant factor | mean for sum"),
    ("embedding", {"dwpe": "dwpe[:T - 1] += dy.sum(axis=0)[:-1]"}, "wrong index"),
    ("embedding", {"dwpe": "dwpe[:T] += dy.sum(axis=0)[::-1]"}, "wrong index"),
    ("embedding", {"np.add": "for v in np.unique(idx): dwte[v] += dy[idx == v][-1]"}, "repeated index | one row only"),
    ("cross-entropy", {"p = np.exp": "e = np.exp(logits - logits.max())\np = e / e.sum(axis=0)"}, "wrong axis"),
    ("cross-entropy", {"p = np.exp": "p = logits - lse[:, None]"}, "wrong value | missing line"),
    ("cross-entropy", {"return dlog": "return -dlogits * logits.dtype.type(dloss / count)"}, "sign"),
    ("cross-entropy", {
        "dlogits[~valid]": "pass",
        "dlogits[rows": "dlogits[~valid] = 0\ndlogits[np.arange(len(p)), targets] -= 1",
    }, "wrong mask"),
    ("cross-entropy", {"dlogits[rows": "dlogits[rows, targets[rows]] -= p[rows, targets[rows]]"}, "wrong value"),
    ("cross-entropy", {"dlogits[rows": "dlogits[rows, targets[rows]] = -1"}, "missing term | overwritten"),
    ("mlp", {
        "return 0.5": (
            "from math import erf\n"
            "phi = np.vectorize(erf)(z / 2**0.5)\n"
            "return 0.5 * (1 + phi) + z * np.exp(-z**2 / 2) / (2 * np.pi)**0.5"
        ),
    }, "wrong value"),
    ("mlp", {"return 0.5": "s = 1 / (1 + np.exp(-1.702 * z))\nreturn s + 1.702 * z * s * (1 - s)"}, "wrong value"),
    ("mlp", {"dx, dw_fc": "_, dw_fc, db_fc = linear_backward_ref(dpre, x, w_fc)\ndx = dact @ w_fc"}, "missing line"),
    ("mlp", {"t = ": "t = np.tanh(K * z + A * z**3)"}, "missing factor | wrong value"),
    ("mlp", {"t = ": "t = np.tanh(z + A * z**3)"}, "missing factor"),
    ("mlp", {
        "dact,": "dact, dw_proj, db_proj = linear_backward_ref(dy, act, w_proj)\ndw_proj *= 2",
    }, "constant factor"),
    ("mlp", {"dpre": "dpre = dact * gelu_slope(pre) + dact"}, "term too many"),
    ("layernorm", {"dx": "dx = rstd[:, None]**2 * (g - g_mean - xhat * g_xhat_mean)"}, "wrong power | factor too many"),
    ("layernorm", {"xhat": "xhat = x * rstd[:, None]"}, "missing term"),
    ("layernorm", {"g_xhat_mean": "g_xhat_mean = (g * xhat).mean(axis=0, keepdims=True)"}, "wrong axis"),
    ("layernorm", {"dx": "dx = rstd[:, None] * g - g_mean - xhat * g_xhat_mean"}, "missing factor"),
    ("layernorm", {
        "dx": "dx = g / (1/rstd[:, None]) - g_mean * rstd[:, None] - (x - mean[:, None]) * g_xhat_mean * rstd[:, None]",
    }, "missing factor"),
    ("layernorm", {"dweight": "dweight = (dy.sum(axis=0) * xhat.sum(axis=0))"}, "wrong order"),
    ("layernorm", {"g =": "g = dy * weight * rstd[:, None]"}, "factor too many | wrong power"),
    ("attention", {
        "p = np.exp": "p = np.tril(np.exp(q @ k.swapaxes(-1, -2) - lse[..., None]))",
    }, "missing factor | wrong value"),
    ("attention", {"dv": "dv = (p * (drop > 0)).swapaxes(-1, -2) @ dy"}, "missing factor | constant factor"),
    ("attention", {
        "dq": "dq = ds.swapaxes(-1, -2) @ q / math.sqrt(q.shape[-1])",
        "dk": "dk = ds @ k / math.sqrt(q.shape[-1])",
    }, "wrong place"),
    ("attention", {
        "ds": "ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True)) / math.sqrt(q.shape[-1])",
    }, "constant factor"),
    ("attention", {"ds": "ds = np.triu(p * (dp - (dp * p).sum(axis=-1, keepdims=True)))"}, "wrong mask"),
    ("attention", {"da": "da = dy @ v.swapaxes(-1, -2) * p"}, "factor too many | wrong value"),
    ("attention", {"ds": "ds = p * (dp - (dy * v).sum(axis=-1, keepdims=True))"}, "wrong value"),
    ("attention", {"ds": "ds = p * (dp - (dp * p).sum(axis=(-1, -2), keepdims=True))"}, "sum too many | wrong axis"),
    ("attention", {"ds": "ds = p * dp - p * p * dp"}, "missing term"),
    ("attention", {"dp": "dp = da * dropout.p"}, "wrong mask | wrong value"),
    ("linear", {"dx": "dx = (dy - dy.mean(axis=1, keepdims=True)) @ weight"}, "term too many"),
    ("linear", {"dweight": "dweight = (dy.T @ x) / np.linalg.norm(dy.T @ x)"}, "constant factor"),
    ("linear", {"dbias": "dbias = dy.max(axis=0)"}, "wrong value | missing sum | one row only"),
    ("linear", {
        "dx": "dx = dy @ weight + x",
        "dbias": "dbias = dy.sum(axis=0) / 2",
    }, "term too many + constant factor"),
    ("dropout", {"return np.where": "return np.where(mask, dy, dy * p)"}, "wrong mask | constant factor"),
    ("dropout", {"return np.where": "return np.where(mask, dy / (1 - p), dy)"}, "wrong mask | missing mask"),
    ("embedding", {"dwpe": "dwpe[idx[0]] += dy.sum(axis=0)"}, "wrong index"),
    ("embedding", {
        "np.add": "np.add.at(dwte, idx.T, dy.transpose(1, 0, 2)); dwte *= 2",
    }, "overwritten | constant factor | term too many"),
    ("embedding", {"np.add": "np.add.at(dwte, idx[:, 1:], dy[:, :-1])"}, "wrong index"),
    ("cross-entropy", {
        "dlogits[rows": "y = np.zeros_like(p); y[rows, targets[rows]] = 1\ndlogits = p * y - y",
    }, "missing term"),
    ("cross-entropy", {
        "return dlog": "return dlogits * logits.dtype.type(dloss / count / logits.shape[1])",
    }, "constant factor | mean for sum"),
    ("cross-entropy", {
        "return dlog": "return dlogits * p * logits.dtype.type(dloss / count)",
    }, "factor too many | wrong power"),
    ("cross-entropy", {"dlogits[rows": "dlogits[rows, targets[rows] - 1] -= 1"}, "wrong index"),
    ("mlp", {"dpre": "dpre = dact * gelu_slope(pre) * act"}, "factor too many"),
    ("mlp", {"return 0.5": "return 0.5 * (1 + t) * (1 + z * (1 - t) * K * (1 + 3 * A * z))"}, "wrong power"),
    ("mlp", {"return 0.5": "return 0.5 * (1 + t) + 0.5 * (1 - t**2) * K * (1 + 3 * A * z**2)"}, "missing factor"),
    ("mlp", {"dpre": "dpre = np.maximum(dact * gelu_slope(pre), 0)"}, "wrong mask"),
    ("mlp", {"act = ": "act = pre"}, "wrong value"),
    ("layernorm", {
        "dx": "C = x.shape[1]\ndx = rstd[:, None] * (g - g_mean - xhat * g_xhat_mean * (C / (C - 1)))",
    }, "constant factor"),
    ("layernorm", {"g_mean": "g_mean = g.mean(axis=1, keepdims=True) * weight"}, "factor too many"),
    ("layernorm", {
        "dx": "dx = (g - g_mean - xhat * g_xhat_mean) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5) ** 3",
    }, "wrong power"),
    ("layernorm", {"dx": "dx = rstd[:, None] * (dy - g_mean - xhat * g_xhat_mean)"}, "wrong value | missing factor"),
    ("layernorm", {"g_xhat_mean": "g_xhat_mean = (g * xhat).mean(axis=1, keepdims=True) + g_mean"}, "term too many"),
    ("attention", {"dk": "dk = ds.swapaxes(-1, -2) @ q", "dq": "dq = ds @ k / q.shape[-1]"}, "constant factor"),
    ("attention", {"dv": "dv = (p * drop).swapaxes(-1, -2) @ dy / math.sqrt(q.shape[-1])"}, "constant factor"),
    ("attention", {
        "ds": "ds = p * (dp - (da * p).sum(axis=-1, keepdims=True))",
    }, "wrong value | missing mask | missing factor | wrong mask"),
    ("attention", {"dq": "dq = ds @ v / math.sqrt(q.shape[-1])"}, "wrong value"),
    ("attention", {"da": "da = dy @ k.swapaxes(-1, -2)"}, "wrong value"),
    ("attention", {
        "ds": "ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))\nds = ds * ~np.eye(ds.shape[-1], dtype=bool)",
    }, "wrong mask"),
    ("attention", {"drop": "drop = _dropout_scale(p[::-1], dropout)[::-1]"}, "wrong mask"),
]  # fmt: skip

# A third reader's, who came after all hints were made.  On account of these two kinds were made: one number everywhere,
# and another mask.
THIRD = [
    # "dL/dW is x.T @ dy, as in every course.  NumPy said the shape was (I, O) where (O, I) was wanted, so I reshaped."
    # A reshape isn't a transpose: the right numbers in the wrong places.
    ("linear", {"dweight": "dweight = (x.T @ dy).reshape(weight.shape)"}, "reshape | transposed"),
    # "y = ... + bias, the derivative of that is 1, and it's there for every row, so I sum ones."
    # The local derivative alone: dy, the gradient that comes in, is not multiplied in.  Gives N everywhere.
    ("linear", {"dbias": "dbias = np.ones_like(dy).sum(axis=0)"}, "missing factor"),
    # Writes everything as einsum; in dx the two o's got different letters, so that each is summed by itself:
    # a product of two sums instead of a sum of products.
    ("linear", {
        "linear_backward": """\
def linear_backward(dy, x, weight):
    # y_no = sum_i x_ni w_oi + b_o
    dx = np.einsum("no,ki->ni", dy, weight)
    dweight = np.einsum("no,ni->oi", dy, x)
    dbias = np.einsum("no->o", dy)
    return dx, dweight, dbias
""",
    }, "sum too many | wrong product"),
    # "key is a seed, so with the same seed I get the same mask."  NumPy's generator isn't the forward's: another mask.
    ("dropout", {
        "mask": "mask = np.random.default_rng(int(key)).random(dy.shape) >= p",
    }, "wrong mask"),
    # "Backward undoes the forward: that divided by (1 - p), so I multiply by it."
    # The inverse function instead of the derivative: dy * (1 - p).
    ("dropout", {
        "return": "return np.where(mask, dy * dy.dtype.type(1 - p), dy.dtype.type(0))",
    }, "upside down | constant factor"),
    # "The scale makes up for what was dropped, so count what was really dropped."
    # Right mask, but scaled by the mask's own kept fraction instead of 1 - p.
    ("dropout", {
        "dropout_backward": """\
def dropout_backward(dy, key, first_row, p):
    mask = dropout_mask_ref(key, first_row, dy.shape, p)
    kept = mask.mean()  # which part of the elements survived
    return (dy * mask / kept).astype(dy.dtype)
""",
    }, "constant factor"),
    # "Position t gets everything that arrived at position t."  Sums over the batch and over the channels too, and the
    # same total goes to each channel.
    ("embedding", {
        "dwpe[:T]": "dwpe[:T] += dy.sum(axis=(0, 2))[:, None]",
    }, "sum too many | wrong axis"),
    # Knows that dwte[idx] += dy loses repetitions, and so takes one sequence at a time, "where they don't meet".
    # A token that occurs twice in the same sequence is still counted once.
    ("embedding", {
        "embedding_backward": """\
def embedding_backward(dwte, dwpe, dy, idx):
    B, T = idx.shape
    for b in range(B):
        dwte[idx[b]] += dy[b]
        dwpe[:T] += dy[b]
    return dwte, dwpe
""",
    }, "repeated index"),
    # "A token that occurs often would get far too large a step, so take the average over its occurrences."
    # Mean for sum; and the division hits what was in dwte before, too.
    ("embedding", {
        "embedding_backward": """\
def embedding_backward(dwte, dwpe, dy, idx):
    T = idx.shape[1]
    np.add.at(dwte, idx, dy)
    counts = np.bincount(idx.ravel(), minlength=len(dwte))
    dwte /= np.maximum(counts, 1)[:, None]
    dwpe[:T] += dy.sum(axis=0)
    return dwte, dwpe
""",
    }, "mean for sum | factor too many"),
    # "The derivative of softmax is p (1 - p), then minus one at the target."  Derivative of p, where that of lse is
    # wanted (which is p).
    ("cross-entropy", {"dlogits": "dlogits = p * (1 - p)"}, "factor too many | wrong value"),
    # "loss = lse - logits[target]: lse becomes p, and then I subtract logits[target]."
    # The second term is copied, not differentiated: its derivative is 1.
    ("cross-entropy", {
        "dlogits[rows, targets[rows]]": "dlogits[rows, targets[rows]] -= logits[rows, targets[rows]]",
    }, "wrong value | factor too many"),
    # Goes by way of p: loss = -log p_c, dp_c = -1 / p_c, then softmax's backward from memory -- but forgets to weight
    # the sum by p: p (dp - sum dp) instead of p (dp - sum dp p).
    ("cross-entropy", {
        "cross_entropy_backward": """\
def cross_entropy_backward(dloss, logits, targets, lse, ignore_index, count):
    p = np.exp(logits - lse[:, None]).astype(logits.dtype)
    rows = np.flatnonzero(targets != ignore_index)
    cols = targets[rows]
    # loss = mean of -log(p[target])
    dp = np.zeros_like(p)
    dp[rows, cols] = -1 / p[rows, cols] * logits.dtype.type(dloss / count)
    # p = softmax(logits)
    dlogits = p * (dp - dp.sum(axis=1, keepdims=True))
    return dlogits
""",
    }, "missing factor"),
    # Believes that [:, targets] picks one element per row.  It takes those columns in all rows, so every row loses 1 at
    # each class that is anybody's target.
    ("cross-entropy", {
        "cross_entropy_backward": """\
def cross_entropy_backward(dloss, logits, targets, lse, ignore_index, count):
    valid = targets != ignore_index
    dlogits = np.exp(logits - lse[:, None]).astype(logits.dtype)
    dlogits[:, targets[valid]] -= 1
    dlogits[~valid] = 0
    return dlogits * logits.dtype.type(dloss / count)
""",
    }, "wrong index"),
    # Sets ignored rows to zero first, and then subtracts the one-hot matrix of all rows; class 0 stands in for the
    # ignored targets "because those rows are zero anyway".  Ignored rows get -1 at class 0.
    ("cross-entropy", {
        "cross_entropy_backward": """\
def cross_entropy_backward(dloss, logits, targets, lse, ignore_index, count):
    N, V = logits.shape
    valid = targets != ignore_index
    p = np.exp(logits - lse[:, None]).astype(logits.dtype)
    p = p * valid[:, None]  # ignored rows don't count
    safe = np.where(valid, targets, 0)  # -1 is no class
    onehot = np.eye(V, dtype=logits.dtype)[safe]
    return (p - onehot) * logits.dtype.type(dloss / count)
""",
    }, "wrong mask"),
    # Copied the formula without the inner brackets: K stands at z only, not at a z^3.
    ("mlp", {"t": "t = np.tanh(K * z + A * z**3)"}, "missing factor"),
    # Took the other matrix, transposed so that the shapes fit: "going back to x, so the projection's transpose".
    # dw_fc and db_fc are right, dx isn't.
    ("mlp", {
        "dx, dw_fc, db_fc": "dx, dw_fc, db_fc = linear_backward_ref(dpre, x, w_proj.T)",
    }, "wrong value"),
    # By hand; the bias's gradient was taken one step too early: db_fc from dact (after GELU) instead of dpre.
    ("mlp", {
        "gelu_slope": """\
def gelu_slope(z):
    t = np.tanh(K * (z + A * z**3))
    dt = (1 - t * t) * K * (1 + 3 * A * z * z)
    return 0.5 * (1 + t) + 0.5 * z * dt
""",
        "mlp_backward": """\
def mlp_backward(dy, x, w_fc, w_proj, pre):
    act = gelu(pre)
    db_proj = dy.sum(axis=0)
    dw_proj = dy.T @ act
    dact = dy @ w_proj
    db_fc = dact.sum(axis=0)
    dpre = dact * gelu_slope(pre)
    dw_fc = dpre.T @ x
    dx = dpre @ w_fc
    return dx, dw_fc, db_fc, dw_proj, db_proj
""",
    }, "missing factor | missing line | wrong value"),
    # Two at once.  Writes gelu as z * sigmoid(2u), but differentiates sigmoid(u): the factor 2 is missing.  And dw_proj
    # gets pre, since "that's what the forward saved".
    ("mlp", {
        "gelu_slope": """\
def gelu_slope(z):
    u = K * (z + A * z**3)
    s = 1 / (1 + np.exp(-2 * u))  # gelu(z) = z * s
    du = K * (1 + 3 * A * z**2)
    return s + z * s * (1 - s) * du
""",
        "mlp_backward": """\
def mlp_backward(dy, x, w_fc, w_proj, pre):
    dact, dw_proj, db_proj = linear_backward_ref(dy, pre, w_proj)
    dpre = dact * gelu_slope(pre)
    dx, dw_fc, db_fc = linear_backward_ref(dpre, x, w_fc)
    return dx, dw_fc, db_fc, dw_proj, db_proj
""",
    }, "missing factor | constant factor + wrong value"),
    # "GELU is z Phi(z), so its derivative is Phi(z) + z phi(z)", with the normal density for phi and the tanh form for
    # Phi.  The slope of the exact GELU; the forward is the tanh approximation.  Nearly right (about 1e-3 off).
    ("mlp", {
        "gelu_slope": """\
def gelu_slope(z):
    cdf = 0.5 * (1 + np.tanh(K * (z + A * z**3)))
    pdf = np.exp(-0.5 * z**2) * (0.5 * K)  # 1 / sqrt(2 pi) = K / 2
    return cdf + z * pdf
""",
        "mlp_backward": """\
def mlp_backward(dy, x, w_fc, w_proj, pre):
    act = gelu(pre)
    dact, dw_proj, db_proj = linear_backward_ref(dy, act, w_proj)
    dpre = dact * gelu_slope(pre)
    dx, dw_fc, db_fc = linear_backward_ref(dpre, x, w_fc)
    return dx, dw_fc, db_fc, dw_proj, db_proj
""",
    }, "wrong value"),
    # "mean is multiplied by rstd in the forward, so its gradient gets a factor rstd" -- but dx multiplies all by rstd
    # once more: rstd twice in this term.
    ("layernorm", {
        "g_mean": "g_mean = g.mean(axis=1, keepdims=True) * rstd[:, None]",
    }, "factor too many | wrong power"),
    # "That's the variance's way, and a variance is divided by n - 1."  The forward divides by C.
    ("layernorm", {
        "g_xhat_mean": "g_xhat_mean = (g * xhat).sum(axis=1, keepdims=True) / (x.shape[1] - 1)",
    }, "constant factor"),
    # Bracket closed too early: the third term doesn't get rstd.
    ("layernorm", {
        "dx": "dx = rstd[:, None] * (g - g_mean) - xhat * g_xhat_mean",
    }, "missing factor"),
    # Step by step, as in the well-known batch-norm exercise.  The mean's way: mean = sum x / C, and the 1 / C is
    # forgotten when dmean is spread over the x's.
    ("layernorm", {
        "layernorm_backward": """\
def layernorm_backward(dy, x, weight, mean, rstd):
    C = x.shape[1]
    r = rstd[:, None]
    centred = x - mean[:, None]
    xhat = centred * r
    dweight = (dy * xhat).sum(axis=0)
    dbias = dy.sum(axis=0)
    dxhat = dy * weight
    # var
    drstd = (dxhat * centred).sum(axis=1, keepdims=True)
    dvar = -0.5 * r**3 * drstd
    # mean
    dmean = -(dxhat * r).sum(axis=1, keepdims=True)
    dx = dxhat * r + dvar * 2 * centred / C + dmean
    return dx, dweight, dbias
""",
    }, "sum for mean | constant factor | missing factor"),
    # Remembers batch norm: "the means in the backward are over the rows, as with dweight".  Both inner means over
    # axis 0; layernorm's are over axis 1.
    ("layernorm", {
        "layernorm_backward": """\
def layernorm_backward(dy, x, weight, mean, rstd):
    xhat = (x - mean[:, None]) * rstd[:, None]
    dweight = np.sum(dy * xhat, axis=0)
    dbias = np.sum(dy, axis=0)
    g = dy * weight
    dx = (g - g.mean(axis=0) - xhat * (g * xhat).mean(axis=0)) * rstd[:, None]
    return dx, dweight, dbias
""",
    }, "wrong axis"),
    # Thinks in quotients: xhat = centred / std.  d(1/std) = -1/std^2, and the minus is lost: the variance's term is
    # added where it should be taken away.
    ("layernorm", {
        "layernorm_backward": """\
def layernorm_backward(dy, x, weight, mean, rstd):
    C = x.shape[1]
    std = 1 / rstd[:, None]
    centred = x - mean[:, None]
    dweight = (dy * centred / std).sum(axis=0)
    dbias = dy.sum(axis=0)
    g = dy * weight
    # xhat = centred / std
    dcentred = g / std
    dstd = (g * centred / std**2).sum(axis=1, keepdims=True)
    # std = sqrt(mean(centred**2) + eps)
    dcentred += dstd * centred / (C * std)
    # centred = x - mean(x)
    dx = dcentred - dcentred.mean(axis=1, keepdims=True)
    return dx, dweight, dbias
""",
    }, "sign"),
    # "Subtract the average of dp" -- takes it literally and uses mean.  The weighted average is the sum of dp p, as p
    # adds up to 1; with mean it's too small by T.
    ("attention", {
        "ds": "ds = p * (dp - (dp * p).mean(axis=-1, keepdims=True))",
    }, "mean for sum"),
    # Scale with the model's width instead of the head's: sqrt(C) where the forward has sqrt(hs).
    ("attention", {
        "dq": "dq = ds @ k / math.sqrt(qkv.shape[-1] // 3)",
        "dk": "dk = ds.swapaxes(-1, -2) @ q / math.sqrt(qkv.shape[-1] // 3)",
    }, "constant factor"),
    # "The mask only matters in the forward, lse knows it already": makes p again without it, so that p isn't 0 in the
    # future, and gradients leak there.
    ("attention", {
        "attention_backward": """\
def attention_backward(dy, qkv, lse, n_head, dropout):
    q, k, v = split_qkv(qkv, n_head)
    dy = split_heads(dy, n_head)
    scale = 1 / math.sqrt(q.shape[-1])
    s = q @ k.swapaxes(-1, -2) * scale
    p = np.exp(s - lse[..., None]).astype(q.dtype)
    drop = _dropout_scale(p, dropout)
    dv = (p * drop).swapaxes(-1, -2) @ dy
    dp = (dy @ v.swapaxes(-1, -2)) * drop
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
    dq = ds @ k * scale
    dk = ds.swapaxes(-1, -2) @ q * scale
    dqkv = np.empty_like(qkv)
    for place, grad in zip(split_qkv(dqkv, n_head), (dq, dk, dv), strict=True):
        place[...] = grad
    return dqkv
""",
    }, "wrong mask | missing mask"),
    # All right up to the last step: puts dq, dk, dv of each head side by side, and then the heads, so the layout is
    # [q0 k0 v0 q1 k1 v1 ...] where [q0 q1 ... k0 k1 ... v0 v1 ...] is wanted.
    ("attention", {
        "attention_backward": """\
def attention_backward(dy, qkv, lse, n_head, dropout):
    B, T, C3 = qkv.shape
    q, k, v = split_qkv(qkv, n_head)
    dy = split_heads(dy, n_head)
    p = np.exp(_scores(q, k) - lse[..., None]).astype(q.dtype)
    drop = _dropout_scale(p, dropout)
    dv = (p * drop).swapaxes(-1, -2) @ dy
    dp = (dy @ v.swapaxes(-1, -2)) * drop
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
    ds = ds / math.sqrt(q.shape[-1])
    dq = ds @ k
    dk = ds.swapaxes(-1, -2) @ q
    heads = np.concatenate([dq, dk, dv], axis=-1)  # (B, n_head, T, 3 hs)
    return heads.transpose(0, 2, 1, 3).reshape(B, T, C3)
""",
    }, "wrong index | reshape | wrong place"),
    # Undoes in the forward's order: softmax first, and then the dropout.  da goes through the softmax's gradient, and
    # the dropout scale is multiplied at the end (dp and ds swapped).
    ("attention", {
        "attention_backward": """\
def attention_backward(dy, qkv, lse, n_head, dropout):
    q, k, v = split_qkv(qkv, n_head)
    dy = split_heads(dy, n_head)
    p = np.exp(_scores(q, k) - lse[..., None]).astype(q.dtype)
    drop = _dropout_scale(p, dropout)
    a = p * drop
    # y = a @ v
    dv = a.swapaxes(-1, -2) @ dy
    dp = dy @ v.swapaxes(-1, -2)
    # softmax
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
    # dropout
    ds = ds * drop
    # s = q @ k.T / sqrt(hs)
    root = math.sqrt(q.shape[-1])
    dq = ds @ k / root
    dk = ds.swapaxes(-1, -2) @ q / root
    dqkv = np.empty_like(qkv)
    for place, grad in zip(split_qkv(dqkv, n_head), (dq, dk, dv), strict=True):
        place[...] = grad
    return dqkv
""",
    }, "wrong order"),
]  # fmt: skip
