"""Models of other libraries, each as a `Model` and its variables."""
