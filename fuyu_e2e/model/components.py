"""Parts of a decoder that stored settings name: connectors, blocks and masks, of this package or a user's own."""

import sys
from dataclasses import asdict
from typing import Any, TypeVar, cast

from fuyu_e2e.errors import UserError

T = TypeVar("T")


class NotImportedError(UserError):
    """Stored settings name a class that nobody imported."""


def to_settings(component: Any, default: type) -> dict[str, Any]:
    """Returns the fields of a component, a dataclass, as primitives.

    A component of another class than the default is written as in a recipe: its class path and its fields.
    """
    fields = asdict(component)
    kind = type(component)
    return fields if kind is default else {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": fields}


def from_settings(settings: dict[str, Any], default: type[T], base: type) -> T:
    """Returns the component that `to_settings` described.

    Imports nothing but this package: reading a checkpoint must not run the code that it names.

    Args:
        settings: The stored settings.
        default: The class of settings without a class path.
        base: The class that the component must derive from.

    Raises:
        NotImportedError: The class isn't imported.
    """
    if "class_path" not in settings:
        return default(**settings)
    module, _, name = settings["class_path"].rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise NotImportedError(
            f"The model is made with {settings['class_path']}, which is not imported: say --allow-imports {module} if "
            "you trust it, or import it first."
        )
    return cast(type[T], kind)(**settings["init_args"])
