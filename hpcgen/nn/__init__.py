"""Networks: crystals and features in, tensors out. They know neither noise nor losses."""
