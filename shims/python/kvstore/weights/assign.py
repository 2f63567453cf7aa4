"""Gives tensors to a torch module as its parameters and buffers, without a copy, and keeps tied what the module ties."""

from __future__ import annotations

from kvstore import Invalid

__all__ = ["check", "fill"]

_DTYPES = ("same", "snapshot", "module")


def check(module, dtype: str) -> None:
    """Refuses what is no module, and another ``dtype``."""
    import torch

    if not isinstance(module, torch.nn.Module):
        what = f"{type(module).__name__} is neither a torch module, nor a class with from_pretrained, nor a path in the snapshot"
        raise Invalid(f"model_or_path: {what}")
    if dtype not in _DTYPES:
        raise Invalid(f"dtype: {dtype!r} is not valid; use one of {', '.join(_DTYPES)}")


def fill(module, tensors: dict, strict: bool = True, dtype: str = "same"):
    """Gives ``tensors`` to a module, and returns it. Raises Invalid, and leaves the module as it was, if they do not fit."""
    groups = _groups(module)
    state, used = {}, set()
    missing = []
    for names, own in groups:
        there = [name for name in names if name in tensors]
        used.update(there)
        if not there:
            missing.append(names[0])
            continue
        tensor = _one(tensors, there)
        _fits(there[0], own, tensor, dtype)
        state.update(dict.fromkeys(names, _at_home(own, tensor, dtype)))
    _separate(groups, state)
    extra = [name for name in tensors if name not in used]
    if strict and (missing or extra):
        raise Invalid(f"the snapshot does not fit the module: missing are {_some(missing)}; not in the module are {_some(extra)}")
    left = [name for name in missing if _is_meta(module, name)] + _unsaved_on_meta(module)
    if left:
        raise Invalid(f"the module has these on the meta device, and the snapshot does not have them: {_some(left)}")
    module.load_state_dict(state, strict=False, assign=True)
    _tie(module, groups, state)
    return module


def _groups(module) -> list[tuple[list[str], object]]:
    """Names of each parameter and saved buffer; those that the module ties are in one group."""
    groups: dict[int, tuple[list[str], object]] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        saved = {name: one for name, one in part._buffers.items() if name not in part._non_persistent_buffers_set}
        for name, one in {**part._parameters, **saved}.items():
            if one is not None:
                groups.setdefault(id(one), ([], one))[0].append(f"{prefix}.{name}" if prefix else name)
    return list(groups.values())


def _one(tensors: dict, names: list[str]):
    """The tensor of names that the module ties. The snapshot may have it under several of them."""
    first = tensors[names[0]]
    for name in names[1:]:
        other = tensors[name]
        is_same = other is first or (other.dtype == first.dtype and other.shape == first.shape and _bytes_equal(first, other))
        if not is_same:
            raise Invalid(f"the module ties {names[0]} and {name}, and the snapshot has other values for each")
    return first


def _bytes_equal(one, other) -> bool:
    import torch

    # Of bytes: NaN equals NaN, and types without arithmetic can be compared.
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*flat)


def _fits(name: str, own, tensor, dtype: str) -> None:
    if own.shape != tensor.shape:
        raise Invalid(f"{name}: the module has the shape {tuple(own.shape)}, the snapshot {tuple(tensor.shape)}")
    if dtype == "same" and own.dtype != tensor.dtype:
        raise Invalid(
            f'{name}: the module has {own.dtype}, the snapshot {tensor.dtype}; dtype="snapshot" takes the snapshot\'s, "module" converts'
        )


def _at_home(own, tensor, dtype: str):
    if dtype == "module":
        tensor = tensor.to(own.dtype)
    return tensor if own.device.type in ("cpu", "meta") else tensor.to(own.device)


def _separate(groups, state: dict) -> None:
    """Parameters that the module does not tie do not share memory: one that is written to must not change another."""
    taken: dict[tuple, str] = {}
    for names, _ in groups:
        tensor = state.get(names[0])
        if tensor is None or not tensor.numel():
            continue
        key = (tensor.device, tensor.untyped_storage().data_ptr())
        if taken.setdefault(key, names[0]) != names[0]:
            state.update(dict.fromkeys(names, tensor.clone()))


def _tie(module, groups, state: dict) -> None:
    for names, _ in groups:
        if len(names) < 2 or names[0] not in state:
            continue
        first = _of(module, names[0])
        for name in names[1:]:
            part, _, last = name.rpartition(".")
            owner = module.get_submodule(part)
            (owner._parameters if last in owner._parameters else owner._buffers)[last] = first


def _of(module, name: str):
    part, _, last = name.rpartition(".")
    return getattr(module.get_submodule(part), last)


def _is_meta(module, name: str) -> bool:
    return _of(module, name).is_meta


def _unsaved_on_meta(module) -> list[str]:
    found = []
    for prefix, part in module.named_modules():
        for name in part._non_persistent_buffers_set:
            one = part._buffers.get(name)
            if one is not None and one.is_meta:
                found.append(f"{prefix}.{name}" if prefix else name)
    return found


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
