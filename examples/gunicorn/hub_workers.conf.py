"""For gunicorn -c: the model is loaded once, then four workers are forked that share its memory and one hub."""

from pathlib import Path

wsgi_app = "hub_workers:app"
chdir = str(Path(__file__).resolve().parents[1])
workers = 4
preload_app = True
timeout = 120
