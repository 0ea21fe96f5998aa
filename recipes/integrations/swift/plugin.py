"""What `--external_plugins` loads: ms-swift takes files, and this one names the installed module."""

import qscope_posttrain.integrations.swift  # noqa: F401
