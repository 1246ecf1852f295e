"""The settings themselves: schema, typed values, numbers that follow from them."""
