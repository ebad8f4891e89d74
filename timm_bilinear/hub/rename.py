"""A card that was written for one repo, for another one."""

import re
from typing import List, Optional

import yaml

__all__ = ['rename_card']

_ID = r'[\w.-]+/[\w.-]+'
_LOADED = re.compile(rf'hf[-_]hub:({_ID})')
_METADATA = re.compile(r'\A(\ufeff?---[ \t]*\r?\n)(.*?)(\r?\n---[ \t]*(?:\r?\n|\Z))', re.DOTALL)


def _old_id(text: str, repo_id: str) -> Optional[str]:
    """Repo that a card loads its model from, if that is another one.

    Raises:
        ValueError: If it loads several, and which of them is its own cannot be told.
    """
    ids: List[str] = [i.rstrip('.') for i in dict.fromkeys(_LOADED.findall(text))]
    if not ids or repo_id in ids:
        return None
    titles = re.findall(r'^# +(\S+)\s*$', text, re.MULTILINE)
    own = ids if len(ids) == 1 else [i for i in ids if i.split('/')[1] in titles[:1]]
    if len(own) != 1:
        told = ', '.join(map(repr, ids))
        raise ValueError(f"README.md loads {told}, none of which is '{repo_id}': name it there.")
    return own[0]


def _scalar(name: str) -> str:
    """A name as YAML has it, in quotes if it would be a number or the like without."""
    return name if yaml.safe_load(name) == name else f"'{name}'"


def rename_card(text: str, repo_id: str) -> str:
    """Make a card name the repo that it is pushed to.

    What a generated card says of its repo is rewritten: its title, the name that its model is loaded by, and that in
    the metadata's model index. The rest is left as it is, byte for byte.

    Args:
        text: The card.
        repo_id: Its repo, 'owner/name'.

    Returns:
        The card, the same text if it names no other repo.

    Raises:
        ValueError: If it loads models of several other repos, and which is its own cannot be told.
    """
    old_id = _old_id(text, repo_id)
    if old_id is None:
        return text
    old, new = old_id.split('/')[1], repo_id.split('/')[1]
    end = r'(?![\w/-]|\.\w)'
    text = re.sub(rf'(hf[-_]hub:){re.escape(old_id)}{end}', lambda m: m[1] + repo_id, text)
    text = re.sub(rf'(huggingface\.co/){re.escape(old_id)}{end}', lambda m: m[1] + repo_id, text)
    text = re.sub(rf'^(# +){re.escape(old)}(?=\s*$)', lambda m: m[1] + new, text, count=1, flags=re.MULTILINE)
    if match := _METADATA.match(text):
        # an entry of the index itself, not of the datasets or metrics further in
        name = re.compile(
            rf'^((?:model_name| {{0,2}}-[ \t]+name):[ \t]*)([\'"]?){re.escape(old)}\2(?=[ \t]*\r?$)', re.MULTILINE
        )
        metadata = name.sub(lambda m: m[1] + _scalar(new), match[2])
        text = match[1] + metadata + match[3] + text[match.end() :]
    return text
