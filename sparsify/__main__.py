"""`sparsify` on the command line, and `python -m sparsify`."""

import os
import sys


def main() -> None:
    """Run the command line; its packages are extras, so say which are missing."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler writes to stderr; read when torch loads
    try:
        from sparsify.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"error: the command line needs {error.name}: pip install 'sparsify-attention[cli,models]'")
    app()


if __name__ == "__main__":
    main()
