"""The version, and how to install it: what changes with a release."""

__version__ = "0.1.0"


def how_to_install(extra: str) -> str:
    """What error messages tell to run for the packages that an extra of pyproject.toml names."""
    return f'pip install -e ".[{extra}]" in a clone of normext'
