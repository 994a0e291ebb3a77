"""Class folders: how the paths of images name splits and classes, and which layouts are refused."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightship.data.sources.file_names import count_by_suffix, is_ignored, list_some
from lightship.data.sources.parts import Labels
from lightship.data.sources.split_names import SPLITS, split_of_name, template
from lightship.errors import DataError

logger = logging.getLogger(__name__)
_MAX_BESIDE = 0.1

Pieces = Mapping[tuple[str, ...], int]
"""Folders, cut at their slashes and with "" at the end -> the images directly in them."""
Pair = tuple[str, str]
"""(split, class)."""


@dataclass
class ClassFolders:
    """How image paths name splits and classes."""

    pairs: list[Pair | None]
    """Of each folder with images; None: it is in no class folder."""
    folder: np.ndarray
    """[N] into `pairs`: the folder of each path."""
    splits: dict[str, str] = field(default_factory=dict)
    """The folder that holds a split's class folders -> the split."""

    @property
    def assigned(self) -> list[Pair | None]:
        """Of each path; None: in no class folder."""
        return [self.pairs[number] for number in self.folder.tolist()]

    def images_of(self, split: str) -> tuple[np.ndarray, Labels]:
        """(whether each path is of a split, [N] bool, and the classes of those that are)."""
        is_folder = np.array([pair is not None and pair[0] == split for pair in self.pairs])
        classes = Labels.of(pair[1] for pair in self.pairs if pair and pair[0] == split)
        class_of = np.zeros(len(self.pairs), dtype=np.int32)
        class_of[is_folder] = classes.index
        is_image = is_folder[self.folder]
        return is_image, Labels(classes.values, class_of[self.folder[is_image]])


def read_class_folders(paths: Sequence[str], root: str, split: str = "train") -> ClassFolders:
    """Read `[TOP/]SPLIT/CLASS/.../IMAGE` or `[TOP/]CLASS/.../IMAGE`.

    TOP is any chain of single folders around the splits or classes, as archivers make them. SPLIT
    is a folder that is named train, val or test or has such a word in its name (`split_words`); it
    may stand twice (seg_train/seg_train/CLASS).

    Args:
        paths: Of the images.
        root: What to call the root.
        split: The split of all images if no folder is one.

    Raises:
        DataError: No image lies in a class folder, two folders name one split, or the folders can
            be read in two ways.
    """
    pieces, folder = _pieces(paths)
    cut = _depth_of_top(pieces)
    top = "".join(f"{part}/" for part in max(pieces, key=len)[:cut])
    splits = _split_folders(pieces, cut, paths[0], root)
    if splits:
        depth = {name: _depth_of_classes(pieces, cut, name, splits) for name in splits}

        def pair_of(piece: Sequence[str]) -> Pair | None:
            if len(piece) <= cut + 1 or piece[cut] not in splits:
                return None
            at = depth[piece[cut]]
            return (splits[piece[cut]], piece[at]) if len(piece) >= at + 2 else None

        found = ClassFolders(list(map(pair_of, pieces)), folder)
        for piece, pair in zip(pieces, found.pairs, strict=True):
            if pair:
                found.splits.setdefault("/".join(piece[: depth[piece[cut]]]), pair[0])
        found.splits = dict(sorted(found.splits.items()))
    else:
        found = ClassFolders(
            [(split, p[cut]) if len(p) >= cut + 2 else None for p in pieces],
            folder,
            {top.rstrip("/"): split},
        )
    if not any(found.pairs):
        raise _no_class_folder(paths, root)
    if None in found.pairs:
        is_outside = np.array([pair is None for pair in found.pairs])[folder]
        logger.warning(
            f"{root}: {is_outside.sum()} images outside the class folders are not used, "
            f"such as {paths[int(np.argmax(is_outside))]}"
        )
    return found


