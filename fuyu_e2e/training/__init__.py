"""Training through Lightning: the module, its optimizers and schedule, and the callbacks around a step."""
