from cala.contrast import contrast


def mixed_loss(z_qtm, z_tbia, z_ctr):
    mixed = 0.55 * z_qtm + 0.45 * z_ctr  # logits, before any loss
    return 0.9 * contrast(mixed) + 0.1 * contrast(z_tbia)
