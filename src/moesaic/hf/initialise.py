"""Initial weights of a model tensor by tensor, bit for bit those of a model that is built whole.

A model of transformers gets its weights in two places: constructors of modules draw some, and `initialize_weights`, which
`post_init` calls, draws nearly all of them again. Both take random numbers from torch's generator of the CPU, one after
the other. Here the model is built without storage, both are written down in their order, and then replayed with one
module's tensors at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from moesaic.errors import UnsupportedModel
from moesaic.hf.compat import around_init_weights, not_drawn, wrap_method

# What overwrites a whole tensor whatever it held.
_OVERWRITES = {"aten::normal_", "aten::uniform_", "aten::fill_", "aten::zero_", "aten::copy_"}

Deliver = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class _Like:
    shape: torch.Size
    dtype: torch.dtype


@dataclass
class _Draw:
    """Random numbers that a constructor drew; tensors among the arguments are given by shape and dtype."""

    function: Any
    args: list[Any]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, function: Any, args: Any, kwargs: dict[str, Any]) -> _Draw:
        # A later cast would change the tensors themselves.
        given = [_Like(arg.shape, arg.dtype) if isinstance(arg, Tensor) else arg for arg in args]
        return cls(function, given, kwargs)

    def replay(self) -> None:
        args = [torch.empty(arg.shape, dtype=arg.dtype) if isinstance(arg, _Like) else arg for arg in self.args]
        kwargs = {name: torch.device("cpu") if name == "device" else value for name, value in self.kwargs.items()}
        self.function(*args, **kwargs)


@dataclass
class _Initialise:
    """A model that initialised all of its modules that were not, in these dtypes."""

    model: PreTrainedModel
    default_dtype: torch.dtype
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)


class InitialWeights:
    """The weights that `build` would give its model, to be had one module at a time.

    Args:
        build: makes the model; it is called with the meta device as torch's default device.

    Attributes:
        model: the model, without storage.

    Raises:
        UnsupportedModel: if `build` draws random numbers outside of tensors of the model.
    """

    def __init__(self, build: Callable[[], PreTrainedModel]) -> None:
        self._script: list[_Draw | _Initialise] = []
        with torch.device("meta"), _RecordDraws(self._script), around_init_weights(self._write_down):
            self.model = build()
        self._dtypes: dict[nn.Module, dict[str, torch.dtype]] = {}
        self._paths = {module: path for path, module in self.model.named_modules()}
        self._storages = {
            tensor.untyped_storage()._cdata: (module, leaf)
            for module in self.model.modules()
            for leaf, tensor in [*_own(module._parameters), *_own(module._buffers)]
        }

    def _write_down(self, model: PreTrainedModel) -> None:
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        dtypes = {name: tensor.dtype for name, tensor in tensors}
        self._script.append(_Initialise(model, torch.get_default_dtype(), dtypes))

    def buffers(self, deliver: Deliver) -> None:
        """Initial values of the buffers alone, of which a checkpoint holds some only; parameters are not drawn.

        Args:
            deliver: as for `replay`.
        """
        names = {name for name, _ in self.model.named_buffers()}

        def deliver_buffer(name: str, tensor: Tensor) -> None:
            if name in names:
                deliver(name, tensor)

        with_buffers = {module for module in self.model.modules() if _own(module._buffers)}
        for act in self._script:
            if isinstance(act, _Initialise):
                self._initialise(act, deliver_buffer, with_buffers)

    def replay(self, deliver: Deliver) -> None:
        """Draw all weights, from the state of torch's generator of the CPU on, which is then as after `build()`.

        A model's weights are drawn once: a second time, or after `buffers`, takes another object.

        Args:
            deliver: gets the name of each parameter and buffer, and the whole tensor on the CPU, which it must not keep.
                Where a module changes a tensor of a child of its own, that comes again, and the last one counts.

        Raises:
            UnsupportedModel: if the model leaves some tensor as its constructor made it, or initialises one from others.
        """
        delivered: set[str] = set()
        tied = set(self.model.all_tied_weights_keys)

        def deliver_once_tied(name: str, tensor: Tensor) -> None:
            # A tied one is drawn, then replaced by the one that it is tied to.
            if name not in tied:
                deliver(name, tensor)
            delivered.add(name)

        for act in self._script:
            if isinstance(act, _Draw):
                act.replay()
            else:
                self._initialise(act, deliver_once_tied)
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        missing = sorted(name for name, _ in named if name not in delivered)
        if missing:
            raise UnsupportedModel(
                f"{type(self.model).__name__} can't be initialised in parts: its _init_weights leaves {missing[0]} as the "
                "constructor made it; train with one process"
            )

    def _initialise(self, act: _Initialise, deliver: Deliver, only: set[nn.Module] | None = None) -> None:
        for name, dtype in act.dtypes.items():
            path, _, leaf = name.rpartition(".")
            self._dtypes.setdefault(act.model.get_submodule(path), {})[leaf] = dtype

        def around(method: Callable[[nn.Module], None], module: nn.Module) -> None:
            if only is None or module in only:
                self._initialise_module(method, module, deliver)

        undo = [
            wrap_method(model, "_init_weights", around)
            for model in act.model.modules()
            if isinstance(model, PreTrainedModel)
        ]
        before = torch.get_default_dtype()
        torch.set_default_dtype(act.default_dtype)
        try:
            act.model.initialize_weights()
        except NotImplementedError as error:  # a copy of what has no storage
            raise _made_from_others(str(error)) from error
        finally:
            torch.set_default_dtype(before)
            for take_out in undo:
                take_out()

    def _initialise_module(self, method: Callable[[nn.Module], None], module: nn.Module, deliver: Deliver) -> None:
        """Run `_init_weights` on a module whose tensors have storage while it runs."""
        own = [*_own(module._parameters), *_own(module._buffers)]
        # A constructor may add some after the weights were initialised.
        places = [(module, leaf) for leaf, _ in own if leaf in self._dtypes.get(module, {})]
        state, given = torch.get_rng_state(), len(places)
        while True:
            with self._stored(places) as tensors, _WatchWrites(self._storages) as watch:
                method(module)
            # Some modules also initialise tensors of modules below them: then again, with storage for those.
            if not watch.written:
                break
            places += watch.written
            torch.set_rng_state(state)
        for index, ((owner, leaf), tensor) in enumerate(zip(places, tensors, strict=True)):
            # What nothing wrote to is not initialised by this module.
            if tensor._version or index >= given:
                path = self._paths[owner]
                deliver(f"{path}.{leaf}" if path else leaf, tensor.detach())

    @contextlib.contextmanager
    def _stored(self, places: list[tuple[nn.Module, str]]) -> Iterator[list[Tensor]]:
        """Uninitialised tensors on the CPU in the place of those without storage."""
        tensors: list[Tensor] = []
        before: list[tuple[dict[str, Any], str, Tensor]] = []
        try:
            for owner, leaf in places:
                tensor_by_leaf: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
                old = tensor_by_leaf[leaf]
                before.append((tensor_by_leaf, leaf, old))
                dtype = self._dtypes[owner][leaf]
                new = torch.empty(old.shape, dtype=dtype, device="cpu")
                if isinstance(old, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=False)
                tensor_by_leaf[leaf] = new
                tensors.append(new)
            yield tensors
        finally:
            for tensor_by_leaf, leaf, old in before:
                tensor_by_leaf[leaf] = old


class _RecordDraws(TorchDispatchMode):
    """Writes down each random draw of constructors; see `compat.without_storage` for those that don't happen."""

    def __init__(self, script: list[Any]) -> None:
        super().__init__()
        self.script = script

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and not not_drawn():
            if not result.is_meta:
                raise UnsupportedModel(
                    f"this model can't be initialised in parts: a constructor draws random numbers ({func}) on the "
                    f"device {result.device} of its own choice; train with one process"
                )
            self.script.append(_Draw.of(func, args, kwargs))
        return result


