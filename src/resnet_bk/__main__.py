import sys

from resnet_bk.cli import main

sys.exit(main())
