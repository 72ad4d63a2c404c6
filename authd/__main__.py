from authd.cli.main import main

raise SystemExit(main())
