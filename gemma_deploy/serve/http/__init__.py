"""OpenAI's HTTP interface in front of schedulers. Needs Starlette and uvicorn (`pip install "gemma-deploy[serve]"`)."""
