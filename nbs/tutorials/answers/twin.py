def twin(attend, reference, target):
    seen = target
    for _ in range(4): seen = attend(reference, seen)    # the question stays, what is looked at changes
    return seen[0]
