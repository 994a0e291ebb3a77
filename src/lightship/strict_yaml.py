"""YAML of settings, read without losing anything: a key that is written twice is an error."""

from typing import Any

import yaml


class YamlError(Exception):
    """The text is not YAML, or not YAML that settings can be read from; says why, and the line."""


class _Loader(yaml.SafeLoader):
    """PyYAML's, which would take the last of two equal keys (YAML itself forbids them)."""

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
        YamlError: It cannot be read; the text follows a file's name.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise YamlError(f"is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise YamlError("is nested too deeply to be read") from None
    except ValueError as error:  # such as a date of month 13, or bytes that are no text
        raise YamlError(f"is not YAML: {' '.join(str(error).split())[:200]}") from None
