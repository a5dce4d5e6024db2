"""Uploads an exported folder to the Hugging Face hub, or to another one that HF_ENDPOINT names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi

# HTTPError: of whichever library it speaks HTTP with, say for a hub that does not answer.
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from loaders.errors import ConfigError, DataError


def require_access(name: str) -> None:
    """Refuse, before anything is exported, a name or a token that the hub would not take.

    Raises:
        ConfigError: `name` is no name of a repository, or there is no token, or a wrong one.
        DataError: the hub cannot be reached.
    """
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ConfigError(f"--push-to-hub {name}: {error}") from None
    with _told(name):
        HfApi().whoami()


def push(folder: Path, name: str, message: str) -> str:
    """Put all files of a folder into the model repository `name`, which is made if need be.

    Returns:
        The repository's address.

    Raises:
        ConfigError: no right to write there. DataError: the hub cannot be reached, or failed.
    """
    with _told(name):
        api = HfApi()
        url = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=message)
    return str(url)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Errors of the hub as ours."""
    hub = f"--push-to-hub {name}"
    try:
        yield
    except LocalTokenNotFoundError:
        raise ConfigError(
            f"{hub}: no token for the hub; set HF_TOKEN, or log in with `hf auth login`"
        ) from None
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        if error.response.status_code in (401, 403):
            raise ConfigError(
                f"{hub}: the hub refuses the token ({reason}); take one with the right to write"
            ) from None
        raise DataError(f"{hub}: {reason}; the export itself is whole, run it again") from None
    except (HTTPError, OSError) as error:
        raise DataError(
            f"{hub}: the hub does not answer ({type(error).__name__}: {error}); unset "
            "HF_HUB_OFFLINE, or see HF_ENDPOINT and the network"
        ) from None
