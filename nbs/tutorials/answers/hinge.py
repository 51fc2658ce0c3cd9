def hinge(Q, K, K2, V):
    d = Q.shape[-1]
    A = Q @ K.T / d**0.5  # (L_r, L_c)
    B = K @ K2.T / d**0.5  # (L_c, L_t)
    return ((A @ B).softmax(-1) @ V)[0]
