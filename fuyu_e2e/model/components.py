"""Parts of a decoder that stored settings name: connectors, blocks and masks, of this package or a user's own."""

import sys
from dataclasses import asdict
from typing import Any, TypeVar, cast

from fuyu_e2e.errors import UserError

T = TypeVar("T")


def to_settings(component: Any, default: type) -> dict[str, Any]:
    """Returns the fields of a component, a dataclass, in primitives.

    One of another class than the default is written as recipes name it: the path of its class, and the fields.
    """
    fields = asdict(component)
    kind = type(component)
    return fields if kind is default else {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": fields}


def from_settings(settings: dict[str, Any], default: type[T], base: type) -> T:
    """The inverse of `to_settings`.

    Imports nothing but this package: whoever reads a checkpoint doesn't run what it names.

    Args:
        settings: As they were stored.
        default: The class of settings that name none.
        base: That the class has to be a subclass of.

    Raises:
        UserError: The class isn't imported.
    """
    if "class_path" not in settings:
        return default(**settings)
    module, _, name = settings["class_path"].rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise UserError(
            f"The model is made with {settings['class_path']}, which is not imported: say --allow-imports {module} if "
            "you trust it, or import it first."
        )
    return cast(type[T], kind)(**settings["init_args"])
