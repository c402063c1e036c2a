from typing import Any

lower_builtin: Any
