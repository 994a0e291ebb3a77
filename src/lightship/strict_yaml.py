"""Strict YAML for settings: a duplicate key is an error."""

from typing import Any

import yaml


class YamlError(Exception):
    """Invalid YAML, or a duplicate key; the text has the reason and the line."""


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
        YamlError: Invalid; the text is a predicate, to follow the file's name.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise YamlError(f"is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise YamlError("is nested too deeply to be read") from None
    except ValueError as error:  # such as a date with month 13, or bytes that are not text
        raise YamlError(f"is not YAML: {' '.join(str(error).split())[:200]}") from None
