def masked_mean(tokens, mask):
    real = mask[..., None].float()  # (B, L, 1)
    return (tokens * real).sum(1) / real.sum(1)
