import math


def paired_interval(a, b):
    n = len(a)
    p = int((a & ~b).sum())  # only a found the target
    q = int((b & ~a).sum())  # only b found the target
    return 100 * (p - q) / n, 196 * math.sqrt(p + q - (p - q) ** 2 / n) / n
