def attention(queries, keys, values):
    weights = (queries @ keys.T / queries.shape[-1] ** 0.5).softmax(-1)  # (Q, N), each row sums to 1
    return weights @ values
