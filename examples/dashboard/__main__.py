"""Run the dashboard on this machine: `PORT=8000 python -m examples.dashboard`."""

import os

import uvicorn

from examples.dashboard.app import app

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
