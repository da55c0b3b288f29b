"""Hardware profiles by name or file; see `core.profile` for what is in one."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from hybrimoe_kt.core.profile import Profile, parse_profile
from hybrimoe_kt.errors import ConfigError, unknown_name

__all__ = ["builtin_profiles", "load_profile"]


def builtin_profiles() -> tuple[str, ...]:
    """Return the names of the packaged profiles, sorted."""
    folder = resources.files(__name__)
    return tuple(sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")))


def load_profile(name_or_path: str | Path) -> Profile:
    """Return a packaged profile by name, or the one in a JSON file (anything with a slash or ending in .json)."""
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(".json") or "/" in text or "\\" in text:
        path = Path(name_or_path)
        try:
            content = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"profile {text}: cannot be read ({error.strerror}); give a JSON file or one of: "
                f"{', '.join(builtin_profiles())}"
            ) from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"profile {text}: not UTF-8 text (byte {error.start}); give a JSON file") from None
        return parse_profile(content, name=path.stem, file=text)
    if text not in builtin_profiles():
        raise ConfigError(unknown_name("profile", text, builtin_profiles()))
    packaged = resources.files(__name__).joinpath(f"{text}.json")
    return parse_profile(packaged.read_text(encoding="utf-8"), name=text, file=f"{text}.json")
