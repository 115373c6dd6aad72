"""Tables of things by name, which a decorator fills, and other packages by their entry points."""

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from wisecli.errors import SettingsError, reason_of

Item = TypeVar("Item")


class Registry(Mapping[str, Item]):
    """Objects by unique names.

    Args:
        group: of the entry points by which other packages add things, such as ``wisecli.methods``.
    """

    def __init__(self, group: str) -> None:
        self.group = group
        self.items_by_name: dict[str, Item] = {}
        self._loaded = False

    def add(self, name: str, item: Item) -> None:
        """Add an object under a name.

        Raises:
            SettingsError: another has that name.
        """
        if self.items_by_name.setdefault(name, item) is not item:
            raise SettingsError(f"{name!r} is in {self.group} twice; give one of the two another name")

    def register(self, name: str) -> Callable[[Item], Item]:
        """Return a decorator that puts what it decorates under a name."""

        def put(item: Item) -> Item:
            self.add(name, item)
            return item

        return put

    def load_installed(self) -> None:
        """Add what other packages have, once. One may add itself as it is imported, too.

        Raises:
            SettingsError: what a package names cannot be imported, or its name is taken.
        """
        if self._loaded:
            return
        for entry in entry_points(group=self.group):
            try:
                item: Item = entry.load()
            except Exception as error:  # whatever another's code raises
                package = entry.dist.name if entry.dist is not None else entry.value
                raise SettingsError(
                    f"{entry.name!r} of the package {package} cannot be loaded ({reason_of(error)}); "
                    "mend or uninstall that package"
                ) from error
            self.add(entry.name, item)
        self._loaded = True

    def __getitem__(self, name: str) -> Item:
        return self.items_by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_by_name)

    def __len__(self) -> int:
        return len(self.items_by_name)
