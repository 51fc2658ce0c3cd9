import torch.nn.functional as F


def sum_scores(reference, text, targets):
    query = F.normalize(reference + text, dim=-1)  # once, after the addition
    return 100 * query @ F.normalize(targets, dim=-1).T
