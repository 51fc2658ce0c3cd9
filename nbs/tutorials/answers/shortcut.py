import torch


def shortcut():
    z_qtm = -2 * torch.eye(4)  # prefers every other picture
    z_ctr = 20 * torch.eye(4)  # prefers the right one
    return z_qtm, z_ctr
