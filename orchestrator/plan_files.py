"""Plan documents by their place: a file, or a key of a store (s3://bucket/artifacts/NAME/plan/...)."""

from quantcore.autoquant.document import Plan, parse, written
from quantcore.errors import SpecError, StoreError
from workers.store import open_file


def read_plan(place: str) -> tuple[Plan, bytes]:
    """A plan and its document. Raises StoreError where none is, SpecError where it is damaged."""
    store, name = open_file(place)
    data = store.get(name)
    try:
        return parse(data.decode()), data
    except (SpecError, UnicodeDecodeError) as error:
        raise SpecError(f"{place}: {error}") from None


def write_plan(place: str, plan: Plan) -> None:
    """Raises StoreError rather than write over another file."""
    store, name = open_file(place)
    if not store.put_if_absent(name, written(plan).encode()):
        raise StoreError(f"{place} is there already: name another file, or remove it")
