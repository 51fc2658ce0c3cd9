"""The one error that cala raises when the cause lies with the user's input or machine, and not in a bug."""


class CalaError(Exception):
    "What is wrong, where, and what to do, in one line."
