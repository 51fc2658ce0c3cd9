def mixed_loss(z_qtm, z_ctr, z_tbia):
    mixed = 0.45 * z_ctr + 0.55 * z_qtm                  # logits, before any loss
    return 0.9 * contrast(mixed) + 0.1 * contrast(z_tbia)
