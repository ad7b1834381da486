"""One call, Batch to Outputs, whatever gives the teacher's answers."""
