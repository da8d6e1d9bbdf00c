"""For every test: `import ranks` works (this folder is on the path), and its processes end with the session."""

import ranks


def pytest_sessionfinish():
    ranks.close_all()
