package crash

// readOld is read for the calls that younger architectures do not have.
func (t *tracer) readOld(int, uint64, [6]uint64) (c Call, ok bool) { return c, false }
