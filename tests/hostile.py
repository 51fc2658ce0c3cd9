"A torch file that tries to run code when it is opened, in the three forms that such files have."

import os
import pickle

import torch


class Bomb:
    "Makes a folder when it is unpickled."

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


BOMBS = {  # name of the form: writes {key: bomb} to a path
    "torch": lambda bomb, path, key: torch.save({"epoch": 1, key: bomb}, path),
    "old torch": lambda bomb, path, key: torch.save(
        {"epoch": 1, key: bomb}, path, _use_new_zipfile_serialization=False
    ),
    "pickle": lambda bomb, path, key: path.write_bytes(pickle.dumps({key: bomb})),
}
