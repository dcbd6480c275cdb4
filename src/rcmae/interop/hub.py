"""Uploading an exported folder to the Hugging Face hub."""

from pathlib import Path

from ..errors import ConfigError, first_line, optional


def push(folder: Path, repo: str) -> str:
    """Upload a folder to the repository `repo`, "OWNER/NAME", and return its address; a new repository is
    private. Raises ConfigError without network or token, or if the hub refuses."""
    hub = optional("huggingface_hub", "hub")
    try:
        address = hub.create_repo(repo, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=["manifest.json"])
    except Exception as e:  # of several libraries: no network, no token, no right, an invalid name
        raise ConfigError(
            f"{folder} is written, but cannot be pushed to {repo}: {first_line(e)}; after `hf auth login`, "
            f"`hf upload {repo} {folder}` does the same"
        ) from e
    return str(address)
