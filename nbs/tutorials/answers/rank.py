def rank(scores, target):
    return 1 + (scores > scores[target]).sum()
