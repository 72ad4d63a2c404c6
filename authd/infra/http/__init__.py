"""The only home of Quart: the application, problems, CORS, and how requests are read."""
