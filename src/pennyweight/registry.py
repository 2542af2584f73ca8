"""One class for everything that can be added: a table from a name to a thing, filled by one file per thing."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from pennyweight.errors import RegistryError, nearest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Names to entries. The entries of a plugin package are imported on first use.

    Args:
        what: what the entries are, in the plural, for error messages.
        package: the package whose modules register the entries.

    Raises:
        RegistryError: on a name that is unknown or taken.
    """

    def __init__(self, what: str, package: str = "") -> None:
        self.what, self.package = what, package
        self._entries: dict[str, T] = {}
        self._loaded = not package

    def add(self, name: str, entry: T) -> T:
        """Register `entry` under `name` and return it."""
        if name in self._entries:
            raise RegistryError(f"{name!r} is registered twice among the {self.what}")
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of `add`."""
        return lambda entry: self.add(name, entry)

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")

    def __getitem__(self, name: str) -> T:
        self._load()
        try:
            return self._entries[name]
        except KeyError:
            hint = nearest(str(name), self._entries, self.what)
            raise RegistryError(f"{name!r} is not among the {self.what}", hint=hint) from None

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._load()
        return len(self._entries)
