"""A call carried out: outputs, workspace, launches; autograd; operators."""
