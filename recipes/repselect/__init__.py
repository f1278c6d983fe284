"""RepSelect: one step up the loss on the concept, along what nothing else shares."""
