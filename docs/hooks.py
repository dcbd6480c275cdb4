"""What the site needs beyond the pages in docs/: documents of the repository's root, and links to its files.

Pages link as a code host needs it. Links to CONTRIBUTING.md, CHANGELOG.md and LOG.md lead to their pages of
the site; links to other files outside docs/ become their names, since the site has no address for them.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "LOG.md")
"Documents of the root that are pages of the site too."


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents of the root."""
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Adapt the links of a page."""
    uri = page.file.src_uri
    folder = Path(config.docs_dir, uri).parent if uri not in PAGES else ROOT

    def adapted(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = (folder / target).resolve()
        inside = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        if str(inside) in PAGES or (uri in PAGES and path.is_relative_to(config.docs_dir)):
            name = str(inside) if str(inside) in PAGES else str(path.relative_to(config.docs_dir))
            return f"[{text}]({os.path.relpath(name, Path(uri).parent)}{anchor})"
        if path.is_relative_to(config.docs_dir):
            return match[0]
        return f"{text} (`{inside}`)" if path.name not in text else text

    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)", lambda m: adapted(m), markdown)
