package doctor

// Examine decides what is wrong. It goes by the facts alone.
func Examine(f Facts) []Check {
	var out []Check
	out = append(out, ExamineChains(f.Chain, &f)...)
	for _, check := range []func(Facts) Check{
		checkHelper, checkKey, checkRotation, checkSecret, checkWireGuard, checkPort, checkTables, checkPlan,
		checkRegistry, checkRecord, checkConflicts, checkClock,
		checkUnderlay, checkFirewall, checkForward, checkForwarding, checkReversePath,
		checkRules, checkRoutes, checkMark, checkManagers,
	} {
		out = append(out, check(f))
	}
	return append(out, checkPeers(f)...)
}
