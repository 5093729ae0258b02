"""``python -m dowser_peft`` is the console script ``dowser-peft``."""

from dowser_peft.cli import main

if __name__ == "__main__":
    main()