class _WatchWrites(TorchDispatchMode):
    """Finds tensors of the model without storage that something writes to; refuses to read one.

    Attributes:
        written: their modules and names.
    """

    def __init__(self, storages: dict[int, tuple[nn.Module, str]]) -> None:
        super().__init__()
        self.storages = storages
        self.written: list[tuple[nn.Module, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            place = self._place(value)
            if place is None:
                continue
            if argument.alias_info is None:
                # With one argument on the CPU, operations take one without storage for nothing at all.
                raise _made_from_others(f"{place[1]} of class {type(place[0]).__name__} by {func}")
            if argument.alias_info.is_write and place not in self.written:
                owner, leaf = place
                if value.numel() != getattr(owner, leaf).numel() or func._schema.name not in _OVERWRITES:
                    raise UnsupportedModel(
                        f"this model can't be initialised in parts: a module changes parts of {leaf} of another one, "
                        f"of class {type(owner).__name__}; train with one process"
                    )
                self.written.append(place)
        return func(*args, **(kwargs or {}))

    def _place(self, value: Any) -> tuple[nn.Module, str] | None:
        is_one = isinstance(value, Tensor) and value.is_meta
        return self.storages.get(value.untyped_storage()._cdata) if is_one else None


def _made_from_others(what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"this model can't be initialised in parts: a module's weights are made from those of another one ({what}); "
        "train with one process"
    )


def _own(tensors: dict[str, Any]) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
