"""Strict YAML for settings: a duplicate key is an error."""

from typing import Any

import yaml


class YamlError(Exception):
    """Invalid YAML, or a duplicate key; the text has the reason and the line."""


MAX_BYTES = 2**18
_MAX_NODES, _MAX_LETTERS = 20_000, 10_000
"""Of a file without its aliases, and of one value."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader takes the last of two equal keys, which YAML forbids."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise YamlError(
                        f"has '{key.value}' twice, in lines {lines[name]} and {line}: keep one"
                    )
                lines[name] = line
        return node


def load(text: str | bytes) -> Any:
    """The plain values of a YAML document.

    Raises:
        YamlError: Invalid, or larger than settings are; the text is a predicate, to follow the
            file's name.
    """
    if len(text) > MAX_BYTES:
        raise YamlError(f"has {len(text):,} bytes; settings have at most {MAX_BYTES:,}")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_nodes(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        # Without PyYAML's excerpt, which may end within a password.
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise YamlError(f"is not YAML: {where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise YamlError(f"is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise YamlError("is nested too deeply to be read") from None
    except ValueError as error:  # such as a date with month 13, or bytes that are not text
        raise YamlError(f"is not YAML: {' '.join(str(error).split())[:200]}") from None


def _count_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Nodes below and including one, as many as there are without aliases.

    Args:
        node: Of the document.
        known: id of a node -> its count, 0 while it is being counted.

    Raises:
        YamlError: Too many, an alias within its own node, or a scalar that is too long.
    """
    if isinstance(node, yaml.ScalarNode):
        if len(node.value) > _MAX_LETTERS:
            raise YamlError(f"has a value of {len(node.value):,} letters; max {_MAX_LETTERS:,}")
        return 1
    if id(node) not in known:
        known[id(node)], count = 0, 1
        for child in node.value:
            for each in child if isinstance(child, tuple) else (child,):
                count += _count_nodes(each, known)
        known[id(node)] = count
    if not known[id(node)]:
        raise YamlError("has an alias within its own node")
    if known[id(node)] > _MAX_NODES:
        raise YamlError(f"has more than {_MAX_NODES:,} values, counting each alias")
    return known[id(node)]
