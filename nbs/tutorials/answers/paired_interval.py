def paired_interval(a, b):
    n, p, q = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    return 100 * (p - q) / n, 196 * math.sqrt(p + q - (p - q) ** 2 / n) / n