def _pieces(paths: Sequence[str]) -> tuple[Pieces, np.ndarray]:
    """(the folders of files in their order, and into these the folder of each file, [N] int32)."""
    folders = Labels.of(path[: path.rfind("/") + 1] for path in paths)
    pieces = (tuple(str(folder).split("/")) for folder in folders.values)
    counts = np.bincount(folders.index, minlength=len(folders.values)).tolist()
    return dict(zip(pieces, counts, strict=True)), folders.index


def _no_class_folder(paths: Sequence[str], root: str) -> DataError:
    return DataError(
        f"{root}: the images lie in no class folder (such as {paths[0]}); expected "
        "ROOT/CLASS/IMAGE or ROOT/{train,val,test}/CLASS/IMAGE under --data.root"
    )


def _depth_of_top(pieces: Pieces) -> int:
    """How many folders lie around all images, down to the splits or classes."""
    cut, longest = 0, max(pieces, key=len)
    while (
        len(longest) >= cut + 3
        and len({tuple(piece[: cut + 1]) for piece in pieces if len(piece) > cut + 1}) == 1
    ):
        inner = {piece[cut + 1].lower() for piece in pieces if len(piece) >= cut + 3}
        is_set_of_splits = len(inner) > 1 and inner <= set(SPLITS)
        if longest[cut].lower() in SPLITS and not is_set_of_splits:
            break
        cut += 1
    return cut


def _folders_at(pieces: Pieces, cut: int) -> dict[str, Counter[str]]:
    """Folder at a depth -> its sub-folders and their images; "" for images right in it."""
    folders: dict[str, Counter[str]] = {}
    for piece, images in pieces.items():
        if len(piece) >= cut + 2:
            inner = piece[cut + 1] if len(piece) >= cut + 3 else ""
            folders.setdefault(piece[cut], Counter())[inner] += images
    return folders


def _depth_of_classes(pieces: Pieces, cut: int, name: str, splits: Mapping[str, str]) -> int:
    """The depth of the class folders of the split folder `name`, which may hold itself again."""
    depth, inside = cut + 1, [p for p in pieces if len(p) > cut + 1 and p[cut] == name]
    while True:
        inner = {piece[depth] if len(piece) >= depth + 2 else "" for piece in inside}
        again = min(inner)
        holds_folders = all(len(piece) >= depth + 3 for piece in inside)
        is_again = again.lower() in (name.lower(), *SPLITS) or holds_folders
        if len(inner) > 1 or split_of_name(again) != splits[name] or not is_again:
            return depth
        depth += 1


def _split_folders(pieces: Pieces, cut: int, first: str, root: str) -> dict[str, str]:
    """Folder -> split of the folders that are splits; empty where the folders are classes.

    Raises:
        DataError: The folders can be read in two ways, or two name one split.
    """
    folders = _folders_at(pieces, cut)
    deep = {name: set(inner) - {""} for name, inner in folders.items() if set(inner) - {""}}
    words = {name: split for name in folders if (split := split_of_name(name))}
    whole = {name: split for name, split in words.items() if name.lower() in SPLITS}
    siblings = _siblings(words)
    if not deep and words and set(folders) in (set(whole), siblings):
        raise _no_class_folder([first], root)
    chosen = {name: whole[name] for name in sorted(whole) if name in deep}
    chosen = chosen or {name: words[name] for name in sorted(siblings) if name in deep}
    if not chosen and deep and len(words) == len(folders) and len(set(words.values())) > 1:
        if not _share(deep.values()):
            raise _two_readings(sorted(folders), root)
        chosen = {name: words[name] for name in sorted(deep)}
    if not chosen:
        _check_one_reading(pieces, cut, root)
        return {}
    for name in sorted(set(words) & set(deep) - set(chosen)):
        is_other_split = words[name] not in chosen.values()
        if (is_other_split or not whole) and _share([deep[name], *map(deep.get, chosen)]):
            chosen[name] = words[name]
    _check_one_folder_each(chosen, root)
    flat = {words[name] for name in words if name not in deep}
    beside = sorted(set(folders) - set(chosen) - (set(words) - set(deep)))
    if beside and len(set(chosen.values()) | flat) == 1:
        raise _lone_split(next(iter(chosen.items())), deep, beside, root)
    return chosen


