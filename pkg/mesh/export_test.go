package mesh

// Patches reports whether an Update with these would patch the last plan.
func (p *Planner) Patches(f Facts, nodes []*Node) bool {
	_, ok := p.patch(f, nodes)
	return ok
}
