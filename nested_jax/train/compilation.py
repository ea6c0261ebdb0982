"""The cache of compiled programs, by which a second start of a program need not compile."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from nested_jax.errors import UserError

_SECONDS = 0.1  # of a compilation, from which on it is kept


def keep_compiled(folder: str = "auto") -> None:
    """From now on compiled programs are kept in a folder, and read from it.

    Args:
        folder: its path; "auto" for JAX's own setting or else `user_folder()`, if that can be written to; "none" for none.

    Raises:
        UserError: a folder that was named cannot be written to.
    """
    if folder == "auto" and jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    path = None
    try:
        if folder != "none":
            path = user_folder() if folder == "auto" else Path(folder).expanduser()
        if path is not None:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)  # what is in it will be executed
            if not os.access(path, os.W_OK):
                raise PermissionError(None, "Permission denied")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        if folder != "auto":
            reason = getattr(error, "strerror", None) or error
            remedy = "give another folder or none"
            raise UserError(f"--compilation-cache {folder} cannot be written to: {reason}; {remedy}") from error
        path = None
    jax.config.update("jax_compilation_cache_dir", path and str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS)
    compilation_cache.reset_cache()


def user_folder() -> Path:
    """The folder for this machine in the user's cache: XLA compiles for a processor, which JAX's keys leave out."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    machine = hashlib.blake2b("\n".join([*os.uname()[4:], *processor]).encode(), digest_size=4).hexdigest()
    return Path(cache, "nested_jax", f"compiled-{machine}")
