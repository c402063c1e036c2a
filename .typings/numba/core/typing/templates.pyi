from typing import Any

infer_global: Any
signature: Any

class ConcreteTemplate:
    key: Any
    cases: Any
