"""Licences as the Hugging Face Hub abbreviates them (https://huggingface.co/docs/hub/repositories-licenses)."""

import difflib
import os
from typing import Any, Optional

__all__ = ['LICENSES', 'check_license']

LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
    """.split()
)


def check_license(license: Any, name: Optional[str] = None, link: Optional[str] = None, where: str = '') -> None:
    """Check that the Hub knows a licence.

    Args:
        license: The Hub's abbreviation; None for none named.
        name: Name of a licence that the Hub has no abbreviation of, which is then 'other'.
        link: Where that licence is to be read: a URL, or a file of the repo.
        where: What names it, for the message; '' for the argument.

    Raises:
        ValueError: If it does not, or name and link do not go with it.
    """
    what = f'the licence in {where}' if where else "'license'"
    if license is None and not name and not link:
        return
    if not isinstance(license, str) or license not in LICENSES:
        is_close = isinstance(license, str)
        spelled = license.strip().lower().replace(' ', '-') if is_close else ''
        close = [spelled] if spelled in LICENSES else difflib.get_close_matches(spelled, sorted(LICENSES), n=3)
        hint = f'did you mean {" or ".join(map(repr, close))}?' if close else "for one it has not, 'other' and a name."
        raise ValueError(
            f'{what[0].upper()}{what[1:]} must be one that the Hub knows, such as apache-2.0, mit or cc-by-nc-4.0, got'
            f' {license!r}: {hint}'
        )
    if license == 'other' and not name:
        raise ValueError(f"{what[0].upper()}{what[1:]} is 'other', and its name is missing ('license_name').")
    if license != 'other' and (name or link):
        raise ValueError(f"'license_name' and 'license_link' are for the licence 'other', got {license!r}.")
    if link and (os.path.isabs(link) or link.startswith(('~', '.', 'file:')) or '\\' in link):
        raise ValueError(f"'license_link' must be a URL or the name of a file of the repo, got {link!r}.")
