"""``python -m llmstream``"""

from llmstream.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
