"`python -m mmkit` is the command `mmkit`. Written by hand: nbdev exports no module of this name."

import sys

from mmkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
