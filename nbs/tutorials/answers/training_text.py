def training_text(c1, c2, u):
    c1, c2 = c1.strip(".?, "), c2.strip(".?, ")
    forms = (f"{c1} and {c2}", f"{c2} and {c1}", c1, c2)
    return forms[int(4 * u)].capitalize()
