"""Which options a function or class takes: asked before keyword arguments are passed on from a command line."""

from collections.abc import Callable
from inspect import signature


def list_options(
    function: Callable,  # a function, a bound method or a class
) -> list[str]:
    "The names of its parameters, in their order."
    return list(signature(function).parameters)


def accepts(
    function: Callable,  # a function, a bound method or a class
    option: str,  # a parameter's name
) -> bool:
    "True if the function has a parameter of that name."
    return option in list_options(function)
