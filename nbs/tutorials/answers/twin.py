def twin(attend, reference, target):
    tokens = target
    for _ in range(4):
        tokens = attend(reference, tokens)  # the queries stay the same, the tokens change
    return tokens[0]
