def recall_at(ranks, k):
    return 100 * (ranks <= k).float().mean()
