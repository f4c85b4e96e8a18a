from collections.abc import Callable, Iterable, Mapping
from types import GenericAlias
from typing import Any, Generic, TypeVar, overload

from typing_extensions import disjoint_base

__all__ = ["Table"]

_K = TypeVar("_K")
_V = TypeVar("_V")
_D = TypeVar("_D")

@disjoint_base
class Table(Generic[_K, _V]):
    max_weight: float
    hits: int
    misses: int
    puts: int
    refused: int
    evictions: int
    expirations: int
    removals: int
    _loading: dict[Any, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Table[_K, _V]: ...
    def __init__(
        self,
        max_weight: float,
        *,
        weigher: Callable[..., float] | None = None,
        pairwise: bool = False,
        ttl: float | None = None,
        on_evict: Callable[[_K, _V], object] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None: ...
    def __class_getitem__(cls, item: Any, /) -> GenericAlias: ...
    def __contains__(self, key: object, /) -> bool: ...
    def __len__(self, /) -> int: ...
    @property
    def weight(self) -> float: ...
    @overload
    def get(self, key: _K, default: None = None) -> _V | None: ...
    @overload
    def get(self, key: _K, default: _D) -> _V | _D: ...
    @overload
    def get_many(self, keys: Iterable[_K], default: None = None) -> list[_V | None]: ...
    @overload
    def get_many(self, keys: Iterable[_K], default: _D) -> list[_V | _D]: ...
    def keys(self) -> list[_K]: ...
    def put(self, key: _K, value: _V, *, weight: float | None = None, ttl: float | None = None) -> bool: ...
    def put_many(
        self,
        items: Mapping[_K, _V] | Iterable[tuple[_K, _V]],
        *,
        weight: float | None = None,
        ttl: float | None = None,
    ) -> int: ...
    def reweigh(self, key: _K, weight: float | None = None) -> bool: ...
    @overload
    def pop(self, key: _K, default: None = None) -> _V | None: ...
    @overload
    def pop(self, key: _K, default: _D) -> _V | _D: ...
    def clear(self) -> None: ...