def _siblings(words: Mapping[str, str]) -> set[str]:
    """The folders with a sibling whose name differs in the split's word: seg_train, seg_test."""
    by_template: dict[str, set[str]] = {}
    for name in words:
        by_template.setdefault(template(name), set()).add(name)
    groups = [names for names in by_template.values() if len({words[n] for n in names}) > 1]
    return set().union(*groups)


def _share(inner: Iterable[set[str] | None]) -> bool:
    """Whether at least half of the sub-folders' names stand in several folders."""
    counts = Counter(name for names in inner for name in names or ())
    shared = sum(count > 1 for count in counts.values())
    return shared > 0 and 2 * shared >= len(counts)


def _check_one_folder_each(chosen: Mapping[str, str], root: str) -> None:
    by_split: dict[str, str] = {}
    for name, split in chosen.items():
        other = by_split.setdefault(split, name)
        if other != name:
            raise DataError(f"{root}: {other}/ and {name}/ both name the split {split}; rename one")


def _check_one_reading(pieces: Pieces, cut: int, root: str) -> None:
    """Refuse folders that may be classes as well as parts, each of which holds the classes."""
    while True:
        folders = _folders_at(pieces, cut)
        inner = [set(names) - {""} for names in folders.values()]
        beside = sum(names[""] for names in folders.values())
        if beside > _MAX_BESIDE * sum(pieces.values()) or len(folders) < 2:
            return
        names = Counter(name for each in inner for name in each)
        if len(names) > 1 and _share(inner):
            shared = [name for name, count in names.items() if count > 1]
            raise _two_readings(sorted(folders), root, sorted(shared))
        if any(len(each) != 1 for each in inner):
            return
        # Each holds a single folder, such as images/: what counts lies below.
        pieces = {
            (f"{piece[cut]}/{piece[cut + 1]}", *piece[cut + 2 :]): images
            for piece, images in pieces.items()
            if len(piece) > cut + 2
        }
        cut = 0


def _two_readings(folders: list[str], root: str, shared: list[str] | None = None) -> DataError:
    inside = f"hold the same folders ({list_some(shared)})" if shared else "have names of splits"
    return DataError(
        f"{root}: the folders {list_some(folders)} {inside}, so they may be the classes or parts "
        "of the set: if they are the classes, move them into a folder train/; if they are parts, "
        "name them train, val or test, or give one of them as --data.root"
    )


def _lone_split(
    split: tuple[str, str], deep: Mapping[str, set[str]], beside: list[str], root: str
) -> DataError:
    name = split[0]
    return DataError(
        f"{root}: the folder {name} may be the split {split[1]} with the classes "
        f"{list_some(deep[name])}, or a class beside {list_some(beside)}: if it is the split, move "
        "the other folders out of --data.root; if it is a class, move all into a folder train/"
    )


def check_no_empty_class(
    found: ClassFolders,
    others: Collection[str],
    folders_in: Callable[[str], Iterable[str]],
    root: str,
) -> None:
    """Raise DataError for a class folder without an image.

    Args:
        found: The layout of the images.
        others: Paths of all other files, whose folders may be class folders too.
        folders_in: The names of the folders directly in a folder, as far as the storage has any.
        root: What to call the root.
    """
    full = set(found.pairs)
    for holder, split in found.splits.items():
        prefix = f"{holder}/" if holder else ""
        inside = (other[len(prefix) :] for other in others if other.startswith(prefix))
        names = {path.partition("/")[0] for path in inside if "/" in path}
        names |= set(folders_in(holder))
        for name in sorted(names):
            if (split, name) not in full and not is_ignored(name):
                held = (other for other in others if other.startswith(f"{prefix}{name}/"))
                raise DataError(
                    f"{root}: the class folder {prefix}{name}/ has no image "
                    f"(found {count_by_suffix(held)}); fill it or remove it"
                )
