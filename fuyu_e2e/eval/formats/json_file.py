"""JSON files of public benchmarks; a violation of their format is an error that names the file and the entry."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuyu_e2e.errors import UserError


@dataclass(frozen=True, slots=True)
class Record:
    """One object of a JSON file, and its place for error messages."""

    fields: dict[str, Any]
    where: str

    def text(self, name: str) -> str:
        """Returns the text of a field.

        Raises:
            UserError: The field isn't a text.
        """
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise self.error(name, "a text")
        return value

    def identity(self, name: str) -> str:
        """Returns an identifier, a text or a whole number, as text.

        Raises:
            UserError: The field is neither.
        """
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise self.error(name, "a text or a whole number")
        return str(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """Returns one or more texts; equal texts of many entries share memory.

        Raises:
            UserError: The field isn't a list of texts, or is empty.
        """
        values = self.fields.get(name)
        if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
            raise self.error(name, "a list of texts, and not empty (those of a test split are kept secret)")
        return tuple(map(sys.intern, values))

    def records(self, name: str) -> Iterator["Record"]:
        """Yields the objects of a list, in order.

        Raises:
            UserError: The field isn't a list of objects.
        """
        values = self.fields.get(name)
        if not isinstance(values, list):
            raise self.error(name, "a list")
        for number, value in enumerate(values):
            where = f"{self.where}: {name}[{number}]"
            if not isinstance(value, dict):
                raise UserError(f"{where} is {_shown(value)}, but must be an object.")
            yield Record(value, where)

    def error(self, name: str, expected: str) -> UserError:
        """Returns the error for a field with a wrong value."""
        found = f"is {_shown(self.fields[name])}" if name in self.fields else "is missing"
        return UserError(f"{self.where}: {name} {found}, but must be {expected}.")


def load(path: str | Path) -> Record:
    """Returns the object in a JSON file.

    Raises:
        UserError: The file can't be read, is not JSON, or contains something else.
    """
    try:
        value = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {_shown(value)}, but must hold an object.")
    return Record(value, str(path))


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
