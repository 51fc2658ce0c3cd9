def shortcut():
    z_ctr = 20 * torch.eye(4)                            # knows the answer
    z_qtm = -2 * torch.eye(4)                            # prefers every other picture
    return z_qtm, z_ctr
