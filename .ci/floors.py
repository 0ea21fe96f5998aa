"""Print the lowest versions that pyproject.toml promises, as pip constraints for `make test-oldest`."""

import pathlib
import re
import tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
for requirement in [*project["dependencies"], *extras["report"], *extras["analysis"], *extras["endpoint"]]:
    name, floor = re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", requirement).groups()
    print(f"{name}=={floor}")
