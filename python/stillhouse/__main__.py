"""`python -m stillhouse`, which is also what launchers of several processes start."""

from stillhouse.cli import main

if __name__ == "__main__":
    main()
