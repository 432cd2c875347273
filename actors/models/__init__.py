"""Language models, classifiers and tokenizers: their computations, and their folders."""
