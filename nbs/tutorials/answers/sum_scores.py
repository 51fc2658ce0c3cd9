def sum_scores(reference, text, targets):
    query = F.normalize(reference + text, dim=-1)        # once, after adding
    return 100 * query @ F.normalize(targets, dim=-1).T
