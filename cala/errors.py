"""The one error that cala raises when the cause lies with the user's input or machine, and not in a bug.

Its messages count things, in the singular or in the plural."""


class CalaError(Exception):
    "What is wrong, where, and what to do, in one line."


def count_things(
    count: int,
    singular: str,
    plural: str,
) -> str:
    "A number with its noun: 1 query, 2,297 queries."
    return f"{count:,} {singular if count == 1 else plural}"


def is_or_are(
    count: int,
) -> str:
    "The verb of `1 of 18 pictures is missing` and `2 of 18 pictures are missing`."
    return "is" if count == 1 else "are"
