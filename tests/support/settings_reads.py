"""Which fields of settings the product reads, told by the types that mypy finds.

A name alone would prove little: `x.name` is read of many things. Here a read counts for the class
that declares the field, wherever the expression's type is that class, a subclass, or a union with
one. What does not count: validators (they check a value, they do not act on it),
`model_dump(mode="json")`, which only writes a file, and `model_dump(include=...)`, which hands
fields on to settings that declare them too and must be read there. `model_dump()` counts for all
fields that it does not exclude, since its values go on into another object. A field that can have
one value only (a version) tells nothing and needs no reader.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mypy import build, nodes, types
from mypy.find_sources import create_source_list
from mypy.options import Options

VALIDATORS = frozenset({"model_validator", "field_validator", "model_serializer"})


@dataclass(slots=True)
class FieldReads:
    """By class: the fields that it declares, and those that are read somewhere."""

    declared: dict[str, set[str]] = field(default_factory=dict)
    read: dict[str, set[str]] = field(default_factory=dict)

    def unread(self) -> list[str]:
        """`module.Class.field` of every field that nothing reads."""
        return sorted(
            f"{owner}.{name}"
            for owner, names in self.declared.items()
            for name in names - self.read.get(owner, set())
        )


def find_reads(root: Path, packages: list[str], *, base: str) -> FieldReads:
    """The fields of all subclasses of `base` (a full name) in these packages below `root`."""
    result = build.build(
        create_source_list([str(root / package) for package in packages], _options(root)),
        _options(root),
    )
    found = FieldReads()
    infos = {}
    for state in result.graph.values():
        for info in _classes(state.tree):
            if info.fullname != base and any(each.fullname == base for each in info.mro):
                infos[info.fullname] = info
    for info in infos.values():
        found.declared[info.fullname] = set(_fields(info))
    _Reads(result.types, infos, found).collect()
    return found


def _options(root: Path) -> Options:
    """Our own code only: types of libraries take most of the time and are not asked about."""
    options = Options()
    options.export_types = True
    options.preserve_asts = True
    options.incremental = False
    options.follow_imports = "skip"
    options.ignore_missing_imports = True
    options.explicit_package_bases = True
    options.mypy_path = [str(root)]
    options.exclude = [r"_pb2"]
    return options


def _classes(tree: nodes.MypyFile | None) -> Iterator[nodes.TypeInfo]:
    if tree is not None:
        for _, node, _ in tree.local_definitions():
            if isinstance(node.node, nodes.TypeInfo):
                yield node.node


def _fields(info: nodes.TypeInfo) -> Iterator[str]:
    """Annotated in the class itself; no methods, constants or private names."""
    for statement in info.defn.defs.body:
        if isinstance(statement, nodes.AssignmentStmt) and statement.unanalyzed_type is not None:
            (target,) = statement.lvalues
            if not isinstance(target, nodes.NameExpr) or target.name.startswith("_"):
                continue
            if isinstance(target.node, nodes.Var) and target.node.is_classvar:
                continue
            declared = types.get_proper_type(statement.type)
            if not isinstance(declared, types.LiteralType):
                yield target.name


class _Reads:
    """Adds what expressions read."""

    def __init__(
        self,
        expression_types: Mapping[nodes.Expression, types.Type],
        infos: Mapping[str, nodes.TypeInfo],
        found: FieldReads,
    ) -> None:
        self._types = expression_types
        self._infos = infos
        self._found = found
        self._validators = {name: list(_validators(info)) for name, info in infos.items()}

    def collect(self) -> None:
        for expression in list(self._types):
            if isinstance(expression, nodes.MemberExpr):
                if not self._is_in_validator(expression):
                    for info in self._models(expression.expr):
                        self._add(info, expression.name)
            elif isinstance(expression, nodes.CallExpr):
                self._take_dump(expression)

    def _is_in_validator(self, expression: nodes.MemberExpr) -> bool:
        """Whether it starts from the `self` of a method that checks values."""
        root: nodes.Expression = expression
        while isinstance(root, nodes.MemberExpr):
            root = root.expr
        if not isinstance(root, nodes.NameExpr) or root.name != "self":
            return False
        return any(
            expression.line in lines
            for info in self._models(root)
            for lines in self._validators[info.fullname]
        )

    def _take_dump(self, call: nodes.CallExpr) -> None:
        callee = call.callee
        arguments = dict(zip(call.arg_names, call.args, strict=True))
        if not isinstance(callee, nodes.MemberExpr) or callee.name != "model_dump":
            return
        if "mode" in arguments or "include" in arguments:
            return
        excluded = _strings(arguments.get("exclude"))
        for info in self._models(callee.expr):
            kinds = [each for each in self._infos.values() if info in each.mro]
            for kind in kinds:  # what is dumped is what the object is, not what it is declared as
                for owner in kind.mro:
                    for name in self._found.declared.get(owner.fullname, set()) - excluded:
                        self._add(kind, name)

    def _add(self, info: nodes.TypeInfo, name: str) -> None:
        """For the class that declares `name`."""
        for owner in info.mro:
            if name in self._found.declared.get(owner.fullname, ()):
                self._found.read.setdefault(owner.fullname, set()).add(name)

    def _models(self, expression: nodes.Expression) -> Iterator[nodes.TypeInfo]:
        known = self._types.get(expression)
        for each in _members(known) if known is not None else ():
            if isinstance(each, types.Instance) and each.type.fullname in self._infos:
                yield each.type


def _members(kind: types.Type) -> Iterator[types.ProperType]:
    proper = types.get_proper_type(kind)
    if isinstance(proper, types.UnionType):
        for item in proper.items:
            yield from _members(item)
    elif isinstance(proper, types.TypeVarType):
        yield from _members(proper.upper_bound)
    else:
        yield proper


def _validators(info: nodes.TypeInfo) -> Iterator[range]:
    """The lines of methods that check values."""
    for statement in info.defn.defs.body:
        if isinstance(statement, nodes.Decorator):
            names = {_called_name(each) for each in statement.original_decorators}
            if names & VALIDATORS:
                yield range(statement.line, (statement.func.end_line or statement.line) + 1)


def _called_name(expression: nodes.Expression) -> str:
    callee = expression.callee if isinstance(expression, nodes.CallExpr) else expression
    return callee.name if isinstance(callee, nodes.NameExpr | nodes.MemberExpr) else ""


def _strings(expression: nodes.Expression | None) -> set[str]:
    items = expression.items if isinstance(expression, nodes.SetExpr) else []
    return {item.value for item in items if isinstance(item, nodes.StrExpr)}
