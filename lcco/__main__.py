"""`python -m lcco` is `lcco`."""

from lcco.cli import main

raise SystemExit(main())
