def subset_rank(scores, reference, target, group):
    others = group[group != reference]  # five, with the target among them
    return 1 + (scores[others] > scores[target]).sum()
