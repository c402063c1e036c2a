"""spark, the embedded model: a demonstration of about 5 M parameters, as an ordinary checkpoint directory."""
