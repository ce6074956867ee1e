"""What each parameter of a model is for, by the type of its module and its shape: an optimizer's rules go by it.

    embedding   the weight of an nn.Embedding, also where a head is tied to it: its rows are separate vectors
    head        the weight of the linear layer that gives the outputs
    matrix      any other tensor of two axes: it maps features to features
    kernel      a tensor with more axes, such as a convolution's
    vector      a tensor with fewer: biases, gains, initial states

Names do not matter, so wrapper prefixes do not either. A module can override the roles of parameters below it: its
method `roles()` returns {name below the module: role}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from reroll.errors import UsageError

ROLES = ("matrix", "kernel", "embedding", "head", "vector")
"""Every role of a parameter."""


def roles(model: nn.Module | Mapping[str, Tensor]) -> dict[str, str]:
    """Return the role of every trainable parameter by canonical name, tied ones once; of tensors by name, by shape.

    The head is `model.head` of the first module that declares `headed` (`reroll.models.base.Headed`); without one, the
    last module with a matrix, if it is an `nn.Linear`.

    Raises:
        UsageError: if a module's `roles()` names a parameter it does not have, or a role that does not exist.

    Example:
        >>> roles(nn.Sequential(nn.Embedding(9, 4), nn.Conv1d(4, 4, 3), nn.Linear(4, 9, bias=False)))
        {'0.weight': 'embedding', '1.weight': 'kernel', '1.bias': 'vector', '2.weight': 'head'}
    """
    special: dict[int, str] = {}
    if isinstance(model, nn.Module):
        if isinstance(head := _head(model), nn.Linear):
            special[id(head.weight)] = "head"
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
        special |= {id(m.weight): "embedding" for m in embeddings}
        for module in model.modules():
            special |= _declared(module)
        parameters = {canonical_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    else:
        parameters = dict(model)
    by_axes = {0: "vector", 1: "vector", 2: "matrix"}
    return {name: special.get(id(p), by_axes.get(p.dim(), "kernel")) for name, p in parameters.items()}


def canonical_name(name: str) -> str:
    """Return a parameter's name without the prefixes that wrappers add.

    Example:
        >>> canonical_name("_orig_mod.module.cells.0._fsdp_wrapped_module.bias")
        'cells.0.bias'
    """
    parts = [part for part in name.split(".") if part not in ("_orig_mod", "_fsdp_wrapped_module")]
    while len(parts) > 1 and parts[0] == "module":
        parts.pop(0)
    return ".".join(parts)


def _head(model: nn.Module) -> Any:
    for module in model.modules():
        if hasattr(type(module), "headed"):
            return module.head
    with_matrix = [m for m in model.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))]
    return with_matrix[-1] if with_matrix else None


def _declared(module: nn.Module) -> dict[int, str]:
    """The roles that a module declares by its method `roles`, by the identity of the parameter."""
    declare: Any = getattr(type(module), "roles", None)
    if declare is None:
        return {}
    parameters, declared = dict(module.named_parameters(remove_duplicate=False)), declare(module)
    for name, role in declared.items():
        if name not in parameters or role not in ROLES:
            raise UsageError(
                f"{type(module).__name__}.roles() gives {name!r} the role {role!r}; it takes parameters of the module "
                f"and {', '.join(ROLES)}."
            )
    return {id(parameters[name]): role for name, role in declared.items()}
