"""`python -m dinov2 COMMAND …`: the same as the `dinov2` console script."""

from dinov2.console import main

if __name__ == "__main__":
    main()
