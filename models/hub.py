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
    with _told(name, "nothing was exported"):
        HfApi().whoami()


def push(folder: Path, name: str, message: str) -> str:
    """Put all files of a folder into the model repository `name`, which is made if need be.

    Returns:
        The repository's address.

    Raises:
        ConfigError: no right to write there. DataError: the hub cannot be reached, or failed.
    """
    later = f"the export is whole, upload it later with `hf upload {name} {folder} .`"
    with _told(name, later):
        api = HfApi()
        url = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=message)
    return str(url)


@contextmanager
def _told(name: str, state: str) -> Iterator[None]:
    """Errors of the hub as ours; `state` is how things stand then."""
    hub = f"--push-to-hub {name}"
    try:
        yield
    except LocalTokenNotFoundError:
        raise ConfigError(
            f"{hub}: no token for the hub; set HF_TOKEN, or log in with `hf auth login`; {state}"
        ) from None
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        if error.response.status_code in (401, 403):
            raise ConfigError(
                f"{hub}: the hub refuses the token ({reason}); take one with the right to write; "
                f"{state}"
            ) from None
        raise DataError(f"{hub}: the hub failed ({reason}); {state}") from None
    except (HTTPError, OSError) as error:
        raise DataError(
            f"{hub}: the hub does not answer ({type(error).__name__}: {error}); unset "
            f"HF_HUB_OFFLINE, or see HF_ENDPOINT and the network; {state}"
        ) from None
