"""A recipe with its overrides, `--section.field value`.

Options are generated from the types of the configuration (tyro), so there is no second list of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from cluster.imports import use_roots

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry

    from pipeline.config.run_config import RunConfig


def configuration(path: Path, algorithm: str, overrides: list[str], program: str) -> RunConfig:
    """The recipe in a file with its overrides. From now on the user's modules are found where the recipe's are."""
    from pipeline.config.recipe import load
    from pipeline.folder.user_code import code_before, roots_of, told_where

    use_roots(roots_of(path))
    with told_where(code_before(path)):
        return override(load(path, algorithm, checked=not overrides), overrides, program)


def override(config: RunConfig, overrides: list[str], program: str) -> RunConfig:
    """The configuration with overrides, checked.

    Raises ValueError for wrong values; tyro exits by itself for an unknown option, and after `--help`.
    """
    if not overrides:
        return config
    import tyro
    from pydantic import ValidationError

    from pipeline.config.errors import explain
    from pipeline.config.rules import check
    from pipeline.config.run_config import RunConfig

    settings = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    given = tyro.cli(
        RunConfig, default=config, args=overrides, prog=program, config=settings, registry=_as_in_a_recipe()
    )
    recipe = given.model_dump(warnings=False)
    try:
        return check(RunConfig.model_validate(recipe))
    except ValidationError as error:
        raise ValueError(explain(error, recipe)) from error


def _as_in_a_recipe() -> ConstructorRegistry:
    """The rules of tyro's parser here: booleans are true and false, and sections are checked later, as in a recipe."""
    from tyro import MISSING
    from tyro.constructors import (
        ConstructorRegistry,
        PrimitiveConstructorSpec,
        PrimitiveTypeInfo,
        StructConstructorSpec,
        StructFieldSpec,
        StructTypeInfo,
    )

    from cluster.config import Config

    registry = ConstructorRegistry()

    @registry.struct_rule
    def section(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not (isinstance(info.type, type) and issubclass(info.type, Config)):
            return None
        kind, hints = info.type, get_type_hints(info.type, include_extras=True)

        def unchecked(**values: Any) -> Config:
            return kind.model_construct(**values)

        unchecked.__doc__ = kind.__doc__  # what --help says of the section
        fields = [(name, field.description) for name, field in kind.model_fields.items()]
        given = []
        for name, text in fields:
            default = getattr(info.default, name, MISSING)
            of = type(default) if isinstance(default, Config) else hints[name]  # an algorithm's own settings
            given.append(StructFieldSpec(name=name, type=of, default=default, helptext=text))
        return StructConstructorSpec(instantiate=unchecked, fields=tuple(given))

    @registry.primitive_rule
    def boolean(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool] | None:
        if info.type is not bool:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="{true,false}",
            choices=("true", "false"),
            instance_from_str=lambda words: words[0] == "true",
            is_instance=lambda value: isinstance(value, bool),
            str_from_instance=lambda value: ["true" if value else "false"],
        )

    return registry
