import sys

from analysis.select.command import main

sys.exit(main())
